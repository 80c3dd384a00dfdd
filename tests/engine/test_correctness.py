"""Steered text from ragged batches equals the per-prompt, cache-free reference, token for token (PEERS' failures)."""

from __future__ import annotations

import random

import pytest

from ensemble_decode import LLM, ExpertPair, SamplingParams
from tests.conftest import VOCAB, Models
from tests.engine.reference_text import Side, generate

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=12, seed=11)


def prompts(count: int = 4, seed: int = 0) -> list[list[int]]:
    """Unequal lengths, some within one block of the cache, some across several."""
    chance = random.Random(seed)
    return [[chance.randrange(3, VOCAB) for _ in range(length)] for length in [3, 17, 8, 41, 16, 1, 33, 5][:count]]


def ensemble(family: str, kind: str, models: Models) -> tuple[dict[str, ExpertPair], list[tuple[Side, Side]]]:
    """Pairs as the engine takes them, and the same for the reference."""
    target = models.model(family)
    if kind == "none":
        return {}, []
    if kind == "full":
        plus, minus = models.model(family, 1), models.model(family, 2)
        return {"a": ExpertPair(plus, minus)}, [(Side(plus), Side(minus))]
    if kind == "lora":
        plus, minus = models.adapter(family, 1), models.adapter(family, 2)
        return {"a": ExpertPair(plus, minus)}, [(Side(target, plus), Side(target, minus))]
    if kind == "lora over another base":
        base = models.model(family, 1)
        plus, minus = models.adapter(family, 1), models.adapter(family, 2)
        return {"a": ExpertPair(plus, minus, base=base)}, [(Side(base, plus), Side(base, minus))]
    if kind == "expert alone":
        plus = models.model(family, 1)
        return {"a": ExpertPair(plus)}, [(Side(plus), Side(target))]
    if kind == "three":
        full, lora = ensemble(family, "full", models), ensemble(family, "lora", models)
        extra = models.adapter(family, 3)
        # A mixed pair as well: an adapter over the target against a full model.
        mixed = ExpertPair(extra, models.model(family, 2))
        return (
            {"a": full[0]["a"], "b": lora[0]["a"], "c": mixed},
            [*full[1], *lora[1], (Side(target, extra), Side(models.model(family, 2)))],
        )
    raise AssertionError(kind)


KINDS = ["none", "full", "lora", "lora over another base", "expert alone", "three"]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ragged_batch_equals_reference(family: str, kind: str, params: SamplingParams, models: Models) -> None:
    pairs, sides = ensemble(family, kind, models)
    alphas = [0.7, -0.4, 0.5][: len(sides)]
    llm = LLM(models.model(family), pairs, dtype="float32", placement="lanes", max_num_batched_tokens=24)
    steer = SamplingParams(**{**as_dict(params), "alpha": dict(zip(pairs, alphas, strict=True))})
    outputs = llm.generate(prompts(), steer, use_tqdm=False)
    expected = [generate(Side(models.model(family)), sides, alphas, prompt, params) for prompt in prompts()]
    assert [o.outputs[0].token_ids for o in outputs] == expected
    # The same again: now the prompts' blocks are found in the cache.
    again = llm.generate(prompts()[::-1], steer, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in again] == expected[::-1]
    assert any(o.metrics.cached_tokens > 0 for o in again)


