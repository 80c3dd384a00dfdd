"""Speculation changes no token: on random requests, with a fake model that notices everything, and with real ones."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ensemble_decode import LLM, ExpertPair, SamplingParams, Speculation
from ensemble_decode.engine.async_llm import AsyncLLM
from ensemble_decode.engine.batch import Batch, SampleRow, Span, StepOutput, TokenLogprobs
from ensemble_decode.engine.drafting import Candidate, Costs, NgramIndex, best_depths
from ensemble_decode.engine.engine import Engine
from ensemble_decode.engine.request import ActivePair
from ensemble_decode.engine.speculation import draft_mixture, load_of
from ensemble_decode.models.layout import PairLayout
from tests.conftest import VOCAB as MODEL_VOCAB
from tests.conftest import Models

from .fake import LAYOUT, VOCAB, assert_no_leak, expected, make_engine, run

QUIET = settings(
    deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
#: A draft model of its own, in a pool of its own.
WITH_MODEL = replace(LAYOUT, num_pools=5, draft_pool=4, draft_len=120, draft_vocab=VOCAB - 2)
#: "gender" is two adapters over a small model, whose own pool is the last.
WITH_BASE = replace(LAYOUT, num_pools=5, pairs=(replace(LAYOUT.pairs[0], base_pool=4), *LAYOUT.pairs[1:]))
#: name → what drafts, and the layout in which it does.
DRAFTS = {
    "ngram": ("ngram", LAYOUT),
    "expert": ("expert", LAYOUT),
    "experts over a base": ("expert", WITH_BASE),
    "model": ("model", WITH_MODEL),
}

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


class Fixed(Costs):
    """What the clock says of a fake model means nothing."""

    def observe(self, *args: object, **options: object) -> None:
        pass


@st.composite
def costs(draw: st.DrawFn, pools: int) -> Fixed:
    """Steps of all pools and of each, in which rows cost little or much: depths rise and fall, and tries come and go."""
    every = tuple(range(pools))
    slope = draw(st.sampled_from([0.0, 0.02, 0.2]))
    drafting = draw(st.sampled_from([0.02, 0.3]))
    tables = {every: {1: 1.0, 11: 1.0 + 10 * slope}, **{(pool,): {1: drafting, 11: drafting} for pool in every[1:]}}
    return Fixed(tables, per_verification={every: draw(st.sampled_from([0.0, 0.2]))})


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
def test_text_is_that_without_speculation(monkeypatch: pytest.MonkeyPatch, data: st.DataObject) -> None:
    """Whatever is drafted, as deep as pays or always, in whatever company, with room for all or for few: what the definition says."""
    draft, layout = DRAFTS[data.draw(st.sampled_from(sorted(DRAFTS)))]
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
        speculation=Speculation(
            draft, data.draw(st.integers(1, 5), label="tokens"), data.draw(st.booleans(), label="adaptive")
        ),
    )
    monkeypatch.setattr("ensemble_decode.engine.speculation._PAUSE", data.draw(st.integers(1, 6), label="pause"))
    assert engine.speculator is not None
    engine.speculator.costs = data.draw(costs(layout.num_pools), label="costs")
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
                shown = [entry[token].logprob for entry, token in zip(sample.logprobs, want.tokens, strict=True)]
                assert sample.cumulative_logprob == pytest.approx(sum(shown))
    assert_no_leak(engine)


# ── real models ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def pairs_of(kind: str, models: Models) -> dict[str, ExpertPair]:
    plus, minus = models.adapter("llama", 1), models.adapter("llama", 2)
    lora, full = ExpertPair(plus, minus), ExpertPair(models.model("llama", 1), models.model("llama", 2))
    return {
        "no pair": {},
        "lora pair": {"a": lora},
        "small base": {"a": ExpertPair(plus, minus, base=models.model("llama", 4))},
        "full experts": {"a": full},
        "prompts": {"a": ExpertPair.from_prompts(anti_expert="", alpha=0.6)},
        "several": {"a": lora, "b": full, "c": ExpertPair.from_prompts(anti_expert="", alpha=0.6)},
    }[kind]


def loaded(kind: str, draft: str, dtype: str, models: Models) -> tuple[LLM, LLM]:
    """The same models with and without speculation, with little memory and small steps in the speculating one."""
    path = models.model("llama")
    # Drafts of some use: the target itself with a small change.
    names = {"same": models.adapter("llama", 3), "other": models.model("llama", 4)}
    speculation = Speculation(names.get(draft, draft), 3, adaptive=False)
    plain = LLM(path, pairs_of(kind, models), dtype=dtype, placement="sequential")
    blocks = 36 * plain.ensemble.bytes_per_block
    if draft in names:
        blocks *= 2
    return plain, LLM(
        path,
        pairs_of(kind, models),
        dtype=dtype,
        placement="sequential",
        speculation=speculation,
        kv_cache_bytes=blocks,
        max_num_batched_tokens=24,
    )


CASES = [
    ("no pair", "ngram", "float32"),
    ("no pair", "other", "float32"),
    ("lora pair", "expert", "float32"),
    ("small base", "expert", "float32"),
    ("full experts", "expert", "float32"),
    ("prompts", "same", "float32"),
    ("several", "expert", "float32"),
    ("several", "ngram", "float32"),
    ("several", "expert", "bfloat16"),
    ("several", "ngram", "bfloat16"),
]


@pytest.mark.parametrize(("kind", "draft", "dtype"), CASES, ids=["-".join(case) for case in CASES])
def test_text_and_logprobs_of_real_models(
    kind: str, draft: str, dtype: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens, in bf16 too, and log-probabilities that are close."""
    plain, fast = loaded(kind, draft, dtype, models)
    layout = fast.engine.layout
    alpha = st.sampled_from([None, 0.0, *({pair.name: 0.4} for pair in layout.pairs)])

    speculator = fast.engine.speculator
    assert speculator is not None
    monkeypatch.setattr("ensemble_decode.engine.speculation._PAUSE", 3)

    @settings(QUIET, max_examples=10)
    @given(
        st.lists(st.tuples(requests(MODEL_VOCAB), alpha), min_size=1, max_size=5),
        st.booleans(),
        costs(layout.num_pools),
    )
    def check(work: list, adaptive: bool, steps: Fixed) -> None:
        speculator.config = replace(speculator.config, adaptive=adaptive)
        speculator.costs = steps
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


