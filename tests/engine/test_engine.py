"""What goes into the engine and what comes out: texts, stop strings, logprobs, refusals, counters."""

from __future__ import annotations

import math

import pytest

from ensemble_decode.engine.params import SamplingParams
from ensemble_decode.models.layout import Layout, PairLayout

from .fake import EOS, LAYOUT, PLAIN, VOCAB, PieceTokenizer, assert_no_leak, expected, make_engine, run, score

encode = PieceTokenizer()


def ids(text: str) -> list[int]:
    return encode(text).input_ids


# ── texts and their ends ────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "at-once"])
@pytest.mark.parametrize("include", [True, False], ids=["with-stop", "without-stop"])
@pytest.mark.parametrize("stop", ["a", ["ab", "the", "é"], ["ca", "d", " t"]], ids=str)
def test_stop_strings(stop, include, stream):
    engine = make_engine(layout=PLAIN)
    reasons = set()
    for seed in range(12):
        params = SamplingParams(stop=stop, include_stop_str_in_output=include, max_tokens=40, seed=seed, n=2)
        engine.add_request("the", params, str(seed))
    for request_id, output in run(engine, stream=stream).items():
        params = SamplingParams(stop=stop, include_stop_str_in_output=include, max_tokens=40, seed=int(request_id), n=2)
        for sample in output.outputs:
            want = expected(ids("the"), params, int(request_id), sample.index, PLAIN)
            assert (sample.token_ids, sample.text) == (want.tokens, want.text)
            assert (sample.finish_reason, sample.stop_reason) == (want.finish_reason, want.stop_reason)
            reasons.add(type(sample.stop_reason))
    assert str in reasons
    assert_no_leak(engine)


def test_a_stream_never_takes_text_back_and_ends_as_the_whole():
    engine, shown = make_engine(), {}
    for seed in range(10):
        engine.add_request("the cad", SamplingParams(stop=["the", "a b"], max_tokens=60, seed=seed, n=2), str(seed))
    while engine.has_work:
        for output in engine.step():
            for sample in output.outputs:
                key = output.request_id, sample.index
                assert sample.text.startswith(shown.get(key, ""))
                assert "the" not in sample.text
                shown[key] = sample.text
    params = SamplingParams(stop=["the", "a b"], max_tokens=60, n=2)
    assert shown == {(str(s), i): expected(ids("the cad"), params, s, i).text for s in range(10) for i in range(2)}


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_the_token_that_ends_a_text_is_among_the_ids_but_not_in_the_text(skip, include, stream):
    engine = make_engine(layout=PLAIN)
    params = SamplingParams(
        max_tokens=150, seed=1, skip_special_tokens=skip, include_stop_str_in_output=include, stop_token_ids=[5, 6]
    )
    engine.add_request("a", params)
    (output,) = run(engine, stream=stream).values()
    (sample,) = output.outputs
    want = expected(ids("a"), params, 1, 0, PLAIN)
    assert sample.stop_reason in (EOS, 5, 6)
    assert sample.token_ids[-1] == sample.stop_reason
    assert (sample.token_ids, sample.text) == (want.tokens, want.text)


def test_ignore_eos_runs_to_the_end():
    engine = make_engine(layout=PLAIN)
    engine.add_request("a", SamplingParams(max_tokens=150, seed=1, ignore_eos=True))
    (output,) = run(engine).values()
    assert len(output.outputs[0].token_ids) == 150
    assert EOS in output.outputs[0].token_ids[:-1]


def test_without_a_tokenizer_there_are_ids_and_no_text():
    engine = make_engine(layout=PLAIN, tokenizer=False)
    engine.add_request([1, 2], SamplingParams(max_tokens=5, seed=0, logprobs=1))
    (output,) = run(engine, stream=True).values()
    assert output.outputs[0].text == ""
    assert output.outputs[0].token_ids == expected([1, 2], SamplingParams(max_tokens=5), 0, 0, PLAIN).tokens
    with pytest.raises(ValueError, match="no tokenizer"):
        engine.add_request("a")
    with pytest.raises(ValueError, match=r"stop.*no tokenizer"):
        engine.add_request([1], SamplingParams(stop="a"))