@pytest.mark.parametrize("kind", ["lora", "full", "three", "prompts"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_preemption_sharing_and_arrival_change_nothing(family: str, kind: str, models: Models) -> None:
    """A cache for about two of eight sequences: most are preempted and recomputed, and arrive in any order."""
    path = models.model(family)
    guidance = {"a": ExpertPair.from_prompts(anti_expert="")}
    pairs, sides = (guidance, []) if kind == "prompts" else ensemble(family, kind, models)
    steer = SamplingParams(temperature=0.0, max_tokens=16, alpha=0.6)
    expected = []
    for prompt in prompts(8):
        own = [(Side(path), Side(path, prompt=tuple(prompt[-1:])))] if kind == "prompts" else sides
        expected.append(generate(Side(path), own, [0.6] * len(own), prompt, steer))
    roomy = LLM(path, pairs, dtype="float32")
    few = 9 * roomy.ensemble.bytes_per_block
    for caching in (True, False):
        tight = LLM(path, pairs, dtype="float32", kv_cache_bytes=few, enable_prefix_caching=caching)
        for order in (list(range(8)), [5, 2, 7, 0, 3, 6, 1, 4]):
            outputs = tight.generate([prompts(8)[i] for i in order], steer, use_tqdm=False)
            assert [o.outputs[0].token_ids for o in outputs] == [expected[i] for i in order]
            assert sum(o.metrics.preemptions for o in outputs) > 0
        assert tight.engine.blocks.num_free == tight.runner.num_blocks


def test_pairs_of_prompts_are_guidance(models: Models) -> None:
    """Classifier-free guidance: the negative side has its own prompt, on the target's own weights."""
    for family in ("gpt2", "llama"):
        path = models.model(family)
        llm = LLM(path, {"cfg": ExpertPair.from_prompts(anti_expert="", alpha=0.6)}, dtype="float32")
        assert len(llm.ensemble.groups) == 1
        assert llm.ensemble.layout.num_pools == 1
        outputs = llm.generate(prompts(), GREEDY, use_tqdm=False)
        # Without a tokenizer "" is the last token of the prompt, as in transformers' own guidance.
        expected = [
            generate(Side(path), [(Side(path), Side(path, prompt=tuple(prompt[-1:])))], [0.6], prompt, GREEDY)
            for prompt in prompts()
        ]
        assert [o.outputs[0].token_ids for o in outputs] == expected


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_batch_invariance(params: SamplingParams, models: Models) -> None:
    """Alone, in a batch of 32, or submitted while others run: the same tokens."""
    pairs, _ = ensemble("llama", "lora", models)
    llm = LLM(models.model("llama"), pairs, dtype="float32")
    watched = prompts()[1]
    alone = llm.generate(watched, params, use_tqdm=False)[0].outputs[0].token_ids
    crowd = [[*p, i + 3] for i, p in enumerate(prompts(8) * 4)]
    crowd[13] = watched
    assert llm.generate(crowd, params, use_tqdm=False)[13].outputs[0].token_ids == alone
    for index, prompt in enumerate(crowd[:10]):
        llm.engine.add_request(prompt, params, f"crowd-{index}")
    for _ in range(5):
        llm.engine.step()
    llm.engine.add_request(watched, params, "late")
    done = {}
    while llm.engine.has_work:
        done.update({o.request_id: o for o in llm.engine.step() if o.finished})
    assert done["late"].outputs[0].token_ids == alone


def test_bfloat16_is_batch_invariant_too(models: Models) -> None:
    """Every operator fixes the order of its sums, so this holds to the bit in any dtype."""
    pairs, _ = ensemble("llama", "lora", models)
    llm = LLM(models.model("llama"), pairs, dtype="bfloat16", max_num_batched_tokens=16)
    together = llm.generate(prompts(8), SAMPLED, use_tqdm=False)
    alone = [llm.generate(p, SAMPLED, use_tqdm=False)[0] for p in prompts(8)]
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]


def test_a_step_without_logits_and_whole_numbers_as_parameters(models: Models) -> None:
    """A prompt longer than a step fills steps that need no logits at all; 0 and 1 are as good as 0.0 and 1.0."""
    pairs, _ = ensemble("llama", "lora", models)
    small = LLM(models.model("llama"), pairs, dtype="float32", max_num_batched_tokens=16)
    large = LLM(models.model("llama"), pairs, dtype="float32")
    prompt = prompts()[3]
    whole = SamplingParams(temperature=0, alpha=1, top_p=1, min_p=0, max_tokens=6)
    exact = SamplingParams(temperature=0.0, alpha=1.0, top_p=1.0, min_p=0.0, max_tokens=6)
    found = [llm.generate(prompt, params, use_tqdm=False)[0] for llm, params in ((small, whole), (large, exact))]
    assert found[0].outputs[0].token_ids == found[1].outputs[0].token_ids
    assert found[0].outputs[0].error is None


def test_a_bias_of_any_size_is_a_number_like_others(models: Models) -> None:
    """Whole numbers beyond 64 bits are float32 all the same; the request beside it is not touched."""
    llm = LLM(models.model("llama"), dtype="float32")
    biased = [SamplingParams(temperature=0.0, max_tokens=3, logit_bias={5: bias}) for bias in (10**30, 1e30, 7, 7.0)]
    outputs = llm.generate([prompts()[1]] * 4, biased, use_tqdm=False)
    found = [output.outputs[0].token_ids for output in outputs]
    assert found[0] == found[1] == [5, 5, 5]
    assert found[2] == found[3]


def test_samples_of_one_prompt(models: Models) -> None:
    """n samples share the prompt, differ by seed, and are what each would be by itself."""
    llm = LLM(models.model("llama"), dtype="float32")
    several = SamplingParams(**{**as_dict(SAMPLED), "n": 4})
    output = llm.generate(prompts()[3], several, use_tqdm=False)[0]
    texts = [sample.token_ids for sample in output.outputs]
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(text) for text in texts}) > 1
    for index, text in enumerate(texts):
        seed = (11 + index * 0x9E3779B97F4A7C15) % 2**64
        one = llm.generate(prompts()[3], SamplingParams(**{**as_dict(SAMPLED), "seed": seed}), use_tqdm=False)[0]
        assert one.outputs[0].token_ids == text


