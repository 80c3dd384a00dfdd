"""The engine's text is a function of the request: whatever else runs, however little room there is."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ensemble_decode.engine.batch import BLOCK_SIZE
from ensemble_decode.engine.params import SamplingParams

from .fake import EOS, LAYOUT, PLAIN, VOCAB, assert_no_leak, expected, make_engine, run, views_of

TEXT = range(1, 32)  # tokens that are whole characters
QUIET = settings(
    deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).choice(TEXT) for _ in range(length)]


def check(output, prompt: list[int], params: SamplingParams, layout=LAYOUT) -> None:
    """A finished request against what it must be."""
    assert output.finished
    assert output.prompt_token_ids == prompt
    assert [sample.index for sample in output.outputs] == list(range(params.n))
    for sample in output.outputs:
        want = expected(prompt, params, output.seed, sample.index, layout)
        assert sample.token_ids == want.tokens
        assert (sample.finish_reason, sample.stop_reason) == (want.finish_reason, want.stop_reason)
        assert sample.text == want.text


MIXED = [
    (prompt_of(5, 1), SamplingParams(max_tokens=40, seed=1, ignore_eos=True)),
    (prompt_of(33, 2), SamplingParams(max_tokens=12, seed=2, alpha=0, ignore_eos=True)),
    (prompt_of(70, 3), SamplingParams(max_tokens=3, seed=3, alpha=2.0)),
    (prompt_of(16, 4), SamplingParams(max_tokens=30, seed=4, n=3, alpha={"tone": -1.0}, ignore_eos=True)),
    (prompt_of(17, 5), SamplingParams(max_tokens=20, seed=-5, alpha={"guide": 1.5, "gender": 1}, ignore_eos=True)),
    (prompt_of(1, 6), SamplingParams(max_tokens=1, seed=2**64 - 1, n=2)),
    (
        prompt_of(48, 7),
        SamplingParams(max_tokens=25, seed=7, top_k=5, top_p=0.5, min_p=0.1, temperature=0.5, nucleus="target"),
    ),
    (
        prompt_of(20, 8),
        SamplingParams(max_tokens=20, seed=8, repetition_penalty=1.2, logit_bias={3: 1.0}, ignore_eos=True),
    ),
    (
        prompt_of(20, 9),
        SamplingParams(max_tokens=20, seed=9, presence_penalty=0.5, frequency_penalty=-0.5, min_tokens=5),
    ),
]


@pytest.mark.parametrize("prefix_caching", [True, False], ids=["sharing", "no-sharing"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 17},
        {"num_blocks": 10},
        {"num_blocks": 10, "max_num_seqs": 2},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()) or "roomy",
)
def test_batch_equals_solo(options, prefix_caching):
    engine = make_engine(prefix_caching=prefix_caching, **options)
    for turn in range(2):  # the second time the prefix cache is warm
        for index, (prompt, params) in enumerate(MIXED):
            engine.add_request(prompt, params, f"{turn}-{index}")
        done = run(engine)
        for index, (prompt, params) in enumerate(MIXED):
            check(done[f"{turn}-{index}"], prompt, params)
        assert_no_leak(engine)


@pytest.mark.parametrize("order", range(4))
def test_any_order_of_arrival(order):
    engine, rng, done = make_engine(num_blocks=14), random.Random(order), {}
    left = rng.sample(range(len(MIXED)), len(MIXED))
    while left or engine.has_work:
        if left and rng.random() < 0.3:
            index = left.pop()
            engine.add_request(*MIXED[index], str(index))
        done |= {output.request_id: output for output in engine.step()}
    for index, (prompt, params) in enumerate(MIXED):
        check(done[str(index)], prompt, params)
    assert_no_leak(engine)


def test_preemption_recomputes_and_changes_nothing():
    engine = make_engine(num_blocks=6, prefix_caching=False)
    params = SamplingParams(max_tokens=60, ignore_eos=True, seed=1)
    prompts = [prompt_of(20, seed) for seed in range(3)]
    for prompt in prompts:
        engine.add_request(prompt, params)
    done = list(run(engine).values())
    assert sum(output.metrics.preemptions for output in done) > 0
    assert done[0].prompt_token_ids == prompts[0], "the oldest ends first"
    assert done[0].metrics.preemptions == 0, "the youngest gives way"
    for output in done:
        check(output, output.prompt_token_ids, params)
    assert_no_leak(engine)


def test_a_long_prompt_comes_in_chunks_beside_decoding_sequences():
    engine = make_engine(layout=PLAIN, max_num_batched_tokens=32)
    short = SamplingParams(max_tokens=30, ignore_eos=True, seed=0, alpha=0)
    engine.add_request(prompt_of(4), short, "short")
    engine.step()
    engine.add_request(prompt_of(140), SamplingParams(max_tokens=2, seed=0, alpha=0), "long")
    done = run(engine)
    sizes = [[len(span.tokens) for span in batch.spans] for batch in engine.runner.batches[1:]]
    assert sizes[:5] == [[1, 31], [1, 31], [1, 31], [1, 31], [1, 16]]
    assert all(sum(len(span.tokens) for span in batch.spans) <= 32 for batch in engine.runner.batches)
    check(done["short"], prompt_of(4), short, PLAIN)


@pytest.mark.parametrize(
    "alpha", [0.0, {"gender": 1.0}, {"gender": 1.0, "guide": 2.0}], ids=["plain", "pair", "two views"]
)
def test_a_step_computes_as_many_rows_whoever_steers(alpha):
    """A token counts for each model that computes it: a long prompt delays others no more for being steered."""
    engine = make_engine(max_num_batched_tokens=150)  # more than is kept for prompts however many decode
    for number, length in enumerate((120, 7, 90)):
        engine.add_request(prompt_of(length, number), SamplingParams(alpha=alpha, max_tokens=3, seed=number))
    run(engine)
    rows = [sum(len(span.tokens) * len(span.pools) for span in batch.spans) for batch in engine.runner.batches]
    assert max(rows) <= 150
    assert max(rows) > 140, "and it is used"


def test_a_sample_that_waits_shows_no_part_of_a_character():
    """Its token came in a step that was not streamed, and another sample's step shows the request."""
    lead = VOCAB - 9  # the first byte of two
    params = SamplingParams(n=2, max_tokens=6, ignore_eos=True)
    seed = next(s for s in range(10_000) if expected([5], params, s, 1).tokens[0] == lead)
    engine = make_engine(max_num_seqs=1)
    engine.add_request([5], replace(params, seed=seed))
    assert engine.step(stream=False) == []
    (output,) = engine.step()
    assert output.outputs[1].token_ids == [lead]
    assert output.outputs[1].text == ""