def test_a_nan_in_the_middle_of_a_stream_pushes_no_token_twice():
    params = SamplingParams(max_tokens=30, seed=0, ignore_eos=True, stop="zz")
    tokens = expected(ids("a"), params, 0, 0, PLAIN).tokens
    nan = next(t for i, t in enumerate(tokens) if i > 4 and t not in tokens[:i])
    engine = make_engine(layout=PLAIN, nan=nan)
    engine.add_request("a", params)
    (output,) = run(engine, stream=True).values()
    (sample,) = output.outputs
    assert sample.finish_reason == "error"
    assert sample.token_ids == tokens[: tokens.index(nan) + 1]
    assert sample.text == encode.decode(sample.token_ids, skip_special_tokens=True)


# ── log-probabilities ───────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("best", [0, 3])
def test_logprobs_have_the_sampled_token_and_the_best(best):
    engine = make_engine()
    params = SamplingParams(logprobs=best, max_tokens=6, seed=4, ignore_eos=True, n=2)
    engine.add_request("the cad", params)
    (output,) = run(engine).values()
    for sample in output.outputs:
        want = expected(ids("the cad"), params, 4, sample.index)
        assert len(sample.logprobs) == 6
        for entries, token, key in zip(sample.logprobs, want.tokens, want.keys, strict=True):
            assert next(iter(entries)) == token
            assert set(entries) == {token, *range(best)}
            assert entries[token].logprob == score((key, token))
            assert entries[token].target_logprob == score((key, token, "target"))
            assert entries[token].decoded_token == encode.decode([token])
        assert sample.cumulative_logprob == pytest.approx(
            sum(e[t].logprob for e, t in zip(sample.logprobs, want.tokens, strict=True))
        )
    assert output.prompt_logprobs is None


def test_a_stream_reads_each_logprob_once():
    engine = make_engine()
    request = engine.add_request("the cad", SamplingParams(logprobs=1, max_tokens=8, seed=4, ignore_eos=True))
    while engine.has_work:
        (output,) = engine.step()
        for entry in request.sequences[0].logprobs:
            entry.logprob = math.nan  # it was read in the step that sampled it
    sample = output.outputs[0]
    shown = [entry[token].logprob for entry, token in zip(sample.logprobs, sample.token_ids, strict=True)]
    assert sample.cumulative_logprob == pytest.approx(sum(shown))


def test_without_logprobs_there_are_none():
    engine = make_engine()
    engine.add_request("a", SamplingParams(max_tokens=2, seed=0))
    (output,) = run(engine).values()
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


def test_prompt_logprobs_are_of_the_prompt_s_tokens_after_what_is_before_them():
    engine = make_engine(max_num_batched_tokens=1)
    prompt = ids("the cad is an ab. " * 4)
    engine.add_request(prompt, SamplingParams(prompt_logprobs=0, max_tokens=1, seed=0, alpha={"tone": 2.0}))
    (output,) = run(engine).values()
    for at in range(1, len(prompt)):
        seen = tuple(prompt[:at])
        key = (seen, ((1, 2.0, seen, seen),))
        assert output.prompt_logprobs[at][prompt[at]].logprob == score((key, prompt[at]))


# ── seeds, ids, counters ────────────────────────────────────────────────────────────────────────────────────────────
def test_a_seed_is_drawn_and_reported_and_gives_the_same_text_again():
    engine = make_engine()
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    for _ in range(2):
        engine.add_request("a", params)
    first, second = run(engine).values()
    assert first.seed != second.seed
    engine.add_request("a", SamplingParams(max_tokens=10, ignore_eos=True, seed=first.seed))
    (again,) = run(engine).values()
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_request_ids_are_unique_while_in_use():
    engine = make_engine()
    engine.add_request("a", SamplingParams(max_tokens=1), "request-0")
    assert engine.add_request("a", SamplingParams(max_tokens=1)).request_id != "request-0"
    with pytest.raises(ValueError, match="'request-0' is in use"):
        engine.add_request("a", SamplingParams(max_tokens=1), "request-0")
    assert len(run(engine)) == 2
    engine.add_request("a", SamplingParams(max_tokens=1), "request-0")
    assert list(run(engine)) == ["request-0"]


def test_metrics_and_timings_are_there():
    engine = make_engine()
    engine.add_request("the", SamplingParams(max_tokens=5, ignore_eos=True))
    (output,) = run(engine).values()
    assert output.metrics.arrival <= output.metrics.first_token <= output.metrics.finished
    assert engine.timings["steps"] == 5
    assert engine.timings["total"] > 0