def test_alpha_zero_costs_no_expert_work(models: Models) -> None:
    pairs, _ = ensemble("llama", "full", models)
    llm = LLM(models.model("llama"), pairs, dtype="float32", placement="sequential")
    calls = [0] * len(llm.runner.groups)
    for number, group in enumerate(llm.runner.groups):

        def count(rows, number=number, forward=group.forward):
            calls[number] += 1
            return forward(rows)

        group.forward = count  # type: ignore[method-assign]
    plain = llm.generate(prompts(), SamplingParams(alpha=0.0, temperature=0.0), use_tqdm=False)
    assert calls[0] > 0
    assert calls[1:] == [0, 0]
    llm.generate(prompts(), SamplingParams(alpha=1.0, temperature=0.0), use_tqdm=False)
    assert min(calls) > 0
    target_alone = LLM(models.model("llama"), dtype="float32").generate(
        prompts(), SamplingParams(temperature=0.0), use_tqdm=False
    )
    assert [o.outputs[0].token_ids for o in plain] == [o.outputs[0].token_ids for o in target_alone]


@pytest.mark.parametrize("nucleus", ["combined", "target"])
def test_top_p_does_not_change_greedy(nucleus: str, models: Models) -> None:
    """Peers' base nucleus changes even greedy output; ours only where the contract says so (the target's own mask)."""
    pairs, sides = ensemble("llama", "full", models)
    path = models.model("llama")
    params = SamplingParams(temperature=0.0, top_p=0.9, nucleus=nucleus, max_tokens=8, alpha=0.6)  # type: ignore[arg-type]
    outputs = LLM(path, pairs, dtype="float32").generate(prompts(), params, use_tqdm=False)
    expected = [generate(Side(path), sides, [0.6], prompt, params) for prompt in prompts()]
    assert [o.outputs[0].token_ids for o in outputs] == expected


def test_seeds_are_per_row(models: Models) -> None:
    """One seed a row, in one batch: a row's text is that of its own seed."""
    llm = LLM(models.model("llama"), dtype="float32")
    seeds = [3, 4, 3, 5]
    params = [SamplingParams(**{**as_dict(SAMPLED), "seed": seed}) for seed in seeds]
    texts = [o.outputs[0].token_ids for o in llm.generate([prompts()[1]] * 4, params, use_tqdm=False)]
    assert texts[0] == texts[2]
    assert texts[0] != texts[1]
    assert texts[0] != texts[3]


def as_dict(params: SamplingParams) -> dict:
    return {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__ if name != "stops"}