def test_waiting_requests_come_in_the_order_of_their_arrival():
    """A request that needs many blocks is not overtaken for ever by small ones."""
    engine = make_engine(num_blocks=8, prefix_caching=False)
    small = SamplingParams(max_tokens=20, ignore_eos=True, seed=0, alpha=0)
    engine.add_request(prompt_of(30), small, "first")
    engine.step()
    engine.add_request(prompt_of(100), SamplingParams(max_tokens=2, seed=0, alpha=0), "large")
    order = []
    for i in range(40):
        engine.add_request(prompt_of(3, i), small)
        order += [output.request_id for output in engine.step() if output.finished]
        if "large" in order:
            break
    assert order == ["first", "large"]


def test_the_samples_of_a_prompt_compute_it_once():
    engine = make_engine(layout=PLAIN, prefix_caching=False)
    params = SamplingParams(n=4, max_tokens=10, ignore_eos=True, seed=3)
    engine.add_request(prompt_of(37), params)
    (output,) = run(engine).values()
    check(output, prompt_of(37), params, PLAIN)
    assert engine.runner.computed[0] == 37 + 4 * 9
    first = next(batch for batch in engine.runner.batches if batch.samples)
    assert len(first.samples) == 4
    assert {row.span for row in first.samples} == {0}
    assert len({row.seed for row in first.samples}) == 4
    assert engine.runner.batches[1].copies or engine.runner.batches[0].copies or engine.runner.batches[2].copies


@pytest.mark.parametrize("length", [BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE])
@pytest.mark.parametrize("max_num_seqs", [1, 2, 8])
def test_samples_with_and_without_room_for_all(length, max_num_seqs):
    engine = make_engine(num_blocks=9, max_num_seqs=max_num_seqs)
    params = SamplingParams(n=5, max_tokens=40, ignore_eos=True, seed=3)
    engine.add_request(prompt_of(length), params)
    (output,) = run(engine).values()
    check(output, prompt_of(length), params)
    assert_no_leak(engine)


def test_a_common_beginning_is_computed_once():
    engine = make_engine(layout=PLAIN)
    system = prompt_of(4 * BLOCK_SIZE)
    params = SamplingParams(max_tokens=1, seed=0)
    engine.add_request([*system, 5, 6], params)
    run(engine)
    before = engine.runner.computed[0]
    engine.add_request([*system, 7, 8, 9], params)
    (output,) = run(engine).values()
    assert engine.runner.computed[0] - before == 3
    assert output.metrics.cached_tokens == 4 * BLOCK_SIZE
    check(output, [*system, 7, 8, 9], params, PLAIN)