def test_abort_gives_back_what_there_is():
    engine = make_engine()
    engine.add_request("the", SamplingParams(max_tokens=50, ignore_eos=True, seed=0), "a")
    engine.add_request("cad", SamplingParams(max_tokens=5, ignore_eos=True, seed=0), "b")
    for _ in range(3):
        engine.step()
    output = engine.abort("a")
    assert output.finished
    assert output.outputs[0].finish_reason == "abort"
    want = expected(ids("the"), SamplingParams(max_tokens=50, ignore_eos=True), 0)
    assert output.outputs[0].token_ids == want.tokens[:3]
    assert output.outputs[0].text == encode.decode(want.tokens[:3], skip_special_tokens=True)
    assert engine.abort("a") is None
    assert engine.abort("unknown") is None
    assert list(run(engine)) == ["b"]
    assert_no_leak(engine)


# ── prompts of a pair's own ─────────────────────────────────────────────────────────────────────────────────────────
def test_a_request_brings_its_own_pair_prompt():
    engine = make_engine()
    params = SamplingParams(alpha={"guide": 1.0}, max_tokens=3, seed=0)
    for prompt in ("cad", {"prompt": "cad"}, {"prompt_token_ids": ids("cad")}, {"prompt": "cad", "pair_prompts": {}}):
        engine.add_request(prompt, params)
    outputs = list(run(engine).values())
    want = expected(ids("cad"), params, 0)
    assert all(output.outputs[0].token_ids == want.tokens for output in outputs)
    engine.add_request({"prompt": "cad", "pair_prompts": {"guide": {"anti_expert": "the {prompt}"}}}, params)
    run(engine)
    _, negative = engine.runner.batches[-3].spans
    assert negative.tokens == ids("the cad")


def test_a_pair_s_own_prompt_may_be_empty():
    layout = Layout(VOCAB, 160, 0, 1, (PairLayout("guide", 1.0, 0, 0, 0, 1),), (None, ""))
    engine = make_engine(layout=layout)
    engine.add_request("cad ab", SamplingParams(max_tokens=1, seed=0))
    run(engine)
    own, negative = engine.runner.batches[0].spans
    assert negative.tokens == own.tokens[-1:]  # no BOS here


# ── refusals: each one line, before anything is queued ──────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ({"prompt": ""}, "empty"),
        ({"prompt_token_ids": []}, "empty"),
        ({}, "keys"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "keys"),
        ({"prompt": "a", "x": 1}, "keys"),
        ({"prompt": "a", 3: 1}, "keys"),
        (3, "prompt is 3"),
        (None, "prompt is None"),
        (2.5, "prompt is 2.5"),
        (b"bytes", "prompt is b'bytes'"),
        ([VOCAB], f"token {VOCAB}, allowed are integers 0 … {VOCAB - 1}"),
        ([-1], "token -1"),
        ([1, "a"], "token 'a'"),
        ([True], "token True"),
        ([1.0], "token 1.0"),
        ("\ud800", "Unicode"),
        ({"prompt": "a", "pair_prompts": 3}, "pair_prompts is 3"),
        ({"prompt": "a", "pair_prompts": {"gender": {"expert": "x"}}}, "'gender', pairs of prompts are 'guide'"),
        ({"prompt": "a", "pair_prompts": {"age": {}}}, "'age'"),
        ({"prompt": "a", "pair_prompts": {"guide": "x"}}, "guide"),
        ({"prompt": "a", "pair_prompts": {"guide": {"both": "x"}}}, "guide"),
        ({"prompt": "a", "pair_prompts": {"guide": {"expert": "x"}}}, "a dict of strings for 'anti_expert' is allowed"),
        ({"prompt": "a", "pair_prompts": {"guide": {"anti_expert": 3}}}, "guide"),
        ("a" * 200, "200 tokens, allowed are 159"),
    ],
    ids=str,
)
def test_a_bad_prompt_is_refused(prompt, message):
    engine = make_engine()
    with pytest.raises(ValueError, match=message) as caught:
        engine.add_request(prompt, SamplingParams(alpha={"guide": 1.0} if isinstance(prompt, dict) else 0))
    assert "\n" not in str(caught.value)
    assert_no_leak(engine)


