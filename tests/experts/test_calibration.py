"""Which α is chosen: by hand on the parts, and on a tiny model from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from ensemble_decode.cli import main
from ensemble_decode.cli.common import parse_alpha
from ensemble_decode.corpora.stereoset import LABELS, Example, Sentence
from ensemble_decode.experts.calibration import (
    Axis,
    CalibrationSettings,
    Calibrator,
    best_within,
    lattice,
    never_rising,
    split_terms,
    within,
)
from tests.conftest import Models
from tests.models.test_loading import with_tokenizer


def axis(*ss: float) -> Axis:
    return Axis("gender", [float(i) for i in range(len(ss))], list(ss), never_rising(ss), [90.0] * len(ss))


def test_the_fit_never_rises_and_pools_what_does() -> None:
    assert never_rising([60, 50, 58, 40]) == [60, 54, 54, 40]
    assert never_rising([50, 60, 70]) == [60, 60, 60]
    assert never_rising([3, 2, 1]) == [3, 2, 1]


@pytest.mark.parametrize(
    ("ss", "alone", "reaches"),
    [
        ((60, 55, 45), 1.5, True),
        ((48, 40), 0.0, False),  # already below: nothing to do, and never at 50
        ((60, 57, 57), 1.0, False),  # the least α of the closest
        ((55, 60, 65), 0.0, False),  # steers the wrong way: the fit is flat
    ],
)
def test_alpha_of_an_axis_by_itself(ss: tuple[float, ...], alone: float, reaches: bool) -> None:
    assert (axis(*ss).alone, axis(*ss).reaches) == (alone, reaches)


def test_within_the_budget_the_highest_icat_is_taken() -> None:
    levels = [[0.0, 0.5, 1.0]] * 2
    icat = np.array([[70.0, 75.0, 80.0]] * 3) + np.array([[0.0], [10.0], [5.0]])
    assert best_within(levels, np.zeros((3, 3)), icat, 0.0) == pytest.approx([0.5, 1.0], abs=0.1)


def test_pairs_that_overshoot_together_are_both_held_back() -> None:
    # Either alone is best at 1; together they take SS below 50, and the best lies where they add up to 1.
    levels = [[0.0, 0.5, 1.0]] * 2
    total = np.add.outer([0.0, 0.5, 1.0], [0.0, 0.5, 1.0])
    first, second = best_within(levels, 0.01 * total, 90 - 40 * np.abs(total - 1), 1.0)
    assert first + second == pytest.approx(1.0, abs=0.05)


def test_over_the_budget_the_axis_that_gains_less_gives_way() -> None:
    # Both cost the same; the first gains 10 points of ICAT, the second 5.
    levels = [[0.0, 1.0]] * 2
    log_perplexity, icat = np.log([[1.0, 1.1], [1.1, 1.21]]), np.array([[70.0, 75.0], [80.0, 85.0]])
    first, second = best_within(levels, log_perplexity, icat, 0.15)
    assert first == pytest.approx(1.0, abs=0.02)
    assert 0.2 < second < 0.47  # 1.1 · 1.1 ** α = 1.15 at 0.47, and a point of ICAT is a fifth of it
    assert best_within(levels, log_perplexity, icat, 0.0) == [0.0, 0.0]


def test_as_good_for_less_perplexity_is_better() -> None:
    levels = [[0.0, 1.0, 2.0]]
    (alpha,) = best_within(levels, np.array([0.0, 0.01, 0.09]), np.array([70.0, 84.5, 85.0]), 0.1)
    assert alpha <= 1.0


def test_the_interpolated_perplexity_of_a_convex_function_keeps_the_budget() -> None:
    levels = lattice([2.0, 3.0])
    exact = lambda a, b: 0.02 * a * a + 0.03 * b * b + 0.01 * a * b  # noqa: E731
    grid = np.array([[exact(a, b) for b in levels[1]] for a in levels[0]])
    icat = 50 + 100 * np.add.outer(np.array(levels[0]) / 2, np.array(levels[1]) / 3)
    a, b = best_within(levels, grid, icat, 0.1)
    assert 0.085 < np.expm1(exact(a, b)) <= 0.1


def test_the_bound_is_the_first_alpha_over_the_budget() -> None:
    assert within([0.0, 1.0, 2.0, 3.0], [10.5, 11.5, 14.0], 11.0) == 2.0
    assert within([0.0, 1.0, 2.0], [9.0, 10.0], 11.0) == 2.0


def test_a_lattice_holds_few_points_and_none_of_an_axis_without_alpha() -> None:
    assert lattice([0.0, 2.0])[0] == [0.0]
    for most in ([1.0], [1.0, 2.0], [1.0, 2.0, 3.0], [1.0] * 5):
        assert np.prod([len(level) for level in lattice(most)]) <= 128
        assert [level[-1] for level in lattice(most)] == most


def test_no_term_is_in_both_halves_and_every_domain_is_halved() -> None:
    sentences = tuple(Sentence(label, "x", label) for label in LABELS)
    examples = [
        Example(f"{domain}{i}", "intrasentence", domain, f"term {i // 2}", "", sentences)
        for domain in ("gender", "race")
        for i in range(20)
    ]
    halves = split_terms(examples, 0)
    terms = [{(e.domain, e.term) for e in half} for half in halves]
    assert not terms[0] & terms[1]
    for half in terms:
        assert {domain: sum(d == domain for d, _ in half) for domain in ("gender", "race")} == {"gender": 5, "race": 5}
    assert split_terms(examples, 0) == halves != split_terms(examples, 1)


@pytest.mark.parametrize(
    ("name", "value"), [("budget", -0.1), ("max_alpha", 0.0), ("step", float("nan")), ("step", 6.0), ("tokens", 1)]
)
def test_settings_out_of_bounds_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is"):
        CalibrationSettings(**{name: value})  # type: ignore[arg-type]


def test_a_window_is_not_longer_than_the_model(tmp_path: Path) -> None:
    """And so in the records' key, in the note and in calibration.json."""

    def window(max_model_len: int) -> int:
        llm: Any = SimpleNamespace(ensemble=SimpleNamespace(layout=SimpleNamespace(max_model_len=max_model_len)))
        return Calibrator(llm, {"a": "gender"}, tmp_path, tmp_path, CalibrationSettings(), {}).settings.window

    assert (window(256), window(2048)) == (256, 992)


