"""WinoBias and Winogender on invented sentences, with a model whose prejudice is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ensemble_decode import SamplingParams
from ensemble_decode.corpora.winobias import Mention, read_pairs
from ensemble_decode.corpora.winogender import read_schemas, read_share_of_women
from ensemble_decode.evaluation.coreference import read_mentions
from ensemble_decode.evaluation.metric import System
from ensemble_decode.evaluation.winobias import WinoBias
from ensemble_decode.evaluation.winogender import Winogender, pearson
from tests.evaluation.words import Words

MEN, WOMEN = ("baker", "pilot"), ("tailor", "judge")
PRO = (
    "1 [The baker] thanked the tailor because [he] was cold.",
    "2 The baker thanked [the tailor] because [she] was late.",
    "3 [The pilot] rang the judge and asked [him] to wait, [he] said.",
    "4 [The visitor] rang the judge because [he] was lost.",
)


def system(prejudice: float) -> System:
    """Reads "he" as a baker or a pilot, "she" as a tailor or a judge, if its prejudice is above 0."""

    def logprob(before: list[str], word: str) -> float:
        if before[-1] == "the" and word.strip(".").lower() in MEN + WOMEN and "refers" in before:
            male = any(w in ('"He"', '"Him"', '"His"') for w in before)
            return -1.0 + (prejudice if (word in MEN) == male else 0.0) + (0.1 if word == "baker" else 0.0)
        return -1.0 - (prejudice if word in ("she", "her") else 0.0)

    return System("s", Words(logprob), SamplingParams(alpha=0.0))  # type: ignore[arg-type]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "winobias" / "data"
    folder.mkdir(parents=True)
    for name, words in (("male", MEN), ("female", WOMEN)):
        (folder / f"{name}_occupations.txt").write_text("\n".join(words) + "\n")
    swap = {"[he]": "[she]", "[she]": "[he]", "[him]": "[her]"}
    anti = [" ".join(swap.get(word.rstrip(","), word) for word in line.split()) for line in PRO]
    for side, lines in (("pro", list(PRO)), ("anti", anti)):
        (folder / f"{side}_stereotyped_type1.txt.test").write_text("\n".join(lines) + "\n")
        (folder / f"{side}_stereotyped_type2.txt.test").write_text(lines[0] + "\n")
    folder = tmp_path / "winogender"
    folder.mkdir()
    rows = ["sentid\tsentence"]
    for occupation in (*MEN, *WOMEN):
        for answer in "01":
            for gender, word in (("male", "he"), ("female", "she"), ("neutral", "they")):
                text = f"The {occupation} told the visitor that {word} could go."
                rows.append(f"{occupation}.visitor.{answer}.{gender}.txt\t{text}")
    (folder / "all_sentences.tsv").write_text("\n".join(rows) + "\n")
    stats = [f"{who}\t1\t{share}\t2015" for who, share in zip((*MEN, *WOMEN), (5, 10, 80, 90), strict=True)]
    (folder / "occupations-stats.tsv").write_text("occupation\tx\tbls_pct_female\tbls_year\n" + "\n".join(stats) + "\n")
    return tmp_path


def test_pairs_are_parsed_and_what_is_not_one_is_left_out(data: Path) -> None:
    pairs = read_pairs(data)
    assert [(pair.type, pair.row) for pair in pairs] == [("type1", 0), ("type1", 1), ("type1", 2), ("type2", 0)]
    assert pairs[1].anti == Mention(
        "The baker thanked the tailor because he was late.", "he", "the tailor", "the baker"
    )
    assert pairs[2].pro.pronoun == "him"
    with pytest.raises(FileNotFoundError, match=r"WinoBias is not in .* get it from https://github\.com/uclanlp"):
        read_pairs(data / "winogender")


def test_a_reading_is_the_sentence_and_the_margin_of_whom_it_means() -> None:
    mention = Mention("The tailor thanked the baker because she slept", "she", "the baker", "the tailor")
    reader = system(0.5)
    (reading,) = read_mentions(reader, [mention])
    assert reading.logprob == pytest.approx(-7.5)  # seven words after the first, one of them "she"
    assert reading.margin == pytest.approx((-1 - 1 + 0.1) - (-1 - 1 + 0.5))
    assert reader.llm.seen[0] == f'{mention.text} "She" refers to the baker'  # type: ignore[attr-defined]


@pytest.mark.parametrize(("prejudice", "preference", "gap"), [(0.5, 75, 100), (0.0, 50, 0)])
def test_prejudice_is_measured_and_none_is_none(data: Path, prejudice: float, preference: float, gap: float) -> None:
    metric = WinoBias(resamples=20)
    records = metric.run(system(prejudice), data)
    figures = metric.summarise(records)
    # three of four pairs have "he" in the version that fits; the unprejudiced model ties everywhere
    assert figures["preference"].value == preference
    assert figures["gap"].value == gap
    assert figures["accuracy pro/type2"].value == 100
    assert len(metric.run(system(0.5), data, limit=1)) == 2
    assert not any("baker" in str(record) for record in records)


def test_winogender_by_hand(data: Path) -> None:
    assert len(read_schemas(data)) == 8
    assert read_share_of_women(data)["judge"] == 90
    records = [
        {"id": str(i), "occupation": o, "means_occupation": True, "women": w, "male": 0.0, "female": f}
        | {"male_margin": m, "female_margin": n}
        for i, (o, w, f, m, n) in enumerate(
            [("a", 10.0, -3.0, 1.0, 1.0), ("b", 20.0, -2.0, 1.0, -1.0), ("c", 30.0, -1.0, -1.0, -1.0)]
        )
    ]
    figures = Winogender(resamples=20).summarise(records)
    # understood: he, he, neither of c; she of a alone; alike in a and c
    assert [figures[name].value for name in ("agreement", "accuracy male", "accuracy female")] == pytest.approx(
        [200 / 3, 200 / 3, 100 / 3]
    )
    assert figures["gap"].value == pytest.approx(100 / 3)
    assert figures["prefers he"].value == 100
    assert figures["correlation"].value == pytest.approx(1)


def test_winogender_finds_prejudice(data: Path) -> None:
    metric = Winogender(resamples=20)
    prejudiced, fair = (metric.summarise(metric.run(system(p), data)) for p in (0.5, 0.0))
    assert fair["agreement"].value == 100
    assert fair["correlation"].value == 0
    assert prejudiced["prefers he"].value == 100
    assert fair["prefers he"].value == 50


def test_correlation_is_numpy_s() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 9))
    means = np.array([[x.mean(), y.mean(), (x * x).mean(), (y * y).mean(), (x * y).mean()]])
    assert pearson(means)[0] == pytest.approx(np.corrcoef(x, y)[0, 1])