def test_generated_text_is_found_again_in_the_next_turn():
    engine = make_engine(layout=PLAIN)
    params = SamplingParams(max_tokens=40, seed=0, ignore_eos=True)
    engine.add_request(prompt_of(10), params)
    (output,) = run(engine).values()
    turn = prompt_of(10) + output.outputs[0].token_ids + [3]
    engine.add_request(turn, params)
    (output,) = run(engine).values()
    assert output.metrics.cached_tokens == 48  # 49 tokens were computed: three full blocks
    check(output, turn, params, PLAIN)


def test_blocks_computed_without_the_experts_serve_no_steered_request():
    engine = make_engine()
    prompt = prompt_of(50)
    for alpha in (0, None, 0):
        params = SamplingParams(alpha=alpha, max_tokens=1, seed=0)
        engine.add_request(prompt, params)
        (output,) = run(engine).values()
        check(output, prompt, params)
    assert engine.runner.computed == [50 + 50 + 2, 50, 50, 0]


@pytest.mark.parametrize("alpha", [0, 0.0, {}, {"gender": 0.0}], ids=str)
def test_no_expert_works_where_alpha_is_zero(alpha):
    engine = make_engine()
    engine.add_request(prompt_of(20), SamplingParams(alpha=alpha, max_tokens=8, seed=0, n=2))
    engine.add_request(prompt_of(9), SamplingParams(alpha={"tone": 1.0}, max_tokens=8, seed=0))
    run(engine)
    for batch in engine.runner.batches:
        for row in batch.samples:
            pools = {pool for span in batch.spans[row.span : row.span + 1] for pool in span.pools}
            assert pools == ({0, 3} if row.steering else {0})
    assert engine.runner.computed[1] == engine.runner.computed[2] == 0


def test_alpha_none_is_each_pair_s_own():
    engine = make_engine()
    engine.add_request(prompt_of(9), SamplingParams(max_tokens=1, seed=0))
    run(engine)
    (row,) = engine.runner.batches[0].samples
    assert [(item.pair, item.alpha) for item in row.steering] == [(0, 1.0)]


def test_a_request_without_edits_has_none():
    engine = make_engine()
    engine.add_request(prompt_of(9), SamplingParams(max_tokens=5, seed=0, ignore_eos=True))
    engine.add_request(
        prompt_of(9), SamplingParams(max_tokens=5, min_tokens=2, seed=0, ignore_eos=True, stop_token_ids=[7])
    )
    run(engine)
    edits = [[row.edits for row in batch.samples] for batch in engine.runner.batches]
    assert [row[0] for row in edits] == [None] * 5
    assert [None if row[1] is None else row[1].banned for row in edits] == [(7,), (7,), None, None, None]


def test_min_tokens_bans_what_would_end_the_text():
    for seed in range(30):
        engine = make_engine(layout=PLAIN)
        params = SamplingParams(max_tokens=50, min_tokens=10, seed=seed, stop_token_ids=[5, 6, 7])
        engine.add_request(prompt_of(9), params)
        (output,) = run(engine).values()
        check(output, prompt_of(9), params, PLAIN)
        assert not {EOS, 5, 6, 7} & set(output.outputs[0].token_ids[:10])


def test_a_nan_fails_its_own_request_only():
    params = SamplingParams(max_tokens=30, seed=0, ignore_eos=True)
    good = [expected(prompt_of(10, i), params, 0) for i in range(3)]
    nan = next(t for t in good[1].tokens[:20] if all(t not in g.tokens for g in (good[0], good[2])))
    engine = make_engine(nan=nan)
    for i in range(3):
        engine.add_request(list(prompt_of(10, i)), params, str(i))
    for stream in (True, False):
        done = run(engine, stream=stream)
        if not stream:
            break
        first, bad, third = (done[str(i)].outputs[0] for i in range(3))
        assert bad.finish_reason == "error"
        assert bad.token_ids == good[1].tokens[: good[1].tokens.index(nan) + 1]
        assert "NaN" in bad.error
        assert (first.token_ids, third.token_ids) == (good[0].tokens, good[2].tokens)
        assert first.error is None
    assert_no_leak(engine)


def test_everything_masked_is_an_error_of_the_request():
    engine = make_engine(layout=PLAIN)
    params = SamplingParams(max_tokens=3, min_tokens=2, stop_token_ids=list(range(VOCAB)), seed=0)
    engine.add_request(prompt_of(4), params)
    (output,) = run(engine).values()
    assert output.outputs[0].finish_reason == "error"
    assert output.outputs[0].text == ""
    assert_no_leak(engine)


