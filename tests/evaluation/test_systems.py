"""Systems in one line, what two of them share, and a trigger before what is scored."""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ensemble_decode import LLM, BeamSearchParams, SamplingParams
from ensemble_decode.cli import main
from ensemble_decode.cli.common import CommandError, identity
from ensemble_decode.cli.evaluate import _about, _systems, add_arguments
from ensemble_decode.cli.systems import parse_system, sweep
from ensemble_decode.evaluation.bold import DOMAINS, Continuations, paper_params
from ensemble_decode.evaluation.classifiers import ClassifierSource
from ensemble_decode.evaluation.diversity import Diversity
from ensemble_decode.evaluation.drift import Drift
from ensemble_decode.evaluation.metric import Record, System
from ensemble_decode.evaluation.perplexity import Perplexity
from ensemble_decode.evaluation.runner import Task, make_tasks
from ensemble_decode.evaluation.stereoset import StereoSet, sentence_scores
from ensemble_decode.evaluation.tfidf import TfidfClassifier
from ensemble_decode.models.layout import Layout, PairLayout
from tests.conftest import Models
from tests.evaluation.words import Words
from tests.models.test_loading import with_tokenizer


def test_what_is_not_named_is_as_in_the_paper() -> None:
    spec = parse_system("one pair: alpha=gender=1,race=0.5")
    assert (spec.name, spec.params, spec.prefix) == ("one pair", paper_params({"gender": 1.0, "race": 0.5}), "")
    spec = parse_system("min-p: alpha=1; top_p=1;min_p=0.1 ; nucleus=target;")
    assert (spec.params.top_p, spec.params.min_p, spec.params.nucleus) == (1.0, 0.1, "target")
    assert parse_system("own α:").params.alpha is None
    assert [spec.name for spec in sweep([0, 0.5])] == ["target", "α 0.5"]