def test_a_base_that_is_as_the_target_drafts_all_tokens(models: Models, tmp_path: Path) -> None:
    """By the ensemble's own formula over the experts' small model: steered or not, all of a draft is accepted."""
    twin = shutil.copytree(models.model("llama"), tmp_path / "twin")
    pair = ExpertPair(models.adapter("llama", 1), models.adapter("llama", 2), base=str(twin))
    speculation = Speculation("expert", 3, adaptive=False)
    llm = LLM(models.model("llama"), {"a": pair}, dtype="float32", placement="sequential", speculation=speculation)
    params = [
        SamplingParams(alpha=alpha, seed=seed, max_tokens=40, ignore_eos=True, top_p=0.9)
        for seed, alpha in enumerate((0.0, 0.5, 2.0))
    ]
    for output in llm.generate([[5, 6, 7, 8]] * 3, params, use_tqdm=False):
        assert output.metrics.drafted_tokens > 20
        assert output.metrics.acceptance_rate > 0.9, "sums in another order may flip a token, no more"


@pytest.mark.parametrize(
    ("alphas", "views", "wanted"),
    [
        ([1.0], [(0, 0)], {4: 1.0, 1: 1.0, 2: -1.0}),
        ([0.0], [(0, 0)], {4: 1.0}),
        ([0.5, -2.0], [(0, 0), (0, 0)], {4: 1.0, 1: 0.5, 2: -0.5, 5: -2.0, 6: 2.0}),
        ([0.5, 1.0], [(0, 0), (0, 1)], {4: 1.0, 1: 0.5, 2: -0.5}),
        ([1.0, 1.0], [(0, 1), (0, 0)], {1: 1.0}),
    ],
    ids=["steered", "plain", "two pairs", "one with a prompt of its own", "the first with a prompt of its own"],
)
def test_what_stands_for_the_ensemble(alphas: list[float], views: list, wanted: dict[int, float]) -> None:
    """The small base for the target, and the pairs over it that see the same text."""
    over_base = (PairLayout("a", 1.0, 1, 2, base_pool=4), PairLayout("b", 1.0, 5, 6, base_pool=4))
    layout = replace(LAYOUT, num_pools=7, pairs=over_base)
    pairs = [ActivePair(i, alpha, *view) for i, (alpha, view) in enumerate(zip(alphas, views, strict=True))]
    assert dict(draft_mixture(layout, pairs[0], pairs)) == wanted