def test_the_context_ends_the_text():
    engine = make_engine()
    params = SamplingParams(max_tokens=100, seed=0, ignore_eos=True, alpha={"guide": 1.0})
    engine.add_request(prompt_of(150), params)
    (output,) = run(engine).values()
    check(output, prompt_of(150), params)
    longest = max(map(len, views_of(prompt_of(150), params).values()))
    assert longest > 150
    assert len(output.outputs[0].token_ids) == LAYOUT.max_model_len - longest
    assert output.outputs[0].finish_reason == "length"


# ── prompt logprobs ─────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("tokens", [1, 16, 33, 512])
@pytest.mark.parametrize("alpha", [0, 1.0, {"tone": 2.0, "gender": -1.0}], ids=str)
def test_prompt_logprobs_come_in_any_chunks_and_in_spite_of_a_warm_cache(tokens, alpha):
    layout_alpha = alpha if not isinstance(alpha, float) else {"gender": alpha}
    reference = None
    engine = make_engine(max_num_batched_tokens=tokens)
    for _ in range(2):
        params = SamplingParams(prompt_logprobs=2, max_tokens=4, seed=0, alpha=layout_alpha, ignore_eos=True)
        engine.add_request(prompt_of(60), params)
        engine.add_request(prompt_of(60)[:50], SamplingParams(max_tokens=20, seed=1))
        output = run(engine)[f"request-{2 * _}"]
        check(output, prompt_of(60), params)
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == 60
        assert all(token in entry for token, entry in zip(prompt_of(60)[1:], output.prompt_logprobs[1:], strict=True))
        assert all({0, 1} <= set(entry) for entry in output.prompt_logprobs[1:])
        reference = reference or output.prompt_logprobs
        assert output.prompt_logprobs == reference
    assert_no_leak(engine)


def test_prompt_logprobs_survive_preemption():
    roomy, tight = make_engine(max_num_batched_tokens=16), make_engine(num_blocks=9, max_num_batched_tokens=16)
    for engine in (roomy, tight):
        for i in range(4):
            params = SamplingParams(prompt_logprobs=0, max_tokens=30, seed=0, ignore_eos=True, n=2)
            engine.add_request(prompt_of(60, i), params, str(i))
    outputs, squeezed = run(roomy), run(tight)
    assert sum(output.metrics.preemptions for output in squeezed.values()) > 0
    for i in range(4):
        assert outputs[str(i)].prompt_logprobs == squeezed[str(i)].prompt_logprobs
        assert outputs[str(i)].outputs == squeezed[str(i)].outputs


def test_a_prompt_that_is_preempted_halfway_is_scored_once():
    engine = make_engine(num_blocks=12, layout=PLAIN, max_num_batched_tokens=4, prefix_caching=False)
    short = SamplingParams(max_tokens=60, seed=0, ignore_eos=True)
    for i in range(3):
        engine.add_request(prompt_of(10, i), short, str(i))
    while len(engine.scheduler.running) < 3 or any(s.pending > 1 for s in engine.scheduler.running):
        engine.step()
    params = SamplingParams(prompt_logprobs=0, max_tokens=2, seed=0, ignore_eos=True)
    engine.add_request(prompt_of(140), params, "long")
    done = run(engine)
    assert done["long"].metrics.preemptions > 0
    assert len(done["long"].prompt_logprobs) == 140
    assert all(t in entry for t, entry in zip(prompt_of(140)[1:], done["long"].prompt_logprobs[1:], strict=True))
    check(done["long"], prompt_of(140), params, PLAIN)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 100])
def test_score_only_computes_no_more_than_it_must(length):
    engine = make_engine(max_num_batched_tokens=32)
    engine.add_request(prompt_of(length), SamplingParams(prompt_logprobs=0, max_tokens=1, seed=0), score_only=True)
    (output,) = run(engine).values()
    assert len(output.prompt_logprobs) == length
    assert engine.runner.computed[0] == max(length - 1, 0) or length == 1
    assert not any(batch.samples for batch in engine.runner.batches)
    assert_no_leak(engine)


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_request_larger_than_the_cache_is_refused_with_both_numbers():
    engine = make_engine(num_blocks=4)
    with pytest.raises(ValueError, match=r"may need 80 tokens.*allowed are 64"):
        engine.add_request(prompt_of(50), SamplingParams(max_tokens=20))
    with pytest.raises(ValueError, match=r"may need \d+ tokens.*allowed are 64"):
        engine.add_request(prompt_of(30), SamplingParams(max_tokens=2, alpha={"guide": 1.0}))
    engine.add_request(prompt_of(50), SamplingParams(max_tokens=14, seed=0))
    run(engine)
    assert_no_leak(engine)


