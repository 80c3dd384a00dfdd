"""Speculation changes no token: on random requests, with a fake model that notices everything, and with real ones."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ensemble_decode import SamplingParams, Speculation
from ensemble_decode.engine.batch import SampleRow

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


@settings(QUIET, max_examples=250)
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