def test_an_anti_expert_that_is_the_bare_base_stands_for_the_target() -> None:
    layout = replace(LAYOUT, pairs=(PairLayout("a", 1.0, 1, 2, base_pool=2),))
    assert draft_mixture(layout, ActivePair(0, 0.25, 0, 0), []) == ((1, 0.25), (2, 0.75))


def test_a_draft_model_may_have_a_shorter_context(models: Models) -> None:
    """It drafts where it can; its costs are timed within its own positions."""
    target, draft = models.model("gpt2"), models.model("gpt2", 4, n_positions=64)
    llm = LLM(target, dtype="float32", speculation=Speculation(draft, 3, adaptive=False))
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    short, long = llm.generate([[5, 6, 7] * 4, [5, 6, 7] * 30], params, use_tqdm=False)
    assert short.metrics.drafted_tokens > 0
    assert long.metrics.drafted_tokens == 0
    plain = LLM(target, dtype="float32").generate([[5, 6, 7] * 4, [5, 6, 7] * 30], params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in (short, long)] == [o.outputs[0].token_ids for o in plain]


def test_what_is_cut_off_is_out_of_the_sum_of_logprobs() -> None:
    request = make_engine().add_request("a", SamplingParams(logprobs=0, max_tokens=8))
    (sequence,) = request.sequences
    for token in (3, 4, 5):
        sequence.append(token, TokenLogprobs(token, -1.5, -1.5, 1))
    assert sequence.cumulative_logprob == -4.5
    assert sequence.cut(1) == 2
    assert sequence.cumulative_logprob == -1.5


def test_an_expert_needs_a_pair(models: Models) -> None:
    with pytest.raises(ValueError, match="there are no pairs"):
        LLM(models.model("llama"), dtype="float32", speculation=Speculation("expert"))


# ── what comes in between ────────────────────────────────────────────────────────────────────────────────────────────
def speculating(blocks: int = 100, **options) -> tuple[Engine, Oracle]:
    """An engine in which the expert drafts, right three times in four, and what it drafts by."""
    engine = make_engine(blocks, speculation=Speculation("expert", 4, adaptive=False), **options)
    oracle = Oracle(2, LAYOUT)
    engine.runner.draft = oracle  # type: ignore[attr-defined]
    return engine, oracle


def drafted(oracle: Oracle, number: int, max_tokens: int = 30) -> tuple[list[int], SamplingParams]:
    """Request ``number``, steered, and made known to the oracle."""
    params = SamplingParams(alpha={"gender": 1.0}, max_tokens=max_tokens, seed=number, ignore_eos=True)
    prompt = [1 + number % 9, 2, 3] * (1 + number % 4)
    oracle.add(prompt, params, number)
    return prompt, params


def test_requests_that_are_aborted_while_they_draft_leave_nothing_behind() -> None:
    """Half of the requests are aborted between two steps; the others' text doesn't change, and no block stays."""
    engine, oracle = speculating(60)
    chance = random.Random(0)
    work = {f"{i}": drafted(oracle, i) for i in range(24)}
    for name, (prompt, params) in work.items():
        engine.add_request(prompt, params, name)
    done = {}
    aborted = set()
    while engine.has_work:
        done.update({output.request_id: output for output in engine.step() if output.finished})
        running = [s.request.request_id for s in engine.scheduler.running if s.request.metrics.drafted_tokens]
        if running and len(aborted) < 12 and chance.random() < 0.5:
            aborted.add(name := chance.choice(running))
            output = engine.abort(name)
            assert output is not None
            want = expected(*work[name], work[name][1].seed).tokens  # type: ignore[arg-type]
            assert output.outputs[0].token_ids == want[: len(output.outputs[0].token_ids)]
            assert output.outputs[0].finish_reason == "abort"
    assert len(aborted) == 12
    assert len(done) == 12
    for name, output in done.items():
        assert output.outputs[0].token_ids == expected(*work[name], work[name][1].seed).tokens  # type: ignore[arg-type]
    assert_no_leak(engine)