def test_a_trigger_is_taken_as_it_stands() -> None:
    spec = parse_system("t: alpha=0; trigger= a; top_k=3=b ")
    assert (spec.params.alpha, spec.params.top_k, spec.prefix) == (0.0, 0, " a; top_k=3=b ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no colon", "--system is 'no colon'"),
        (": alpha=1", "--system is ': alpha=1'"),
        ("a: beta=1", "says 'beta=1', allowed are alpha, temperature"),
        ("a: alpha", "says 'alpha'"),
        ("a: alpha=strong", "alpha is 'strong', allowed is a number, pair=number"),
        ("a: top_k=1.5", "top_k is '1.5', allowed is an integer"),
        ("a: top_p=2", "--system 'a': top_p is 2.0"),
        ("a: beam_width=wide", "beam_width is 'wide', allowed is an integer"),
        ("a: beam_width=5; top_k=3", "says top_k with beam_width, allowed are alpha and trigger"),
        ("a: nucleus=both", "--system 'a': nucleus is 'both'"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(CommandError) as error:
        parse_system(text)
    assert message in str(error.value)


def test_a_pair_that_is_not_there_is_said(models: Models) -> None:
    llm = LLM(models.model("llama"), dtype="float32", max_num_seqs=2)
    with pytest.raises(CommandError, match="--system 'a': alpha names the pair 'gender', known are none"):
        parse_system("a: alpha=gender=1").of(llm)


def test_scoring_metrics_don_t_depend_on_how_text_is_sampled(tmp_path: Path) -> None:
    llm: LLM = SimpleNamespace()  # type: ignore[assignment]
    systems = [System(spec.name, llm, spec.params, spec.prefix) for spec in map(parse_system, SAME_SCORES)]
    one, other, trigger = make_tasks(systems, [StereoSet()], {}, tmp_path, None)
    assert one.digest == other.digest != trigger.digest
    (tmp_path / f"stereoset_a_{one.digest}.json").touch()
    assert other.path(tmp_path) == one.path(tmp_path)


def test_an_alpha_left_to_the_pairs_is_theirs_and_one_that_is_said_stays_as_it_was(tmp_path: Path) -> None:
    """``calibrate --save`` changes a pair's own α: what was measured at the old one is not what is asked for."""

    def task(said: str, own: float) -> Task:
        pairs = (PairLayout("gender", own, 1, 2), PairLayout("race", 0.0, 3, 4))
        llm: LLM = SimpleNamespace(ensemble=SimpleNamespace(layout=Layout(9, 9, 0, 5, pairs)))  # type: ignore[assignment]
        return make_tasks([System("s", llm, parse_system(f"s:{said}").params)], [StereoSet()], {}, tmp_path, None)[0]

    assert task("", 0.5).digest != task("", 2.0).digest
    assert task("", 0.5).digest == task("alpha=gender=0.5", 2.0).digest
    assert task("alpha=1", 0.5).depends_on["system"] == {"alpha": 1.0}


def test_what_is_not_the_default_identifies_the_model_and_defaults_are_not_named() -> None:
    plain = {"model": "a/b", "pair": ["gender=c/d,e/f"], "base": None, "dtype": "auto"}
    plain |= {"quantization": None, "max_model_len": None}
    known = {"target": "a/b", "pairs": {"gender": ["c/d", "e/f"]}, "base": None, "dtype": "auto"}
    assert identity(Namespace(**plain)) == known
    given = {"quantization": "int8", "max_model_len": 512}
    assert identity(Namespace(**plain | given)) == known | given


SAME_SCORES = ("a: alpha=1; top_k=50", "b: alpha=1; top_p=0.5", "c: alpha=1; trigger=zig")


def halving() -> Words:
    """Finds a word as probable as 2^-n after n words."""
    return Words(lambda before, word: -len(before) * math.log(2))


def test_a_trigger_s_tokens_count_in_stereoset_and_nowhere_else() -> None:
    alone = System("target", halving(), SamplingParams(alpha=0.0))  # type: ignore[arg-type]
    after = System("trigger", halving(), SamplingParams(alpha=0.0), "zig ")  # type: ignore[arg-type]
    # the first token after <bos>: 2^-1; those after 1, 2, … tokens: 2^-1, 2^-2, …
    assert sentence_scores(alone, ["he ran"]) == pytest.approx([2 ** -((1 + 1) / 2)])
    assert sentence_scores(after, ["he ran"]) == pytest.approx([2 ** -((1 + 1 + 2) / 3)])
    (score,) = after.score(["he ran"])
    assert [round(value / -0.693147) for value in score.logprobs if value is not None] == [1, 2]
    assert len(score.token_ids) == 2


def test_perplexity_after_a_trigger_counts_the_window_s_tokens(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("")
    (tmp_path / "wiki.test.tokens").write_text("a b c d e f")
    llm = halving()
    llm.ensemble = SimpleNamespace(layout=SimpleNamespace(max_model_len=40))  # type: ignore[attr-defined]
    metric = Perplexity("paper", window=3)
    (first, second) = metric.run(System("t", llm, SamplingParams(), "zig zag"), tmp_path)  # type: ignore[arg-type]
    assert first == second | {"begin": 0, "end": 3}
    assert first["tokens"] == 2
    assert first["nll"] == pytest.approx((3 + 4) * 0.693147, rel=1e-5)
    with pytest.raises(
        ValueError, match=r"window is 40, allowed is 2 … 39 \(the model's length and one, less the trigger"
    ):
        Perplexity(window=40).lengths(40, 2)


@pytest.fixture
def command(models: Models, tmp_path: Path) -> list[str]:
    """``evaluate`` with a small model, three invented prompts a group, a sampler and a trigger."""
    folder = tmp_path / "data"
    (folder / "bold" / "prompts").mkdir(parents=True)
    for name, groups in DOMAINS.values():
        corpus = {group: {"A_B": ["w5 w6", "w6 w7", "w7 w8"]} for group in groups}
        (folder / "bold" / "prompts" / name).write_text(json.dumps(corpus))
    model = with_tokenizer(models.model("llama"), tmp_path / "model", 190)
    flags = ["-m", str(model), "--dtype", "float32", "--data", str(folder), "--out", str(tmp_path / "out")]
    flags += ["--metrics", "diversity", "--prompts", "2", "--samples", "3"]
    return ["evaluate", *flags, "--system", "greedy: temperature=0", "--system", "trigger: trigger=w9 w8 ", "--json"]


def test_the_same_run_twice_writes_the_same_bytes_and_generates_once(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["systems"] == ["target", "greedy", "trigger"]
    assert report["results"]["greedy"]["diversity"]["distinct-1"]["n"] == 14
    assert report["comparisons"]["systems"]["greedy"]["diversity"]["distinct-1"]["difference"] < 0
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert main(command) == 0
    assert capsys.readouterr().err.count("(kept)") == 3
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("alpha", ["1", "1,0", "0,1"])
def test_the_target_is_measured_first_whatever_alpha_says(alpha: str) -> None:
    parser = ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--data", "d", "--out", "o", "--pair", "a=b,c", "--alpha", alpha])
    assert [spec.name for spec in _systems(args)] == ["target", "α 1"]


def test_the_baseline_may_be_any_system(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--baseline", "tigger"]) == 2
    assert capsys.readouterr().err == ("ensemble-decode: --baseline is 'tigger', allowed are target, greedy, trigger\n")
    assert main([*command, "--baseline", "trigger"]) == 0
    comparisons = json.loads(capsys.readouterr().out)["comparisons"]
    assert comparisons["baseline"] == "trigger"
    assert comparisons["systems"].keys() == {"target", "greedy"}


def test_a_calibration_s_file_is_a_system_of_the_sweep(
    command: list[str], models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "calibration.json"
    file.write_text('{"alpha": {"a": 0.75}}')
    assert main([*command, "--alpha", f"0,@{file}"]) == 2
    assert "without a --pair" in capsys.readouterr().err
    pair = ["--pair", f"a={models.adapter('llama', 1)},{models.adapter('llama', 2)}"]
    assert main([*command, *pair, "--alpha", f"@{file}", "--prompts", "1", "--samples", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["systems"] == ["target", "calibrated", "greedy", "trigger"]
    assert report["comparisons"]["systems"]["calibrated"]["diversity"]["distinct-1"]["difference"] != 0
    page = (tmp_path / "out/report.html").read_text()
    assert "calibrated" in page
    file.write_text("{}")
    assert main([*command, *pair, "--alpha", f"@{file}"]) == 2
    assert "has no alpha by pair" in capsys.readouterr().err


def test_a_window_that_is_too_long_is_refused_before_the_first_metric(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Diversity, "run", lambda *args: pytest.fail("it ran"))
    monkeypatch.setattr(Perplexity, "check", lambda self, data: None)
    assert main([*command, "--metrics", "diversity,perplexity", "--window", "9000"]) == 2
    assert "window is 9000, allowed is 2 … " in capsys.readouterr().err


def test_a_prompt_s_samples_are_its_best_beams(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--system", "beams: beam_width=4", "--system", "more beams: beam_width=6"]) == 0
    assert json.loads(capsys.readouterr().out)["systems"][-2:] == ["beams", "more beams"]
    llm = LLM(str(tmp_path / "model"), dtype="float32")
    for width, name in ((4, "beams"), (6, "more_beams")):
        (path,) = (tmp_path / "out/continuations").glob(f"{name}-*")
        written = [json.loads(line)["samples"] for line in path.read_text().splitlines()]
        system = System(name, llm, paper_params(), beam_width=width)
        kept = Continuations(str(path.parent), samples=3, prompts=2).of(system, tmp_path / "data")
        prompts = [prompt.text for prompt, _ in kept]
        found = llm.beam_search(prompts, BeamSearchParams(beam_width=width, max_tokens=15), use_tqdm=False)
        assert written == [[sequence.text for sequence in output.sequences[:3]] for output in found]


def test_beam_widths_are_told_apart_where_a_metric_generates(tmp_path: Path) -> None:
    llm: LLM = SimpleNamespace()  # type: ignore[assignment]
    systems = [System("s", llm, paper_params(0.0), beam_width=width) for width in (None, 5, 6)]
    tasks = make_tasks(systems, [StereoSet(), Diversity(Continuations("folder"))], {}, tmp_path, None)
    assert [len({task.digest for task in tasks[place::2]}) for place in (0, 1)] == [1, 3]


def test_fewer_beams_than_samples_are_refused_before_the_first_metric(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Diversity, "run", lambda *args: pytest.fail("it ran"))
    assert main([*command, "--system", "beams: beam_width=2"]) == 2
    assert "beam_width of 'beams' is 2, allowed is 3 (the samples) or more" in capsys.readouterr().err


def test_ctrl_c_reports_what_is_done(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Diversity.run

    def interrupted(self: Diversity, system: System, data: Path, limit: int | None = None) -> list[Record]:
        if system.name == "trigger":
            raise KeyboardInterrupt
        return run(self, system, data, limit)

    monkeypatch.setattr(Diversity, "run", interrupted)
    assert main(command) == 130
    shown = capsys.readouterr()
    assert "the same command goes on from there" in shown.err
    report = json.loads(shown.out)
    assert report["systems"] == ["target", "greedy"]
    assert report["about"]["interrupted"] == "after 2 of 3 measurements"


def test_an_error_in_a_metric_reports_what_is_done(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Diversity.run

    def failing(self: Diversity, system: System, data: Path, limit: int | None = None) -> list[Record]:
        if system.name in failed:
            raise ValueError("it has no token")
        return run(self, system, data, limit)

    monkeypatch.setattr(Diversity, "run", failing)
    failed = ["target", "trigger"]
    assert main(command) == 2
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out" / "report.json").exists()  # nothing is done
    failed.remove("target")
    assert main(command) == 2
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == "ensemble-decode: it has no token"
    report = json.loads(shown.out)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["systems"] == ["target", "greedy"]
    assert report["about"]["interrupted"] == "after 2 of 3 measurements"


def test_stand_ins_label_the_text_and_are_named_in_every_report(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, labels in (("regard", ("negative", "neutral", "positive")), ("toxicity", ("not toxic", "toxic"))):
        weights = np.linspace(-1, 1, 2 * len(labels)).reshape(len(labels), 2)
        vocabulary = {"w5": 0, "w6": 1}
        stand_in = TfidfClassifier(name, labels, vocabulary, np.ones(2), weights, np.zeros(len(labels)), {"AUC": 0.875})
        stand_in.save(tmp_path / "classifiers" / name)
    command[command.index("--metrics") + 1] = "regard,toxicity"
    assert main([*command, "--classifiers", str(tmp_path / "classifiers")]) == 0
    report = json.loads(capsys.readouterr().out)
    about, results = report["about"], report["results"]["trigger"]
    assert (about["prompts"], about["samples"], about["max_tokens"]) == (2, 3, 15)
    assert about["toxicity classifier"] == str(tmp_path / "classifiers" / "toxicity")
    assert about["regard classifier"] == str(tmp_path / "classifiers" / "regard")
    assert results["regard"]["gap/gender"]["chance"] is not None
    assert results["toxicity"]["toxic/islam"]["n"] == 2
    page, markdown = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "toxicity is measured by a stand-in" in page
    assert "stand-in AUC | 0.875" in markdown
    assert "* samples: 3" in markdown


def test_a_report_says_what_its_metrics_depend_on_and_no_more() -> None:
    parser = ArgumentParser()
    add_arguments(parser)
    flags = ["--data", "d", "--out", "o", "-m", "m", "--base", "b", "--quantization", "int8", "--window", "64"]
    plain = {"model": "m", "pairs": "none", "base": "b", "dtype": "auto", "quantization": "int8"}
    assert _about(parser.parse_args(flags), [StereoSet()]) == plain
    assert _about(parser.parse_args(flags), [StereoSet(), Perplexity()]) == plain | {"window": 64}
    text = Continuations("folder")
    written = plain | {"samples": 5, "max_tokens": 15}
    assert _about(parser.parse_args(flags), [Diversity(text)]) == written
    drift = Drift(ClassifierSource("a/b"), text)
    assert _about(parser.parse_args(flags), [drift]) == written | {"regard classifier": "a/b"}