@pytest.mark.parametrize("params", [3, "alpha", {"alpha": 1}], ids=str)
def test_params_of_another_type_are_refused(params):
    with pytest.raises(ValueError, match="a SamplingParams is allowed"):
        make_engine().add_request("a", params)


@pytest.mark.parametrize("request_id", [3, b"x", ["a"]], ids=str)
def test_a_request_id_of_another_type_is_refused(request_id):
    with pytest.raises(ValueError, match=r"request_id is .*, a string is allowed"):
        make_engine().add_request("a", request_id=request_id)


def test_prompt_logprobs_with_prompts_of_their_own_are_refused():
    with pytest.raises(ValueError, match="prompt_logprobs"):
        make_engine().add_request("a", SamplingParams(prompt_logprobs=0, alpha={"guide": 1.0}))


def test_reset_forgets_everything():
    engine = make_engine()
    for _ in range(3):
        engine.add_request("the cad", SamplingParams(max_tokens=50, n=2, stop="zz"))
    engine.step()
    engine.reset()
    assert_no_leak(engine)
    engine.add_request("a", SamplingParams(max_tokens=3, seed=0))
    (output,) = run(engine).values()
    assert output.outputs[0].token_ids == expected(ids("a"), SamplingParams(max_tokens=3), 0).tokens
    assert LAYOUT.num_pools == len(engine.runner.computed)


class PaddedTokenizer(PieceTokenizer):
    """Raises on one token, as some tokenizers do on ids beyond their vocabulary."""

    def __init__(self, beyond: int) -> None:
        self.beyond = beyond

    def decode(self, ids, *args, **options):
        if self.beyond in ids:
            raise IndexError("piece id is out of range")
        return super().decode(ids, *args, **options)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("stop", [None, "zz"])
def test_a_tokenizer_that_fails_on_a_token_fails_one_sample(stream, stop):
    params = SamplingParams(max_tokens=30, seed=0, ignore_eos=True, stop=stop)
    prompts = [ids("the cad"), ids("a dog"), ids("b")]
    good = [expected(prompt, params, 0).tokens for prompt in prompts]
    beyond = next(t for t in good[1] if t not in {*good[0], *good[2], *prompts[0], *prompts[1], *prompts[2]})
    engine = make_engine()
    engine.tokenizer = PaddedTokenizer(beyond)
    for i, prompt in enumerate(prompts):
        engine.add_request(list(prompt), params, str(i))
    done = run(engine, stream=stream)
    first, bad, third = (done[str(i)].outputs[0] for i in range(3))
    assert (first.token_ids, third.token_ids) == (good[0], good[2])
    assert (first.finish_reason, third.finish_reason) == ("length", "length")
    assert bad.finish_reason == "error"
    assert bad.error == "the tokenizer failed on the output's tokens: IndexError('piece id is out of range')"
    assert PieceTokenizer().decode(good[1][: good[1].index(beyond)], True).startswith(bad.text)
    assert_no_leak(engine)


def test_a_waiting_sample_whose_text_is_read_late_may_end_its_request():
    engine, params = make_engine(max_num_seqs=1), SamplingParams(max_tokens=2, seed=1, ignore_eos=True, n=2)
    first, waiting = (expected(ids("a dog"), params, 1, index).tokens for index in range(2))
    assert waiting[0] not in [*first, *ids("a dog")]
    engine.tokenizer = PaddedTokenizer(waiting[0])
    engine.add_request(ids("a dog"), params)
    engine.step(stream=False)
    (output,) = engine.step()
    assert [sample.finish_reason for sample in output.outputs] == ["length", "error"]
    assert output.finished
    assert_no_leak(engine)


def test_a_token_without_text_is_listed_without():
    engine = make_engine()
    engine.tokenizer = PaddedTokenizer(1)
    params = SamplingParams(max_tokens=4, seed=0, ignore_eos=True, logprobs=3)
    tokens = expected([9, 8, 7], params, 0).tokens
    assert 1 not in tokens
    engine.add_request([9, 8, 7], params)
    ((output,),) = [done.outputs for done in run(engine).values()]
    assert output.finish_reason == "length"
    assert [entry[1].decoded_token for entry in output.logprobs] == [None] * 4