@pytest.mark.parametrize("where", ["draft", "verification"])
def test_an_interrupt_leaves_a_usable_engine(where: str) -> None:
    engine, oracle = speculating()
    prompt, params = drafted(oracle, 1)
    execute = engine.runner.execute

    def interrupted(batch: Batch) -> StepOutput:
        drafts = bool(batch.samples[0].mixture)
        if drafts if where == "draft" else len(batch.spans[0].tokens) > 1 and engine.scheduler.running[0].output:
            raise KeyboardInterrupt
        return execute(batch)

    engine.add_request(prompt, params, "first")
    engine.runner.execute = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    engine.reset()
    assert_no_leak(engine)
    engine.runner.execute = execute  # type: ignore[method-assign]
    engine.add_request(prompt, params, "second")
    assert run(engine)["second"].outputs[0].token_ids == expected(prompt, params, 1).tokens  # type: ignore[attr-defined]


def test_a_preempted_draft_is_drafted_again() -> None:
    """Room for two of four at their ends: the young give their blocks back, with what was drafted for them."""
    engine, oracle = speculating(12)
    work = {f"{i}": drafted(oracle, i, max_tokens=60) for i in range(4)}
    for name, (prompt, params) in work.items():
        engine.add_request(prompt, params, name)
    done = run(engine)
    for name, (prompt, params) in work.items():
        assert done[name].outputs[0].token_ids == expected(prompt, params, int(name)).tokens  # type: ignore[attr-defined]
    assert sum(output.metrics.preemptions for output in done.values()) > 0  # type: ignore[attr-defined]
    assert all(output.metrics.accepted_tokens for output in done.values())  # type: ignore[attr-defined]
    assert_no_leak(engine)


def test_streams_of_an_async_engine() -> None:
    """Outputs grow, by several tokens at a time, into the text; a client that leaves takes nothing along."""
    engine, oracle = speculating()
    work = [drafted(oracle, i) for i in range(8)]
    llm = AsyncLLM(engine)

    async def client(number: int) -> list[list[int]]:
        prompt, params = work[number]
        found: list[list[int]] = []
        async for output in llm.generate(prompt, params):
            found.append(output.outputs[0].token_ids)
            if number % 4 == 3 and len(found) == 2:
                break
        return found

    async def clients() -> list[list[list[int]]]:
        return await asyncio.wait_for(asyncio.gather(*map(client, range(8))), 20)

    try:
        for number, found in enumerate(asyncio.run(clients())):
            want = expected(*work[number], number).tokens
            assert all(tokens == want[: len(tokens)] for tokens in found)
            if number % 4 != 3:
                assert found[-1] == want
        assert engine.stats["accepted"] > 0
    finally:
        llm.shutdown(timeout=10)
    assert_no_leak(engine)


