"""Speculation changes no token: on random requests, with a fake model that notices everything, and with real ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ensemble_decode import LLM, ExpertPair, SamplingParams, Speculation
from ensemble_decode.engine.batch import SampleRow
from ensemble_decode.engine.drafting import Acceptance, NgramIndex, best_depth
from tests.conftest import VOCAB as MODEL_VOCAB
from tests.conftest import Models

from .fake import LAYOUT, VOCAB, assert_no_leak, expected, make_engine, run

QUIET = settings(
    deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
#: A draft model of its own, in a pool of its own.
WITH_MODEL = replace(LAYOUT, num_pools=5, draft_pool=4, draft_len=120, draft_vocab=VOCAB - 2)
DRAFTS = {"ngram": LAYOUT, "expert": LAYOUT, "model": WITH_MODEL}

alphas = st.sampled_from(
    [None, 0.0, 1.0, {"gender": 1.5}, {"tone": -0.5}, {"guide": 2.0}, {"gender": 0.5, "tone": 1.0, "guide": -1.0}]
)


@st.composite
def requests(draw: st.DrawFn, vocab: int = VOCAB, longest: int = 60) -> tuple[list[int], SamplingParams]:
    """A prompt, often one that repeats itself, and parameters of every kind."""
    piece = draw(st.lists(st.integers(1, min(vocab, 32) - 1), min_size=1, max_size=12))
    prompt = (piece * draw(st.integers(1, 6)))[:longest]
    maybe = st.sampled_from([0.0, 0.0, 0.4])
    return prompt, SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.5, 1.0])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        top_k=draw(st.sampled_from([0, 6])),
        nucleus=draw(st.sampled_from(["combined", "target"])),
        max_tokens=draw(st.integers(1, 40)),
        min_tokens=draw(st.sampled_from([0, 0, 1])),
        n=draw(st.sampled_from([1, 1, 1, 3])),
        seed=draw(st.integers(0, 2**40)),
        stop_token_ids=draw(st.sampled_from([None, None, [5, 9]])),
        ignore_eos=draw(st.booleans()),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
        presence_penalty=draw(maybe),
        frequency_penalty=draw(maybe),
        logit_bias=draw(st.sampled_from([None, None, {4: 2.0, 7: -1.0}])),
        logprobs=draw(st.sampled_from([None, 0, 2])),
    )


class Oracle:
    """A draft model that knows what comes next, and is wrong after ``wrong`` of 8 texts; it checks what it reads."""

    def __init__(self, wrong: int, layout) -> None:
        self.wrong = wrong
        self.layout = layout
        self.texts: dict[int, tuple[list[int], list[int]]] = {}

    def add(self, prompt: list[int], params: SamplingParams, seed: int) -> None:
        for index in range(params.n):
            own = (seed + index * 0x9E3779B97F4A7C15) % 2**64
            text = expected(prompt, params, seed, index, self.layout).tokens
            self.texts[own - 2**64 if own >= 2**63 else own] = (prompt, text)

    def __call__(self, own: tuple, row: SampleRow) -> int:
        prompt, text = self.texts[row.seed]
        assert len(own) == row.position
        assert list(own[: len(prompt)]) == prompt
        drafted = list(own[len(prompt) :])
        token = text[len(drafted)] if drafted == text[: len(drafted)] and len(drafted) < len(text) else 1
        return (token + (hash(own) % 8 < self.wrong)) % VOCAB


@settings(QUIET, max_examples=60)
@given(st.data())
def test_text_is_that_without_speculation(data: st.DataObject) -> None:
    """Whatever is drafted, in whatever company, with room for all or for few: what the definition says."""
    draft = data.draw(st.sampled_from(sorted(DRAFTS)))
    layout = DRAFTS[draft]
    work = data.draw(
        st.lists(
            st.tuples(
                requests(),
                alphas,
                st.sampled_from([None, None, ["ab", "c"], ["a b", "the"]]),
                st.booleans(),
                st.integers(0, 6),
            ),
            min_size=1,
            max_size=6,
        )
    )
    engine = make_engine(
        data.draw(st.sampled_from([28, 40, 100]), label="blocks"),
        layout,
        max_num_seqs=data.draw(st.sampled_from([2, 3, 8]), label="max_num_seqs"),
        max_num_batched_tokens=data.draw(st.sampled_from([8, 24, 200]), label="max_num_batched_tokens"),
        prefix_caching=data.draw(st.booleans(), label="prefix_caching"),
        speculation=Speculation(draft, data.draw(st.integers(1, 5), label="tokens"), adaptive=False),
    )
    oracle = Oracle(data.draw(st.sampled_from([0, 2, 5]), label="wrong of 8"), layout)
    engine.runner.draft = oracle  # type: ignore[attr-defined]
    wanted, done = {}, {}
    for number, ((prompt, params), alpha, stop, include, wait) in enumerate(work):
        assert params.seed is not None
        seed = 16 * params.seed + number  # the oracle tells requests apart by it
        params = replace(params, alpha=alpha, stop=stop, include_stop_str_in_output=include, seed=seed)
        oracle.add(prompt, params, seed)
        wanted[f"{number}"] = (prompt, params)
        engine.add_request(prompt, params, f"{number}")
        for _ in range(wait):
            done.update({o.request_id: o for o in engine.step() if o.finished})
    done.update(run(engine, stream=data.draw(st.booleans(), label="stream")))  # type: ignore[arg-type]
    for name, (prompt, params) in wanted.items():
        for sample in done[name].outputs:
            want = expected(prompt, params, done[name].seed, sample.index, layout)
            assert sample.token_ids == want.tokens
            assert (sample.finish_reason, sample.stop_reason, sample.text) == (
                want.finish_reason,
                want.stop_reason,
                want.text,
            )
            if params.logprobs is not None:
                assert sample.logprobs is not None
                assert [next(iter(entry)) for entry in sample.logprobs] == want.tokens
    assert_no_leak(engine)


# ── real models ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def pairs_of(kind: str, models: Models) -> dict[str, ExpertPair]:
    plus, minus = models.adapter("llama", 1), models.adapter("llama", 2)
    lora, full = ExpertPair(plus, minus), ExpertPair(models.model("llama", 1), models.model("llama", 2))
    return {
        "no pair": {},
        "lora pair": {"a": lora},
        "full experts": {"a": full},
        "prompts": {"a": ExpertPair.from_prompts(anti_expert="", alpha=0.6)},
        "several": {"a": lora, "b": full, "c": ExpertPair.from_prompts(anti_expert="", alpha=0.6)},
    }[kind]


def loaded(kind: str, draft: str, models: Models) -> tuple[LLM, LLM]:
    """The same models with and without speculation, with little memory and small steps in the speculating one."""
    path = models.model("llama")
    # Drafts of some use: the target itself with a small change.
    names = {"same": models.adapter("llama", 3), "other": models.model("llama", 4)}
    speculation = Speculation(names.get(draft, draft), 3, adaptive=False)
    plain = LLM(path, pairs_of(kind, models), dtype="float32", placement="sequential")
    blocks = 36 * plain.ensemble.bytes_per_block
    if draft in names:
        blocks *= 2
    return plain, LLM(
        path,
        pairs_of(kind, models),
        dtype="float32",
        placement="sequential",
        speculation=speculation,
        kv_cache_bytes=blocks,
        max_num_batched_tokens=24,
    )


CASES = [
    ("no pair", "ngram"),
    ("no pair", "other"),
    ("lora pair", "expert"),
    ("full experts", "expert"),
    ("prompts", "same"),
    ("several", "expert"),
    ("several", "ngram"),
]


@pytest.mark.parametrize(("kind", "draft"), CASES, ids=[f"{kind}-{draft}" for kind, draft in CASES])
def test_text_and_logprobs_of_real_models(kind: str, draft: str, models: Models) -> None:
    """fp32: the same tokens, and log-probabilities that are close."""
    plain, fast = loaded(kind, draft, models)
    layout = fast.engine.layout
    alpha = st.sampled_from([None, 0.0, *({pair.name: 0.4} for pair in layout.pairs)])

    @settings(QUIET, max_examples=10)
    @given(st.lists(st.tuples(requests(MODEL_VOCAB), alpha), min_size=1, max_size=5))
    def check(work: list) -> None:
        prompts = [prompt for (prompt, _), _ in work]
        params = [replace(p, alpha=a) for (_, p), a in work]
        for one, other in zip(
            plain.generate(prompts, params, use_tqdm=False), fast.generate(prompts, params, use_tqdm=False), strict=True
        ):
            for want, got in zip(one.outputs, other.outputs, strict=True):
                assert got.token_ids == want.token_ids
                assert (got.finish_reason, got.stop_reason) == (want.finish_reason, want.stop_reason)
                assert (got.logprobs is None) == (want.logprobs is None)
                for ours, theirs in zip(got.logprobs or [], want.logprobs or [], strict=True):
                    assert list(ours) == list(theirs)
                    for token in ours:
                        assert ours[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-5)

    check()
    assert fast.stats["drafted"] > 0
    assert fast.engine.blocks.num_free == fast.runner.num_blocks


def test_statistics_add_up(models: Models) -> None:
    llm = LLM(models.model("llama"), dtype="float32", speculation=Speculation("ngram", 4, adaptive=False))
    output = llm.generate([[5, 6, 7, 8] * 8], SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True))[0]
    metrics, stats = output.metrics, llm.stats
    assert metrics.new_tokens == 60
    assert stats["new_tokens"] == 60
    assert metrics.new_tokens == metrics.target_forwards + metrics.accepted_tokens
    assert 0 <= metrics.accepted_tokens <= metrics.drafted_tokens == stats["drafted"]
    assert stats["tokens_per_forward"] == metrics.tokens_per_forward == 60 / metrics.target_forwards
    if metrics.drafted_tokens:
        assert metrics.acceptance_rate == metrics.accepted_tokens / metrics.drafted_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": ""}, "draft is ''"),
        ({"draft": 3}, "draft is 3"),
        ({"tokens": 0}, "tokens is 0, allowed is 1 … 16"),
        ({"tokens": True}, "tokens is True"),
        ({"adaptive": 1}, "adaptive is 1"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Speculation(**options)


def test_an_expert_needs_a_pair(models: Models) -> None:
    with pytest.raises(ValueError, match="there are no pairs"):
        LLM(models.model("llama"), dtype="float32", speculation=Speculation("expert"))


# ── depth ───────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_depth_follows_acceptance_and_cost() -> None:
    def flat(rows: int) -> float:
        return 1.0

    def tenth(rows: int) -> float:
        return 0.1

    def by_row(rows: int) -> float:
        return float(rows)

    depths = [best_depth(rate, 8, 1, flat, tenth) for rate in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert depths == sorted(depths)
    assert depths[0] == 0
    assert depths[-1] == 8
    assert best_depth(1.0, 8, 1, flat, flat) == 0, "a draft as dear as the target never pays"
    assert best_depth(1.0, 8, 8, by_row, tenth) == 0, (
        "where a step's time grows with its rows, verifying costs what it saves"
    )


def test_what_never_agrees_is_soon_left_alone() -> None:
    """Of 2,000 steps with a draft that is always wrong, few pay for one."""
    acceptance, drafted = Acceptance(0.6), 0
    for _ in range(2000):
        depth = acceptance.depth(4, 1, lambda rows: 1.0, lambda rows: 0.3)
        drafted += depth
        acceptance.observe(0, depth)
    assert drafted * 0.3 < 0.05 * 2000
    for _ in range(600):  # and once it agrees again, it is found out
        depth = acceptance.depth(4, 1, lambda rows: 1.0, lambda rows: 0.3)
        acceptance.observe(depth, depth)
        if depth > 1:
            break
    else:
        raise AssertionError("never tried again")


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 6))
def test_ngrams_propose_what_followed(tokens: list[int], most: int) -> None:
    """The index, fed piece by piece, proposes what a search through the text finds."""
    index = NgramIndex()
    for end in range(len(tokens)):
        index.propose(tokens[:end], most)
    found = index.propose(tokens, most)
    for length in NgramIndex.LENGTHS:
        ending = tokens[-length:]
        starts = [i for i in range(length, len(tokens)) if tokens[i - length : i] == ending]
        if len(tokens) >= length and starts:
            text = list(tokens)
            for i in range(most):
                text.append(text[starts[-1] + i])
            assert found == text[len(tokens) :]
            return
    assert found == []
