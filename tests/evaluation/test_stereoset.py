"""StereoSet: published figures from published scores, hand-worked terms, intervals that repeat."""

import gzip
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from ensemble_decode import SamplingParams
from ensemble_decode.corpora.stereoset import LABELS, read_examples
from ensemble_decode.evaluation.comparison import compare
from ensemble_decode.evaluation.metric import Record, System
from ensemble_decode.evaluation.statistics import bootstrap_interval
from ensemble_decode.evaluation.stereoset import StereoSet, continuation_scores, sentence_scores
from tests.evaluation.words import Words

PUBLISHED = ("gpt2_base_stereoset", "gpt2_med_stereoset", "dexperts_base_stereoset_alpha=1",
             "dexperts_med_stereoset_alpha=1", "trigger_base_stereoset")  # fmt: skip


def published_records(run: str) -> tuple[Path, list[Record]]:
    """The folder of the published results, and a run's scores as records."""
    root = os.environ.get("ENSEMBLE_DECODE_DATA")
    if root is None:
        pytest.skip("ENSEMBLE_DECODE_DATA is unset: the published scores are in a folder that the user names")
    folder = Path(root) / "stereoset_preds_zemour"
    (rows,) = json.loads(gzip.decompress((folder / f"preds_{run}.json.gz").read_bytes())).values()
    scores = {row["id"]: row["score"] for row in rows}
    return folder, [
        {"id": e.id, "domain": e.domain, "term": e.term, **{label: scores[e[label].id] for label in LABELS}}
        for e in read_examples(root)
    ]


@pytest.mark.parametrize("run", PUBLISHED)
def test_published_scores_give_the_published_figures(run: str) -> None:
    folder, records = published_records(run)
    (published,) = json.loads((folder / f"scores_{run}.json").read_text()).values()
    figures = StereoSet(resamples=20).summarise(records)
    for domain, theirs in published.items():
        for ours, name in (("SS", "SS Score"), ("LMS", "LM Score"), ("ICAT", "ICAT Score")):
            key = ours if domain == "overall" else f"{ours}/{domain}"
            assert figures[key].value == pytest.approx(theirs[name], abs=1e-9)


def test_the_published_reduction_is_no_accident() -> None:
    """GPT-2 with experts at α = 1 against GPT-2 alone, on the same target terms."""
    metric = StereoSet()
    steered, target = (metric.estimates(published_records(run)[1]) for run in (PUBLISHED[2], PUBLISHED[0]))
    ss, icat = (compare(steered[name], target[name], 500) for name in ("SS", "ICAT"))
    assert ss is not None
    assert icat is not None
    assert (round(ss.difference, 2), round(icat.difference, 2)) == (-6.95, 11.43)
    assert ss.high < 0 < icat.low


def test_terms_weigh_the_same_and_ties_are_no_preference() -> None:
    def example(term: str, stereo: float, anti: float, unrelated: float) -> dict[str, object]:
        return {"id": term, "domain": "race", "term": term, **dict(zip(LABELS, (stereo, anti, unrelated), strict=True))}

    records = [example("a", 0.3, 0.2, 0.1), example("a", 0.2, 0.2, 0.3), example("b", 0.3, 0.1, 0.2)]
    figures = StereoSet(resamples=50).summarise(records)
    # term a: SS 50, LMS 50; term b: SS 100, LMS 50
    assert (figures["SS"].value, figures["LMS"].value, figures["ICAT"].value) == (75, 50, 25)
    assert figures["SS/race"] == figures["SS"]
    assert "SS/gender" not in figures


def test_intersentence_scores_the_sentence_after_its_context() -> None:
    llm = Words(lambda before, word: -len(before) * math.log(2))
    system = System("s", llm, SamplingParams(alpha=0.0))  # type: ignore[arg-type]
    # "one two" after "a b c": 2^-3 and 2^-4; a trigger of one word makes it 2^-4 and 2^-5
    assert continuation_scores(system, [("a b c", "one two")]) == pytest.approx([2**-3.5])
    after = System("s", llm, SamplingParams(alpha=0.0), "zig")  # type: ignore[arg-type]
    assert continuation_scores(after, [("a b c", "one two")]) == pytest.approx([2**-4.5])
    assert llm.seen[-1] == "zig a b c one two"
    assert (StereoSet("intersentence").name, StereoSet().name) == ("stereoset-intersentence", "stereoset")
    with pytest.raises(ValueError, match="task is 'both'"):
        StereoSet("both")


@pytest.mark.parametrize(("bos", "eos"), [(0, 1), (None, 0)])
def test_a_first_token_is_conditioned_on_what_begins_a_text(bos: int | None, eos: int) -> None:
    """Without a beginning-of-text token (Qwen's), on the end-of-text token."""
    llm = Words(lambda before, word: -3.0 if before == ["<bos>"] else -1.0)
    llm.bos_token_id, llm.eos_token_id = bos, eos  # type: ignore[assignment, attr-defined]
    system = System("s", llm, SamplingParams(alpha=0.0))  # type: ignore[arg-type]
    assert sentence_scores(system, ["he ran"]) == pytest.approx([math.exp((-3 - 1) / 2)])
    assert llm.seen == ["<bos> he", "he ran"]


def test_the_interval_is_the_same_twice_and_covers_the_mean() -> None:
    units = np.random.default_rng(1).normal(10, 2, size=(400, 1))
    first = bootstrap_interval(units, lambda means: means[:, 0])
    assert first == bootstrap_interval(units, lambda means: means[:, 0])
    half = 1.96 * units.std() / np.sqrt(len(units))
    assert first == pytest.approx((units.mean() - half, units.mean() + half), abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"resamples": 0}, "resamples is 0"), ({"confidence": 1.0}, "confidence is 1.0")],
)
def test_what_is_not_allowed_is_said(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(np.ones((2, 1)), lambda means: means[:, 0], **arguments)  # type: ignore[arg-type]