# ── depth ───────────────────────────────────────────────────────────────────────────────────────────────────────────────
def flat(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return np.ones_like(rows, dtype=float)


def tenth(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return 0.1 * flat(rows, keys)


def by_row(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return 1.0 * rows


def depths(rates: list[float], verify: Callable, draft: Callable | None) -> list[int]:
    return best_depths([Candidate(rate, 8) for rate in rates], len(rates), len(rates), 0.0, verify, verify, draft)[0]


def test_depth_follows_acceptance_and_cost() -> None:
    found = [depths([rate], flat, tenth)[0] for rate in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == 8
    assert best_depths([Candidate(1.0, 8)], 1, 1, 0.0, tenth, flat, None)[0] == [0], (
        "what a verification takes longer than a step without drafts is counted"
    )
    assert depths([1.0], flat, flat) == [0], "a draft as dear as the target never pays"
    assert depths([1.0] * 8, by_row, tenth) == [0] * 8, (
        "where a step's time grows with its rows, verifying costs what it saves"
    )


def test_of_several_sequences_those_draft_that_are_worth_it() -> None:
    def rows_above_four_cost(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return np.maximum(4.0, rows)

    assert depths([0.9, 0.1], flat, None) == [8, 8], "a draft that costs nothing is always worth it"
    assert depths([0.9, 0.1], rows_above_four_cost, None) == [2, 0]
    alone, _ = best_depths([Candidate(0.9, 8)], 1, 1, 0.0, flat, flat, lambda rows, keys: 0.05 * rows)
    behind, _ = best_depths([Candidate(0.9, 8, unseen=200)], 1, 1, 0.0, flat, flat, lambda rows, keys: 0.05 * rows)
    assert alone[0] > behind[0] == 0, "a drafter that has much to read first is too dear"


def test_one_that_ends_early_is_worth_its_own_rows_only() -> None:
    """Eight sequences, half of whose step is the same for any number of rows: one of them ahead spares that half for nobody."""

    def half_rows(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return 4.0 + 0.5 * rows

    for early, deep in ((False, 2), (True, 0)):
        found, saved = best_depths([Candidate(0.8, 2, early=early)], 8, 8, 0.0, half_rows, half_rows, None)
        assert found == [deep]
        assert (saved > 0) == (not early)


@pytest.mark.parametrize("probe", [0, 1, 3, 7, 40])
def test_costs_lie_on_the_measured_lines(probe: int) -> None:
    costs = Costs({(0,): {1: 1.0, 3: 0.5, 4: 2.0, 8: 4.0}, (0, 1): {1: 3.0}}, {(0,): 0.01})
    assert costs.seconds((0,), probe) == {0: 0.5, 1: 0.5, 3: 0.5, 7: 3.5, 40: 20.0}[probe], (
        "more rows never cost less; beyond the last measured ones the line goes on"
    )
    assert costs.seconds((0,), 4, 100) == 3.0
    assert costs.seconds((1,), 1) == 3.0, "the smallest set that holds a pool stands for it"
    for _ in range(200):
        costs.observe((0,), 4, 0, 4.0)
    assert costs.seconds((0,), 8) == pytest.approx(8.0, rel=0.01), "what steps really take corrects the whole line"
    eager = Costs({(0,): {1: 1.0, 4: 2.0}}, per_verification={(0,): 3.0})
    assert eager.seconds((0,), 4, verifies=True) == 5.0
    for _ in range(200):
        eager.observe((0,), 4, 0, 5.0, verifies=True)
    assert eager.seconds((0,), 4) == pytest.approx(2.0), "that a verification takes longer says nothing of other steps"
    for _ in range(200):
        eager.observe((0,), 4, 0, 10.0, verifies=True)
    assert eager.seconds((0,), 4, verifies=True) == pytest.approx(10.0, rel=0.01), "dearer than one row's was"
    assert eager.seconds((0,), 4) == pytest.approx(2.0)
    assert costs.seconds((0, 1), 1) == 3.0


def test_a_draft_that_is_never_right_costs_little_and_is_found_out_when_it_is() -> None:
    """Tries take less than 5 % of the time, whatever the batch; and once drafts agree, they are used."""
    engine = make_engine(200, speculation=Speculation("expert", 4), max_num_batched_tokens=200)
    assert engine.speculator is not None
    engine.speculator.costs = Fixed({(0, 1, 2): {1: 1.0, 64: 1.1}, (1,): {1: 0.3, 64: 0.3}})
    oracle = Oracle(8, LAYOUT)
    engine.runner.draft = oracle  # type: ignore[attr-defined]

    def serve(numbers: range) -> tuple[float, int]:
        """Share of the time that draft forwards take, and accepted tokens."""
        engine.runner.batches.clear()  # type: ignore[attr-defined]
        before = engine.stats["accepted"]
        for number in numbers:
            prompt, params = drafted(oracle, number, max_tokens=140)
            engine.add_request(prompt, params)
        run(engine)
        batches: list[Batch] = engine.runner.batches  # type: ignore[attr-defined]
        forwards = sum(bool(batch.samples[0].mixture) for batch in batches)
        return 0.3 * forwards / (len(batches) - forwards), int(engine.stats["accepted"] - before)

    serve(range(8))  # learns
    share, _ = serve(range(8, 16))
    assert 0 < share < 0.05
    oracle.wrong = 0
    serve(range(16, 26))
    _, accepted = serve(range(26, 32))
    assert accepted > 6 * 140 / 2


#: Milliseconds of steps by rows: full experts of the target's size as docs/performance.md has them (the target's and the
#: expert's pools), and the target of docs/large-target.md with a small model that drafts (pools 0 and 4).
_ALONE, _LARGE = {1: 13.0, 8: 19.0, 32: 46.0}, {1: 76.0, 8: 113.0, 32: 267.0}
EXPERTS_MS = Fixed({(0, 1, 2): {1: 35.0, 8: 52.0, 32: 123.0}, (0,): _ALONE, (1,): _ALONE})
LARGE_MS = Fixed({(0,): _LARGE, (4,): _ALONE, (0, 4): {rows: _LARGE[rows] + _ALONE[rows] for rows in _LARGE}})

RIGHT = pytest.mark.parametrize("wrong", [8, 5, 2, 0], ids=lambda wrong: f"{8 - wrong} of 8 right")


def clocked(draft: str, costs: Costs, wrong: int, waves: list, tokens: int) -> float:
    """Time with drafts against that without, by what ``costs`` says of every step.

    Each of ``waves`` is requests that come together, when all before are done; ``tokens`` is a step's budget.
    """

    def clock(speculation: Speculation | None) -> float:
        layout = DRAFTS[draft][1]
        engine = make_engine(200, layout, max_num_batched_tokens=tokens, speculation=speculation)
        oracle = Oracle(wrong, layout)
        engine.runner.draft = oracle  # type: ignore[attr-defined]
        if engine.speculator is not None:
            engine.speculator.costs = costs
        for wave in waves:
            for prompt, params in wave:
                oracle.add(prompt, params, params.seed)
                engine.add_request(prompt, params)
            run(engine)
        return sum(costs.seconds(*load_of(batch)) for batch in engine.runner.batches)  # type: ignore[attr-defined]

    return clock(Speculation(draft, 4)) / clock(None)


def long_prompts(count: int, new: int) -> list[tuple[list[int], SamplingParams]]:
    """Unsteered requests of 100 tokens, no two of which begin alike."""
    return [
        ([1 + i, *[2, 3, 4] * 33], SamplingParams(alpha=0.0, max_tokens=new, seed=i, ignore_eos=True))
        for i in range(count)
    ]


@pytest.mark.parametrize("batch", [1, 8])
@RIGHT
def test_drafting_never_costs_more_than_a_twentieth(wrong: int, batch: int) -> None:
    """Two full experts, one of which drafts: where few drafts are right next to nothing is lost."""
    wave = [drafted(Oracle(0, LAYOUT), number, max_tokens=120) for number in range(batch)]
    ratio = clocked("expert", EXPERTS_MS, wrong, [wave] * (8 // batch), 200)
    assert ratio < 1.05
    if wrong <= 2 and batch == 1:
        assert ratio < 0.85, "and where it pays, it is used"


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("new", [2, 3, 6, 9, 16])
def test_the_first_drafts_cost_no_more_than_their_share(new: int, batch: int) -> None:
    """Nothing is known yet, all drafts are wrong, and the run is short: what can be lost is what the few tokens allow."""
    wave = [drafted(Oracle(0, LAYOUT), number, max_tokens=new) for number in range(batch)]
    assert clocked("expert", EXPERTS_MS, 8, [wave], 200) < 1.05
    assert clocked("model", LARGE_MS, 8, [long_prompts(batch, new)], 200) < 1.05


@pytest.mark.parametrize("new", [1, 2, 4, 16])
@pytest.mark.parametrize("batch", [1, 8])
@RIGHT
def test_a_draft_model_reads_a_prompt_only_where_that_pays(wrong: int, batch: int, new: int) -> None:
    """100 tokens of prompt cost a sixth more with the drafter in it, which few new tokens never bring in."""
    work = long_prompts(16, new)
    waves = [work[i : i + batch] for i in range(0, 16, batch)]
    ratio = clocked("model", LARGE_MS, wrong, waves, 200)
    assert ratio < 1.05
    if wrong == 0 and batch == 1 and new == 16:
        assert ratio < 0.9, "and where it pays, it is used"


def test_a_draft_model_that_was_given_up_is_tried_again() -> None:
    """Drafts that were never right keep the drafter out of prompts, but for a few: it is found out when they are right."""
    engine = make_engine(200, WITH_MODEL, max_num_batched_tokens=200, speculation=Speculation("model", 4))
    assert engine.speculator is not None
    engine.speculator.costs = LARGE_MS
    oracle = Oracle(8, WITH_MODEL)
    engine.runner.draft = oracle  # type: ignore[attr-defined]
    work = [(prompt[:50], params) for prompt, params in long_prompts(40, 20)]

    def serve(part: list) -> int:
        """Requests of which the drafter computed the prompt."""
        requests = []
        for prompt, params in part:
            oracle.add(prompt, params, params.seed)
            requests.append(engine.add_request(prompt, params))
            run(engine)
        return sum(request.drafter is not None for request in requests)

    serve(work[:10])
    assert 0 < serve(work[10:20]) < 5
    oracle.wrong = 0
    accepted = engine.stats["accepted"]
    serve(work[20:30])
    assert serve(work[30:]) > 5
    assert engine.stats["accepted"] - accepted > 10 * 20 / 2


@pytest.mark.parametrize("cached", ["with the drafter", "without it"])
def test_a_prompt_that_is_known_costs_what_is_unknown_of_it(cached: str) -> None:
    """Blocks are found by the pools that computed them: the drafter is worth a long prompt that it knows, and not one that it would undo."""
    engine = make_engine(200, WITH_MODEL, max_num_batched_tokens=200, speculation=Speculation("model", 4))
    speculator = engine.speculator
    assert speculator is not None
    speculator.costs = LARGE_MS
    (prompt, params), _ = long_prompts(2, 16)
    if cached == "with the drafter":
        speculator.config = Speculation("model", 4, adaptive=False)  # takes it in whatever it costs
    else:
        engine.speculator = None
    engine.add_request(prompt, params)
    run(engine)
    engine.speculator, speculator.config = speculator, Speculation("model", 4)
    request = engine.add_request(prompt, params)
    run(engine)
    assert (request.drafter is not None) == (cached == "with the drafter")
    assert request.metrics.cached_tokens == 96


def two_at_a_time(adaptive: bool, tokens: int) -> tuple[Engine, list[list[Span]]]:
    """Steered prompts of 100 tokens, whose texts end one after the other: the spans of steps with a prompt and a text in them."""
    speculation = Speculation("expert", 4, adaptive)
    engine = make_engine(200, max_num_seqs=2, max_num_batched_tokens=tokens, speculation=speculation)
    assert engine.speculator is not None
    engine.speculator.costs = EXPERTS_MS
    oracle = Oracle(0, LAYOUT)
    engine.runner.draft = oracle  # type: ignore[attr-defined]
    for prompt, params in long_prompts(8, 20):
        params = replace(params, alpha={"gender": 1.0}, max_tokens=20 + 3 * params.seed)
        oracle.add(prompt, params, params.seed)
        engine.add_request(prompt, params)
    run(engine)
    steps: list[list[Span]] = [batch.spans for batch in engine.runner.batches]  # type: ignore[attr-defined]
    return engine, [step for step in steps if len({span.start < 100 for span in step}) == 2]


def test_nothing_is_drafted_beside_prompts() -> None:
    engine, steps = two_at_a_time(adaptive=True, tokens=1000)
    assert engine.stats["accepted"] > 50
    assert steps
    assert all(len(span.tokens) == 1 for step in steps for span in step if span.start >= 100)


def test_drafts_take_nothing_of_a_prompt_s_budget() -> None:
    """Of 150 rows in three pools a token takes 3; the others are 49 of the prompt's, but for its last piece."""
    engine, steps = two_at_a_time(adaptive=False, tokens=150)
    assert engine.stats["accepted"] > 50
    pieces = [span for step in steps for span in step if span.start + len(span.tokens) < 100]
    assert pieces
    assert {len(span.tokens) for span in pieces} == {49}


@pytest.mark.parametrize("draft", ["expert", "model"])
@RIGHT
def test_drafts_cost_little_where_prompts_fill_the_steps(wrong: int, draft: str) -> None:
    """With more requests than places and a small budget, nearly every step has a piece of a prompt in it."""
    work = long_prompts(24, 16)
    costs = LARGE_MS
    if draft == "expert":
        work = [(prompt, replace(params, alpha={"gender": 1.0})) for prompt, params in work]
        costs = EXPERTS_MS
    assert clocked(draft, costs, wrong, [work], 150) < 1.05


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
