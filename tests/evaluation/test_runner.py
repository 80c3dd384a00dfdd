"""What is done is kept, goes on after an interruption, and comes out the same."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from ensemble_decode import SamplingParams
from ensemble_decode.cli import main
from ensemble_decode.evaluation.crows_pairs import CrowsPairs
from ensemble_decode.evaluation.estimate import Estimate
from ensemble_decode.evaluation.metric import Figure, Record, System
from ensemble_decode.evaluation.redditbias import RedditBias, within_three_sigma
from ensemble_decode.evaluation.report import Report
from ensemble_decode.evaluation.runner import dump, fingerprint, make_tasks, run_tasks
from ensemble_decode.evaluation.stereoset import sentence_scores
from tests.evaluation.words import Words

RUNS: list[tuple[str, str]] = []


@dataclass(frozen=True)
class Counting:
    """Returns its system's α; fails on one system where it is told to."""

    name: str = "counting"
    interrupt: str = ""
    resamples: int = 20
    generates: ClassVar[bool] = True

    def check(self, data: Path) -> None:
        pass

    def run(self, system: System, data: Path, limit: int | None = None) -> list[Record]:
        if system.name == self.interrupt:
            raise KeyboardInterrupt
        RUNS.append((system.name, self.name))
        return [{"alpha": system.params.alpha, "third": 1 / 3}]

    def estimates(self, records: Sequence[Record]) -> dict[str, Estimate]:
        return {}

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        return {"alpha": Figure(records[0]["alpha"], 0.0, 2.0, None, 1)}


def systems(*alphas: float) -> list[System]:
    return [System(f"α {a:g}", None, SamplingParams(alpha=a)) for a in alphas]  # type: ignore[arg-type]


def run(out: Path, metric: Any, *alphas: float, model: str = "m", limit: int | None = None) -> Any:
    RUNS.clear()
    tasks = make_tasks(systems(*alphas), [metric], {"target": model}, out, limit)
    return run_tasks(tasks, out, out, limit, say=lambda line: None)


def test_what_is_kept_is_not_run_again(tmp_path: Path) -> None:
    first = run(tmp_path, Counting(), 0.0, 1.0)
    assert len(RUNS) == 2
    assert run(tmp_path, Counting(), 0.0, 1.0) == first
    assert RUNS == []
    run(tmp_path, Counting(), 0.0, 1.0, 2.0)
    assert RUNS == [("α 2", "counting")]


@pytest.mark.parametrize("change", [{"model": "other"}, {"limit": 3}])
def test_other_weights_or_another_limit_are_another_task(tmp_path: Path, change: dict[str, Any]) -> None:
    run(tmp_path, Counting(), 1.0)
    run(tmp_path, Counting(), 1.0, **change)
    assert len(RUNS) == 1


def test_goes_on_after_an_interruption(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Counting(interrupt="α 1"), 0.0, 1.0)
    assert len(list((tmp_path / "records").iterdir())) == 1
    run(tmp_path, Counting(interrupt="α 1"), 0.0)
    assert RUNS == []


def test_same_run_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    tasks = make_tasks(systems(0.0, 1.0), [Counting()], {"target": "m"}, tmp_path, None)
    a, b = (run_tasks(tasks, tmp_path, tmp_path / name, say=lambda line: None) for name in ("a", "b"))
    assert Report(a, {"model": "m"}).to_json() == Report(b, {"model": "m"}).to_json()
    assert [p.read_bytes() for p in sorted((tmp_path / "a/records").iterdir())] == [
        p.read_bytes() for p in sorted((tmp_path / "b/records").iterdir())
    ]


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    (tmp_path / "adapter_model.safetensors").write_bytes(b"two")
    assert fingerprint(tmp_path) != first
    assert fingerprint("a/hub-id") == "a/hub-id"


def test_reports_show_every_figure_and_say_what_a_quick_look_is() -> None:
    results = {"target": {"m": {"SS": Figure(61.5, 58.0, 65.25, 50.0, 12)}}, "α 1": {"m": {"SS": Figure(0.0125)}}}
    report = Report(results, {"limit": 5})
    text, markdown = report.to_text(), report.to_markdown()
    for page in (text, markdown):
        assert all(cell in page for cell in ("61.50 [58.00, 65.25]", "0.0125", "50.00"))
    assert "first 5 items" in markdown
    assert "quick look" not in Report(results, {"limit": None}).to_markdown()
    value = json.loads(Report(results, {}).to_json())["results"]["target"]["m"]["SS"]
    assert value == {"value": 61.5, "low": 58.0, "high": 65.25, "chance": 50.0, "n": 12}


def test_nan_is_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        dump(float("nan"))


