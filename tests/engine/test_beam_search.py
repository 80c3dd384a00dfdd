"""Beam search equals a per-prompt, cache-free reference, token for token: Hugging Face's guidance with 3 beams got 0 of 8."""

from __future__ import annotations

import math

import pytest
import torch

from ensemble_decode import LLM, BeamSearchParams, ExpertPair
from ensemble_decode.ops import reference
from tests.conftest import Models
from tests.engine.reference_text import Side, next_logits
from tests.engine.test_correctness import ensemble, prompts

EOS = 2


def search(
    target: Side, pairs: list[tuple[Side, Side]], alpha: float, prompt: list[int], params: BeamSearchParams
) -> list[tuple[list[int], float]]:
    """(new tokens, cumulative log-probability) of the best sequences, by the definition."""

    def rank(beam: tuple[list[int], float]) -> float:
        tokens, total = beam
        length = len(prompt) + len(tokens) - (bool(tokens) and tokens[-1] == EOS and not params.ignore_eos)
        return total / length**params.length_penalty

    beams: list[tuple[list[int], float]] = [([], 0.0)]
    done = []
    for _ in range(params.max_tokens):
        longer = []
        for output, total in beams:
            logits = next_logits(target, prompt, output)
            if pairs:
                plus, minus = (torch.stack([next_logits(pair[i], prompt, output) for pair in pairs]) for i in (0, 1))
                logits = reference.combine(logits, plus, minus, torch.full((1, len(pairs)), alpha))
            best = logits[0].double().log_softmax(-1).topk(2 * params.beam_width)
            longer += [([*output, int(t)], total + float(p)) for p, t in zip(*best, strict=True)]
        ended = [beam for beam in longer if beam[0][-1] == EOS and not params.ignore_eos]
        done += ended
        beams = sorted((b for b in longer if b not in ended), key=rank, reverse=True)[: params.beam_width]
    return sorted(done + beams, key=rank, reverse=True)[: params.beam_width]


