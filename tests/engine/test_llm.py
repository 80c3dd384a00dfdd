"""``LLM``: lists of prompts in and out, scoring, and what stops it in the middle."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ensemble_decode.engine import llm as module
from ensemble_decode.engine.llm import LLM
from ensemble_decode.engine.params import SamplingParams

from .fake import EOS, LAYOUT, FakeRunner, PieceTokenizer, assert_no_leak, expected, score

encode = PieceTokenizer()
PARAMS = SamplingParams(max_tokens=8, seed=0, ignore_eos=True)


def ids(text: str) -> list[int]:
    return encode(text).input_ids


def make_llm(monkeypatch: pytest.MonkeyPatch, layout=LAYOUT, **options) -> LLM:
    ensemble = SimpleNamespace(layout=layout, tokenizer=PieceTokenizer(), eos_token_ids=(EOS,), bytes_per_block=1000)
    monkeypatch.setattr(module, "load_ensemble", lambda *args, **kwargs: ensemble)
    monkeypatch.setattr(
        module, "Runner", lambda ensemble, num_blocks, placement: FakeRunner(ensemble.layout, num_blocks)
    )
    return LLM(**{"model": "model", "kv_cache_bytes": 64_000, **options})


@pytest.fixture
def llm(monkeypatch):
    return make_llm(monkeypatch)


def texts(outputs) -> list[list[int]]:
    return [sample.token_ids for output in outputs for sample in output.outputs]


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        ("the", 1),
        (["the"], 1),
        (ids("the"), 1),
        ([ids("the")], 1),
        ({"prompt": "the"}, 1),
        ([{"prompt_token_ids": ids("the")}, "the"], 2),
        (("the",), 1),
    ],
    ids=str,
)
def test_every_form_of_prompt(llm, prompts, count):
    outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
    assert texts(outputs) == [expected(ids("the"), PARAMS, 0).tokens] * count


def test_no_prompts_no_outputs(llm):
    assert llm.generate([], PARAMS, use_tqdm=False) == []


def test_outputs_come_in_the_order_of_the_prompts_whoever_ends_first(llm):
    prompts = ["the cad", "a", "ab. ", "cad cad"]
    each = [SamplingParams(max_tokens=m, seed=m, ignore_eos=True, n=n) for m, n in ((30, 1), (1, 2), (20, 3), (2, 1))]
    outputs = llm.generate(prompts, each, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    for output, params in zip(outputs, each, strict=True):
        want = [expected(output.prompt_token_ids, params, params.seed, i) for i in range(params.n)]
        assert [(s.token_ids, s.text) for s in output.outputs] == [(w.tokens, w.text) for w in want]
    assert_no_leak(llm.engine)


def test_a_bar_shows_progress(llm, capsys):
    llm.generate(["a", "the"], PARAMS)
    assert "2/2" in capsys.readouterr().err
    llm.generate(["a", "the"], PARAMS, use_tqdm=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["a", "", "b"], PARAMS, "prompt 1: prompt is empty"),
        ("", PARAMS, "prompt is empty"),
        ([[]], PARAMS, "prompt is empty"),
        (["a", "b" * 300], PARAMS, "prompt 1: the prompt has 300 tokens"),
        (["a", "b"], [PARAMS, SamplingParams(alpha={"age": 1})], "prompt 1: alpha names the pair 'age', known are"),
        (["a", "b"], [PARAMS], "params is a list of 1"),
        ("a", 3, "params is 3"),
        ("a", {"alpha": 1}, "params is"),
        ("a", [3], "params is 3"),
        (3, PARAMS, "prompts is 3"),
        (None, PARAMS, "prompts is None"),
        (["a", None], PARAMS, "prompt 1: prompt is None"),
    ],
    ids=str,
)
def test_a_bad_request_is_refused_by_its_index_before_anything_runs(llm, prompts, params, message):
    with pytest.raises(ValueError, match=message) as caught:
        llm.generate(prompts, params, use_tqdm=False)
    assert "\n" not in str(caught.value)
    assert llm.runner.batches == []
    assert_no_leak(llm.engine)


def test_a_request_larger_than_the_cache_is_refused(monkeypatch):
    llm = make_llm(monkeypatch, kv_cache_bytes=2_000)
    with pytest.raises(ValueError, match=r"may need 48 tokens.*allowed are 32"):
        llm.generate(["a", "the " * 10], SamplingParams(max_tokens=25, alpha=0), use_tqdm=False)
    assert texts(llm.generate("a", PARAMS, use_tqdm=False)) == [expected(ids("a"), PARAMS, 0).tokens]


def test_a_failure_in_the_middle_is_marked_on_its_own_output(llm):
    clean = llm.generate(["a", "the", "cad"], PARAMS, use_tqdm=False)
    bad = clean[1].outputs[0].token_ids
    llm.runner.nan = next(t for t in bad[:-1] if t not in clean[0].outputs[0].token_ids + clean[2].outputs[0].token_ids)
    outputs = llm.generate(["a", "the", "cad"], PARAMS, use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert "NaN" in outputs[1].outputs[0].error
    assert (outputs[0].outputs, outputs[2].outputs) == (clean[0].outputs, clean[2].outputs)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")], ids=str)
@pytest.mark.parametrize("place", ["execute", "allocate", "register", "append"])
@pytest.mark.parametrize("call", [1, 2, 7])
def test_ctrl_c_anywhere_leaves_the_engine_empty_and_usable(llm, monkeypatch, error, place, call):
    from ensemble_decode.engine.request import Sequence

    owner = {"execute": llm.runner, "allocate": llm.engine.blocks, "register": llm.engine.blocks, "append": Sequence}[
        place
    ]
    work, calls = getattr(owner, place), []

    def interrupted(*args):
        calls.append(args)
        result = work(*args)
        if len(calls) == call:
            raise error
        return result

    monkeypatch.setattr(owner, place, interrupted)
    params = SamplingParams(max_tokens=30, n=3, seed=0, ignore_eos=True)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        llm.generate(["the " * 10, "cad", "ab. "], params, use_tqdm=False)
    monkeypatch.undo()
    assert_no_leak(llm.engine)
    for output in llm.generate(["the " * 10, "cad"], params, use_tqdm=False):
        assert [s.token_ids for s in output.outputs] == [
            expected(output.prompt_token_ids, params, 0, i).tokens for i in range(3)
        ]
    assert_no_leak(llm.engine)


# ── score ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("alpha", [0, {"gender": 2.0}, {"gender": 1.0, "tone": -1.0}], ids=str)
def test_score_is_the_logprob_of_each_token_after_those_before_it(llm, alpha):
    sentences = ["the cad", "a", "ab is the cad. " * 5]
    found = llm.score(sentences, alpha=alpha)
    for text, result in zip(sentences, found, strict=True):
        tokens = ids(text)
        assert (result.text, result.token_ids) == (text, tokens)
        assert result.logprobs[0] is None
        for at in range(1, len(tokens)):
            seen = tuple(tokens[:at])
            pairs = SamplingParams(alpha=alpha).alphas(LAYOUT)
            key = (seen, tuple((pair, a, seen, seen) for pair, a in sorted(pairs.items())))
            assert result.logprobs[at] == score((key, tokens[at]))
            assert result.target_logprobs[at] == score((key, tokens[at], "target"))
        assert result.total == pytest.approx(sum(result.logprobs[1:]))
    assert found[0].mean == pytest.approx(found[0].total / (len(ids("the cad")) - 1))
    assert found[1].mean != found[1].mean, "nothing to average: NaN"
    assert_no_leak(llm.engine)


def test_score_takes_a_single_text_and_token_ids(llm):
    (one,) = llm.score("the cad", alpha=0)
    (two,) = llm.score(ids("the cad"), alpha=0)
    assert one.logprobs == two.logprobs
    assert llm.score([], alpha=0) == []


def test_score_takes_a_text_as_long_as_the_context(llm):
    (result,) = llm.score([[1] * LAYOUT.max_model_len], alpha=0)
    assert len(result.logprobs) == LAYOUT.max_model_len
    with pytest.raises(ValueError, match=r"score: .*tokens"):
        llm.score([[1] * (LAYOUT.max_model_len + 2)], alpha=0)


@pytest.mark.parametrize(
    ("texts_", "message"), [("", "empty"), (["a", ""], "prompt 1: prompt is empty"), (3, "prompts is 3")], ids=str
)
def test_score_refuses(llm, texts_, message):
    with pytest.raises(ValueError, match=message):
        llm.score(texts_)


# ── options ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_num_seqs", v) for v in (0, -1, 1.5, "8", True, None)),
        *(("max_num_batched_tokens", v) for v in (0, "512", True)),
        *(("kv_cache_bytes", v) for v in (0, 999, -1, "1G", 1.5, True)),
        ("model", 3),
        ("model", None),
        ("speculation", "ngram"),
        ("enable_prefix_caching", "yes"),
        *(("max_model_len", v) for v in (0, "4096", True)),
        ("seed", "x"),
    ],
)
def test_a_bad_option_is_refused_by_name(monkeypatch, name, value):
    with pytest.raises(ValueError, match=f"{name} is .*allowed") as caught:
        make_llm(monkeypatch, **{name: value})
    assert "\n" not in str(caught.value)


def test_the_cache_is_as_large_as_asked_for(monkeypatch):
    assert make_llm(monkeypatch, kv_cache_bytes=10_500).engine.blocks.num_blocks == 10
    # By default room for every sequence at its longest: 2 sequences × 2 views × 160 tokens.
    assert make_llm(monkeypatch, kv_cache_bytes=None, max_num_seqs=2).engine.blocks.num_blocks == 2 * 2 * 10
    # And no more than a quarter of what is free, though one sequence should not fit.
    monkeypatch.setattr(module, "_free_memory", lambda: 20_000)
    assert make_llm(monkeypatch, kv_cache_bytes=None).engine.blocks.num_blocks == 5


def test_chat_needs_a_template(llm):
    with pytest.raises(ValueError, match="chat template"):
        llm.chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "messages", [["hello"], [[]], [{"content": "no role"}], [[{"role": "user"}], "hello"]], ids=str
)
def test_chat_refuses_what_is_no_conversation(llm, messages):
    llm.tokenizer.chat_template = "x"
    with pytest.raises(ValueError, match=r"chat: conversation \d is .*allowed") as caught:
        llm.chat(messages, PARAMS, use_tqdm=False)
    assert "\n" not in str(caught.value)


def test_chat_answers_after_the_template(llm):
    llm.tokenizer.chat_template = "{}"
    llm.tokenizer.apply_chat_template = lambda messages, **_: ids("".join(m["content"] for m in messages))
    one = llm.chat([{"role": "user", "content": "cad"}], PARAMS, use_tqdm=False)
    two = llm.chat([[{"role": "user", "content": "cad"}]] * 2, PARAMS, use_tqdm=False)
    assert texts(one) * 2 == texts(two) == [expected(ids("cad"), PARAMS, 0).tokens] * 2


def test_a_stream_shows_the_same_logprobs_as_the_end(llm):
    """Those of before are kept, not made again, and what a stop string cuts off goes."""
    engine = llm.engine
    calls = []
    text_of = engine._token_text
    engine._token_text = lambda token: calls.append(token) or text_of(token)
    params = SamplingParams(max_tokens=30, seed=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    engine.add_request(ids("the cad"), params, "a")
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    last = outputs[-1]
    assert last.finished
    assert len(outputs) > 20
    for output in outputs:
        assert output.prompt_logprobs == last.prompt_logprobs
        sample = output.outputs[0]
        assert sample.logprobs == last.outputs[0].logprobs[: len(sample.token_ids)]
    assert len(calls) <= 3 * 30 + 2 * len(ids("the cad"))


def test_megabytes_of_text_are_refused_before_they_are_read(llm):
    engine = llm.engine
    engine.tokenizer.get_vocab = lambda: {"a": 1, " the": 2}
    with pytest.raises(
        ValueError, match=r"the prompt has 1000000 characters, allowed are 640 \(max_model_len 160 tokens"
    ):
        engine.add_request("a" * 1_000_000)