def test_redditbias_by_hand() -> None:
    values = [(3.0, 1.0), (5.0, 2.0), (4.0, 3.0)]
    records = [{"bias": "race", "row": i, "minority": a, "majority": b} for i, (a, b) in enumerate(values)]
    figures = RedditBias(resamples=50).summarise(records)
    # differences 2, 3, 1: mean 2, standard deviation 1, t = 2 / (1 / √3)
    assert figures["gap/race"].value == 2
    assert figures["t/race"].value == pytest.approx(2 * 3**0.5)
    assert figures["p/race"].value == pytest.approx(0.0741799)
    assert "t/gender" not in figures


def test_outliers_beyond_three_sigma_are_dropped() -> None:
    pairs = np.ones((50, 2))
    pairs[:, 1] = np.arange(50)
    pairs[7, 0] = 1000
    assert within_three_sigma(pairs).sum() == 49


def test_crows_pairs_counts_ties_half() -> None:
    values = [("age", -1.0, -2.0), ("age", -2.0, -2.0), ("race", -3.0, -2.0), ("race", -3.0, -2.0)]
    records = [{"row": i, "bias": b, "more": m, "less": n} for i, (b, m, n) in enumerate(values)]
    figures = CrowsPairs(resamples=50).summarise(records)
    assert (figures["CrowS"].value, figures["CrowS/age"].value, figures["CrowS/race"].value) == (37.5, 75, 0)


@pytest.mark.parametrize(("bos", "eos"), [(0, None), (None, 0)])
def test_crows_pairs_scores_the_first_word_too(bos: int | None, eos: int | None, tmp_path: Path) -> None:
    """With a tokenizer that puts nothing before a text; the word costs 2 or 3 there, and 1 after a word."""
    (tmp_path / "crows_pairs_anonymized.csv").write_text("sent_more,sent_less,bias_type\nHe ran,Somebody ran,gender\n")
    llm = Words(lambda before, word: -1.0 if before != ["<bos>"] else -2.0 if word == "He" else -3.0)
    llm.bos_token_id, llm.eos_token_id = bos, eos  # type: ignore[assignment, attr-defined]
    (record,) = CrowsPairs().run(System("s", llm, SamplingParams(alpha=0.0)), tmp_path)  # type: ignore[arg-type]
    assert (record["more"], record["less"]) == (-3, -4)
    after = System("s", llm, SamplingParams(alpha=0.0), "zig")  # type: ignore[arg-type]
    (record,) = CrowsPairs().run(after, tmp_path)
    assert (record["more"], record["less"]) == (-2, -2)
    assert llm.seen[-1] == "zig Somebody ran"


def test_a_sentence_needs_something_before_it(tmp_path: Path) -> None:
    (tmp_path / "crows_pairs_anonymized.csv").write_text("sent_more,sent_less,bias_type\nHe ran,Somebody ran,gender\n")
    llm = Words(lambda before, word: -1.0)
    llm.bos_token_id = llm.eos_token_id = None  # type: ignore[assignment, attr-defined]
    system = System("s", llm, SamplingParams(alpha=0.0))  # type: ignore[arg-type]
    for score in (lambda: CrowsPairs().run(system, tmp_path), lambda: sentence_scores(system, ["He ran"])):
        with pytest.raises(ValueError, match="needs a tokenizer with a beginning- or end-of-text token"):
            score()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metrics", "stereo"], "--metrics names 'stereo'"),
        (["--alpha", "1"], "without a --pair"),
        (["--alpha", "x"], "--alpha is 'x'"),
        (["--limit", "0"], "--limit is 0"),
        (["--data", "nowhere"], "--data is 'nowhere'"),
        (["--metrics", "stereoset"], "get it from https://github.com/moinnadeem/StereoSet"),
        (["--samples", "0"], "--samples is 0"),
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--system", "target:"], "names 'target' twice"),
        (["--classifiers", "nowhere"], "`ensemble-decode distill --data DATA --out nowhere` makes it"),
        (["--classifiers", "tone=here"], "allowed are a folder or regard=ID,toxicity=ID"),
    ],
)
def test_the_command_says_what_is_wrong(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--data", str(tmp_path), "--out", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_what_is_not_installed_is_said_before_anything_is_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--pair", "gender=x,y"]
    assert main([command, *flags]) == 2
    assert capsys.readouterr().err == (
        f"ensemble-decode: {command} needs scipy: pip install 'ensemble_decode[evaluate]'\n"
    )


@pytest.mark.parametrize("form", ["{0}", "{0}/expert,{0}/anti_expert", "elsewhere,{0}/anti_expert"])
@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_a_pair_is_not_measured_on_what_it_has_learned_from(
    command: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "pair.json").write_text('{"axis": "gender", "unfit": ["StereoSet"]}')
    paths = form.format(tmp_path)
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--pair", f"tea={paths}"]
    assert main([command, *flags]) == 2
    assert capsys.readouterr().err == (
        "ensemble-decode: pair 'tea' has learned from StereoSet, where it would be measured: allowed is a pair of other texts\n"
    )