@pytest.mark.parametrize("kind", ["none", "lora", "full", "three", "prompts"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_three_beams_of_a_ragged_batch_equal_the_reference(family: str, kind: str, models: Models) -> None:
    """The pair made of prompts is classifier-free guidance: its negative branch must follow the beams."""
    target = Side(models.model(family))
    if kind == "prompts":
        pairs: dict[str, ExpertPair] = {"a": ExpertPair.from_prompts(anti_expert="")}
    else:
        pairs, sides = ensemble(family, kind, models)
    params = BeamSearchParams(beam_width=3, max_tokens=5, alpha=0.6, length_penalty=0.8)
    llm = LLM(models.model(family), pairs, dtype="float32", max_num_batched_tokens=48)
    outputs = llm.beam_search(prompts(), params, use_tqdm=False)
    for prompt, output in zip(prompts(), outputs, strict=True):
        if kind == "prompts":
            sides = [(target, Side(target.path, prompt=tuple(prompt[-1:])))]
        expected = search(target, sides, 0.6, prompt, params)
        assert [s.tokens for s in output.sequences] == [prompt + tokens for tokens, _ in expected]
        for sequence, (_, total) in zip(output.sequences, expected, strict=True):
            assert math.isclose(sequence.cum_logprob, total, rel_tol=1e-5, abs_tol=1e-4)
            assert len(sequence.logprobs) == len(sequence.tokens) - len(prompt)


def test_a_beam_ends_at_the_end_of_the_text_or_of_the_context(models: Models) -> None:
    """With so flat a model and so many beams the end-of-text token comes up; a context of 20 ends the others."""
    llm = LLM(models.model("llama"), dtype="float32", max_model_len=20)
    prompt = prompts()[1]  # 17 tokens
    params = BeamSearchParams(beam_width=90, max_tokens=8)
    found = llm.beam_search(prompt, params, use_tqdm=False)[0].sequences
    assert {s.finish_reason for s in found} == {"stop", "length"}
    for sequence in found:
        assert (sequence.tokens[-1] == EOS) == (sequence.finish_reason == "stop")
        assert (sequence.stop_reason == EOS) == (sequence.finish_reason == "stop")
        assert len(sequence.tokens) == 20 or sequence.finish_reason == "stop"
        assert EOS not in sequence.tokens[17:-1]
    ignoring = BeamSearchParams(beam_width=90, max_tokens=2, ignore_eos=True)
    assert {s.finish_reason for s in llm.beam_search(prompt, ignoring, use_tqdm=False)[0].sequences} == {"length"}


def test_one_beam_is_greedy_and_the_ensemble_does_not_depend_on_sharing_or_on_a_tight_cache(models: Models) -> None:
    from tests.engine.test_correctness import GREEDY

    pairs, _ = ensemble("llama", "lora", models)
    path = models.model("llama")
    roomy = LLM(path, pairs, dtype="float32")
    one = roomy.beam_search(prompts(), BeamSearchParams(beam_width=1, max_tokens=12, ignore_eos=True), use_tqdm=False)
    greedy = roomy.generate(prompts(), GREEDY, use_tqdm=False)
    for prompt, output, text in zip(prompts(), one, greedy, strict=True):
        tokens = text.outputs[0].token_ids
        assert output.sequences[0].tokens[: len(prompt) + len(tokens)] == prompt + tokens
    params = BeamSearchParams(beam_width=4, max_tokens=6)
    expected = [[s.tokens for s in o.sequences] for o in roomy.beam_search(prompts(), params, use_tqdm=False)]
    for caching in (True, False):
        tight = LLM(
            path,
            pairs,
            dtype="float32",
            kv_cache_bytes=9 * roomy.ensemble.bytes_per_block,
            enable_prefix_caching=caching,
        )
        found = tight.beam_search(prompts(), params, use_tqdm=False)
        assert [[s.tokens for s in o.sequences] for o in found] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_width": 0}, "beam_width is 0, allowed is 1 … 500"),
        ({"beam_width": 501}, "beam_width is 501, allowed is 1 … 500"),
        ({"beam_width": True}, "beam_width is True, an integer is allowed"),
        ({"max_tokens": 0}, "max_tokens is 0, allowed is 1 or more"),
        ({"length_penalty": math.nan}, "length_penalty is nan, allowed is a finite number (of float32)"),
        ({"temperature": -1.0}, "temperature is -1.0, allowed is a finite number (of float32) from 0"),
        ({"temperature": "hot"}, "temperature is 'hot', a number is allowed"),
        ({"alpha": "x"}, "alpha is 'x', a number is allowed"),
        ({"ignore_eos": 1}, "ignore_eos is 1, allowed are True and False"),
    ],
)
def test_wrong_parameters(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r"^.*$") as caught:
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, **options})
    assert str(caught.value) == message


def test_wrong_calls(models: Models) -> None:
    llm = LLM(models.model("llama"), dtype="float32")
    params = BeamSearchParams(beam_width=2, max_tokens=2)
    for call, message in [
        (
            lambda: llm.beam_search([[3], []], params),
            "beam_search: prompt 1: prompt is empty, at least one token is needed",
        ),
        (lambda: llm.beam_search([3], None), "params is None, a BeamSearchParams is allowed"),  # type: ignore[arg-type]
    ]:
        with pytest.raises(ValueError, match=r"^.*$") as caught:
            call()
        assert str(caught.value) == message


def test_a_prompt_that_fails_leaves_the_others_alone(models: Models) -> None:
    """A NaN from the model on one prompt's tokens."""
    llm = LLM(models.model("llama"), dtype="float32")
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    before = llm.beam_search(prompts()[1], params, use_tqdm=False)[0]
    weight = llm.ensemble.groups[0].decoder.embed_tokens.weight
    with torch.no_grad():
        weight[198] = math.nan
    bad, good = llm.beam_search([[5, 198], prompts()[1]], params, use_tqdm=False)
    assert bad.sequences == []
    assert bad.error is not None
    assert "\n" not in bad.error
    assert [s.tokens for s in good.sequences] == [s.tokens for s in before.sequences]