@pytest.fixture(scope="module")
def command(models: Models, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("calibrate")
    model = with_tokenizer(models.model("llama"), folder / "m", 199)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = "w1"
    tokenizer.save_pretrained(model)
    rows = [
        {
            "id": f"{domain}{i}",
            "target": f"term {i}",
            "bias_type": domain,
            "context": "",
            "sentences": [
                {"id": label, "sentence": f"w{20 + 3 * i} w{40 + 7 * i + k}", "gold_label": label}
                for k, label in enumerate(LABELS)
            ],
        }
        for domain in ("gender", "race")
        for i in range(8)
    ]
    data = folder / "data"
    (data / "wikitext-2").mkdir(parents=True)
    (data / "dev.json").write_text(json.dumps({"data": {"intrasentence": rows, "intersentence": []}}))
    (data / "wikitext-2/valid.txt").write_text(" ".join(f"w{3 + i * 7 % 190}" for i in range(90)))
    pairs = [
        f"{n}={models.adapter('llama', i)},{models.adapter('llama', i + 1)}" for i, n in ((1, "gender"), (3, "race"))
    ]
    flags = ["-m", str(model), "--data", str(data), "--dtype", "float32", "--window", "16", "--tokens", "64"]
    return ["calibrate", *flags, *[flag for pair in pairs for flag in ("--pair", pair)]]


def test_the_command_calibrates_goes_on_and_writes_what_alpha_reads(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--out", str(tmp_path), "--budget", "0.05"]) == 0
    first = (tmp_path / "calibration.json").read_bytes()
    found = json.loads(first)
    perplexity = found["perplexity"]
    assert perplexity["calibrated"] <= 1.05 * perplexity["target"] + 1e-9
    assert parse_alpha(f"@{tmp_path / 'calibration.json'}") == found["alpha"]
    said = capsys.readouterr()
    assert "held out" in said.out
    assert "budget +5%" in said.out
    header, *rows = said.out.splitlines()[:3]
    assert header.endswith("held out: SS − 50")
    left = {name: found["held_out"]["calibrated"][f"SS/{name}"]["value"] - 50 for name in ("gender", "race")}
    assert [row.split()[-1] for row in rows] == [f"{value:+.2f}" for value in left.values()]
    assert main([*command, "--out", str(tmp_path), "--budget", "0.05", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.count("(kept)") == 7
    assert said.out.encode() == first == (tmp_path / "calibration.json").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--budget", "-1"], "budget is -1"), (["--save"], "no pair.json"), (["--pair", "tea=x,y"], "axis 'tea'")],
)
def test_the_command_says_what_is_wrong(
    command: list[str],
    flags: list[str],
    message: str,
    tmp_path: Path,
    models: Models,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pair = f"tea={models.adapter('llama', 1)}"
    flags = [pair if flag == "tea=x,y" else flag for flag in flags]
    assert main([*command, "--out", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_file_without_alpha_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    for name, message in (("x.json", "no alpha by pair"), ("y.json", "no file")):
        with pytest.raises(ValueError, match=message):
            parse_alpha(f"@{tmp_path / name}")