def test_a_prompt_longer_than_the_context_is_refused():
    engine = make_engine()
    with pytest.raises(ValueError, match=r"160 tokens, allowed are 159"):
        engine.add_request(prompt_of(160))
    engine.add_request(prompt_of(160), SamplingParams(prompt_logprobs=0, max_tokens=1), score_only=True)
    run(engine)


# ── anything at any time ────────────────────────────────────────────────────────────────────────────────────────────
@st.composite
def requests(draw):
    base = draw(st.sampled_from([0, 1, 2]))
    prompt = prompt_of(draw(st.integers(1, 60)), base)  # few seeds: beginnings are often shared
    max_tokens = draw(st.integers(1, 30))
    alpha = draw(st.sampled_from([0, None, 0.5, {"tone": 1.0}, {"guide": 1.0}, {"gender": 1.0, "guide": -1.0}]))
    if alpha == 0.5:
        alpha = {"gender": 0.5, "tone": 0.5}
    params = SamplingParams(
        alpha=alpha,
        n=draw(st.sampled_from([1, 1, 1, 2, 5])),
        seed=draw(st.integers(0, 2**64 - 1)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)) if draw(st.booleans()) else 0,
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.sampled_from([None, [3], [0, 9]])),
        prompt_logprobs=0
        if draw(st.integers(0, 4)) == 0 and not (isinstance(alpha, dict) and "guide" in alpha)
        else None,
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.5])),
    )
    return prompt, params


class Traffic(RuleBasedStateMachine):
    """Requests come, go and are aborted while a small cache is fought over."""

    @initialize(
        num_blocks=st.integers(14, 24),
        tokens=st.sampled_from([1, 5, 16, 40, 512]),
        seqs=st.sampled_from([1, 2, 3, 8]),
        caching=st.booleans(),
    )
    def start(self, num_blocks, tokens, seqs, caching):
        self.engine = make_engine(num_blocks, max_num_batched_tokens=tokens, max_num_seqs=seqs, prefix_caching=caching)
        self.open = {}
        self.count = 0

    @rule(request=requests())
    def arrive(self, request):
        prompt, params = request
        self.count += 1
        self.engine.add_request(prompt, params, str(self.count))
        self.open[str(self.count)] = request

    @rule(steps=st.integers(1, 20), stream=st.booleans())
    def step(self, steps, stream):
        for _ in range(steps):
            for output in self.engine.step(stream):
                self.see(output)

    def see(self, output):
        prompt, params = self.open[output.request_id]
        if output.finished:
            check(output, prompt, params)
            del self.open[output.request_id]
        for sample in output.outputs:
            want = expected(prompt, params, output.seed, sample.index)
            assert want.tokens[: len(sample.token_ids)] == sample.token_ids
            assert want.text.startswith(sample.text)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.open)))
        output = self.engine.abort(request_id)
        assert output.finished
        prompt, params = self.open.pop(request_id)
        for sample in output.outputs:
            want = expected(prompt, params, output.seed, sample.index)
            assert want.tokens[: len(sample.token_ids)] == sample.token_ids
            assert sample.finish_reason == "abort" or sample.token_ids == want.tokens

    @invariant()
    def blocks_add_up(self):
        if not hasattr(self, "engine"):
            return
        scheduler, blocks = self.engine.scheduler, self.engine.blocks
        held = {b for s in scheduler.running for view in s.views for b in view.table}
        assert blocks.num_free == blocks.num_blocks - len(held)
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert not any(view.table for s in scheduler.waiting for view in s.views)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for output in run(self.engine).values():
            self.see(output)
        assert not self.open
        assert_no_leak(self.engine)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(QUIET, max_examples=60, stateful_step_count=25)


@given(
    work=st.lists(requests(), min_size=1, max_size=8),
    num_blocks=st.integers(14, 30),
    tokens=st.sampled_from([3, 16, 64]),
)
@settings(QUIET, max_examples=60)
def test_any_batch_in_any_room_equals_solo(work, num_blocks, tokens):
    engine = make_engine(num_blocks, max_num_batched_tokens=tokens)
    for index, (prompt, params) in enumerate(work):
        engine.add_request(prompt, params, str(index))
    done = run(engine)
    for index, (prompt, params) in enumerate(work):
        check(done[str(index)], prompt, params)
    assert_no_leak(engine)
