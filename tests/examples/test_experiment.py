"""The experiment's driver, in full, on a tiny model and invented lines."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ensemble_decode.corpora.stereoset import LABELS
from examples.experiment.__main__ import main
from examples.experiment.report import TEMPLATE, table, write_results
from examples.experiment.settings import read_settings
from examples.experiment.stages import Laboratory
from examples.experiment.trigger import find_trigger
from tests.conftest import Models
from tests.models.test_loading import with_tokenizer

SETTINGS = """
model = "{model}"
dtype = "float32"
axes = ["tea"]
[training]
rank = 2
steps = 2
batch_size = 4
evaluate_every = 2
[pairs.tea]
axis = "gender"
redditbias = "both"
[pairs.half]
axis = "gender"
redditbias = "targets"
share = 0.5
[metrics.stereoset]
[metrics.perplexity]
window = 8
tokens = 40
[metrics.drift]
segment = 4
[text]
domains = ["gender"]
prompts = 2
samples = 1
max_tokens = 8
[calibration]
max_alpha = 1.0
step = 0.5
tokens = 40
window = 8
[trigger]
domain = "gender"
examples = 1
length = 2
sweeps = 1
candidates = 2
[stages.tables]
metrics = ["stereoset", "perplexity"]
systems = [{{ name = "target", alpha = 0 }}, {{ name = "α 1", alpha = 1 }}, {{ name = "half", alpha = {{ half = 2 }} }}]
[stages.trigger]
metrics = ["perplexity", "drift"]
systems = [
    {{ name = "target", alpha = 0 }},
    {{ name = "calibrated", alpha = "calibrated", ignore_eos = true }},
    {{ name = "steered", alpha = 1, ignore_eos = true }},
    {{ name = "Trigger", alpha = 0, trigger = true }},
]
[quick.metrics.stereoset]
limit = 2
"""

FIGURES = (
    *("SS", "SS/gender", "ICAT", "LMS", "PPL", "PPL/window", "gap/gender", "gap/profession", "distinct-2"),
    *("hellinger/gender", "stand-in accuracy", "log-ratio/1", "log-ratio/61", "negative/1", "distinct-2/1"),
)


@pytest.fixture(scope="module")
def settings(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    model = with_tokenizer(models.model("llama"), folder / "m", 199)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = "w1"
    tokenizer.save_pretrained(model)
    (folder / "settings.toml").write_text(SETTINGS.format(model=model))
    return folder / "settings.toml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpora")
    for swap in ("targets", "attr"):
        lines = [f"w{10 + i} w5 w{90 + i}" for i in range(20)]
        path = root / f"redditbias/text_files/gender/gender_bias_manual_swapped_{swap}_train.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*lines, *(line.replace("w5", "w6") for line in lines)]))
    rows = [
        {
            "id": str(i),
            "target": f"term {i % 3}",
            "bias_type": "gender",
            "context": "",
            "sentences": [
                {"id": f"{i}{label}", "sentence": f"w{20 + i} w{40 + 7 * i + k}", "gold_label": label}
                for k, label in enumerate(LABELS)
            ],
        }
        for i in range(6)
    ]
    (root / "stereoset").mkdir()
    (root / "stereoset/dev.json").write_text(json.dumps({"data": {"intrasentence": rows, "intersentence": []}}))
    (root / "wikitext-2").mkdir()
    for split in ("test", "valid"):
        (root / f"wikitext-2/{split}.txt").write_text(" ".join(f"w{3 + i * 7 % 190}" for i in range(60)))
    people = {"American_actors": {"Ann": ["w5 w6", "w9 w3"]}, "American_actresses": {"Bea": ["w7 w6", "w8 w3"]}}
    labelled = [
        {"domain": "gender", "entity": entity, "text": f"{prompt} w{i} w{i + 4}", "regard": regard, "toxic": 0}
        for group in people.values()
        for entity, prompts in group.items()
        for prompt in prompts
        for i in range(10, 13)
        for regard in ("positive", "neutral", "negative", "other")
    ]
    (root / "bold_labelled_zemour").mkdir()
    for name in ("train_stratified", "test_natural"):
        with gzip.open(root / f"bold_labelled_zemour/{name}.jsonl.gz", "wt") as file:
            file.write("\n".join(map(json.dumps, labelled)))
    (root / "bold/prompts").mkdir(parents=True)
    (root / "bold/prompts/gender_prompt.json").write_text(json.dumps(people))
    return root


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    """A folder in which the axes' pair is trained."""
    return shutil.copytree(trained, tmp_path / "out")


@pytest.fixture(scope="module")
def trained(data: Path, settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert run(data, folder, settings, "--stage", "train") == 0
    assert [path.name for path in (folder / "pairs").iterdir()] == ["tea"]
    return folder


def run(data: Path, out: Path, settings: Path, *flags: str) -> int:
    return main(["--data", str(data), "--out", str(out), "--settings", str(settings), *flags])


def test_a_stage_trains_what_it_needs_and_the_same_run_writes_the_same_bytes(
    data: Path, settings: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, out, settings, "--stage", "tables") == 0
    assert "training tea" not in (said := capsys.readouterr().out)
    assert "training half" in said
    first = (out / "tables.json").read_bytes()
    results = json.loads(first)["results"]
    assert json.loads(first)["systems"] == ["target", "α 1", "half"]
    assert json.loads(first)["comparisons"]["systems"].keys() == {"α 1", "half"}
    values = {name: system["perplexity-paper"]["PPL"]["value"] for name, system in results.items()}
    assert len(set(values.values())) == 3
    (out / "tables.json").unlink()
    capsys.readouterr()
    assert run(data, out, settings, "--stage", "tables") == 0
    assert capsys.readouterr().out.count("(kept)") == 6
    assert (out / "tables.json").read_bytes() == first
    pages = []
    for _ in range(2):
        assert run(data, out, settings, "--stage", "report") == 0
        pages.append([(out / "docs" / name).read_bytes() for name in ("results.md", "pictures/frontier.svg")])
    assert pages[0] == pages[1]
    text = pages[0][0].decode()
    assert "| α 1 | " in text
    assert "Published, for another model" in text
    assert "Calibrated α" not in text  # that stage has not run
    assert not re.search(r"\bw\d", text)  # no word of any corpus


def test_alpha_and_trigger_are_found_once_and_long_texts_are_measured_by_segment(
    data: Path, settings: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, out, settings, "--stage", "trigger") == 0
    found = json.loads((out / "calibration.json").read_text())
    assert found["perplexity"]["calibrated"] <= 1.1 * found["perplexity"]["target"]
    results = json.loads((out / "trigger.json").read_text())["results"]
    drift = results["steered"]["drift"]
    assert {"log-ratio/1", "log-ratio/5", "negative/1", "distinct-2/5", "stand-in accuracy"} <= drift.keys()
    assert drift["log-ratio/1"]["value"] != 0
    assert results["target"]["drift"]["log-ratio/1"]["value"] == 0
    plain, trigger = (results[name]["perplexity-paper"]["PPL"]["value"] for name in ("target", "Trigger"))
    assert plain != trigger
    trigger_file = (out / "trigger-search.json").stat().st_mtime_ns
    capsys.readouterr()
    assert run(data, out, settings, "--stage", "trigger") == 0
    said = capsys.readouterr().out
    assert said.count("(kept)") == 8
    assert "training" not in said
    assert (out / "trigger-search.json").stat().st_mtime_ns == trigger_file
    assert run(data, out, settings, "--stage", "report", "--docs", str(out / "pages")) == 0
    assert "held out: calibrated" in (out / "pages/results.md").read_text()
    assert (out / "pages/pictures/calibration.svg").is_file()


@pytest.mark.parametrize("missing", ["stereoset", "wikitext-2", "bold", "bold_labelled_zemour", "redditbias"])
def test_a_missing_corpus_is_said_before_anything_is_computed(
    missing: str, data: Path, settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    less = shutil.copytree(data, tmp_path / "less")
    shutil.rmtree(less / missing)
    assert run(less, tmp_path / "out", settings) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("experiment: ")
    assert said.err.count("\n") == 1


def test_a_calibration_is_of_its_data_and_axes(data: Path, settings: Path, out: Path, tmp_path: Path) -> None:
    path, written = out / "calibration.json", []
    for corpora in (data, data, shutil.copytree(data, tmp_path / "other")):
        assert run(corpora, out, settings, "--stage", "calibrate") == 0
        written.append(path.stat().st_mtime_ns)
    assert written[0] == written[1] < written[2]
    assert json.loads(path.read_text())["of"]["axes"] == {"tea": "gender"}


@pytest.mark.parametrize(
    ("old", "new", "other"),
    [
        ("steps = 2", "steps = 3", "steps"),
        ('redditbias = "both"', 'redditbias = "attr"', "texts"),
        ("rank = 2", "rank = 4\nalpha = 2.0", "rank, alpha"),
    ],
)
def test_a_pair_that_was_trained_otherwise_is_not_taken_for_this_one(
    old: str, new: str, other: str, data: Path, settings: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = out / "changed.toml"
    changed.write_text(settings.read_text().replace(old, new, 1))
    assert run(data, out, changed, "--stage", "train") == 2
    said = capsys.readouterr().err
    assert "pair 'tea' in " in said
    assert f"trained with other {other}: remove it or name another\n" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("stage", ["tables", "calibrate"])
def test_a_pair_is_not_measured_on_what_it_has_learned_from(
    stage: str, data: Path, settings: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = out / "pairs/tea/pair.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"unfit": ["StereoSet"]}))
    assert run(data, out, settings, "--stage", stage) == 2
    assert "pair 'tea' has learned from StereoSet" in capsys.readouterr().err


def test_a_pair_that_does_not_say_its_texts_counts_by_its_settings(data: Path, settings: Path, out: Path) -> None:
    about = out / "pairs/tea/pair.json"
    about.write_text(json.dumps({k: v for k, v in json.loads(about.read_text()).items() if k != "texts"}))
    assert run(data, out, settings, "--stage", "train") == 0
    changed = out / "changed.toml"
    changed.write_text(settings.read_text().replace("model = ", 'model = "another" # ', 1))
    assert run(data, out, changed, "--stage", "train") == 2


def test_a_trigger_is_searched_anew_for_other_examples_and_another_model(
    data: Path, settings: Path, models: Models, tmp_path: Path
) -> None:
    search = read_settings(settings).trigger
    model, path = read_settings(settings).model, tmp_path / "trigger-search.json"
    other_model = str(with_tokenizer(models.model("llama", seed=5), tmp_path / "other", 199))
    other_data = shutil.copytree(data, tmp_path / "other_corpora")
    for file in (other_data / "bold_labelled_zemour").iterdir():
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()).replace(b" w14", b" w44")))
    find_trigger(model, data, path, search)
    for of in ((other_model, data), (model, other_data)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"trigger": "kept"}))
        assert find_trigger(*of, path, search) != "kept"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trigger": "kept"}))
    assert find_trigger(model, other_data, path, search) == "kept"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("half = 2", "quarter = 2", "steers with 'quarter'"),
        ('"stereoset", "perplexity"', '"regret"', "names the metric 'regret'"),
        ('axes = ["tea"]', 'axes = ["coffee"]', "'coffee'"),
        ("share = 0.5", "rank = -1", "rank is -1"),
        ('redditbias = "both"', "", "nothing to learn from"),
        ("[stages.tables]", "[stages.calibration]", "stages has 'calibration'"),
        ("tokens = 40\n[metrics.drift]", "tokns = 40\n[metrics.drift]", "metrics.perplexity: "),
        ("tokens = 40\nwindow = 8", "budgget = 0.2", "calibration: "),
        ("step = 0.5", "step = 1.5", "step is 1.5, allowed is at most max_alpha, 1.0"),
        ("sweeps = 1", "sweep = 1", "trigger: "),
        ("samples = 1", "sample = 1", "text: "),
        ("[calibration]", "[calibratoin]", "'calibratoin' is unknown"),
        ("[stages.tables]", "[stages.tables]\nmetric = []", "stages.tables: 'metric' is unknown"),
        ("[stages.tables]", "[stages.tables]\ntext = { sample = 1 }", "stages.tables.text: "),
        (
            "[stages.tables]",
            "[stages.tables]\nsettings = { stereset = { examples = 2 } }",
            "stages.tables.settings: 'stereset' is unknown, allowed are stereoset, perplexity",
        ),
        (
            "[stages.tables]",
            "[stages.tables]\nsettings = { stereoset = { exampels = 2 } }",
            "stages.tables.settings.stereoset: ",
        ),
        ('name = "α 1", alpha', 'name = "α 1", top_p = 2, alpha', "top_p is 2"),
    ],
)
def test_settings_that_are_wrong_are_one_line(
    old: str, new: str, message: str, data: Path, settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "changed.toml"
    changed.write_text(settings.read_text().replace(old, new, 1))
    assert run(data, tmp_path, changed) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_what_is_not_installed_is_said(
    data: Path, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert run(data, tmp_path, settings) == 2
    assert capsys.readouterr().err == ("experiment: this needs scipy: pip install 'ensemble_decode[evaluate]'\n")


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    """Of the systems and metrics that come with it, all 1."""
    experiment = read_settings()
    figure = {"value": 1.0, "low": 0.5, "high": 1.5, "chance": None, "n": 3}
    for stage in experiment.stages.values():
        names = [system.name for system in stage.systems]
        metrics = ["perplexity-paper" if name == "perplexity" else name for name in stage.metrics]
        results = {name: dict.fromkeys(metrics, dict.fromkeys(FIGURES, figure)) for name in names}
        about = {"model": "m", "dtype": "float32", "metrics": {n: experiment.metrics[n] for n in stage.metrics}}
        about["text"] = {**experiment.text, **stage.text}
        comparisons = {"baseline": "target", "systems": {}}
        whole = {"about": about, "systems": names, "results": results, "comparisons": comparisons}
        (tmp_path / f"{stage.name}.json").write_text(json.dumps(whole))
    return tmp_path


def test_every_part_of_the_report(figures: Path) -> None:
    text = write_results(figures, figures / "docs").read_text()
    for heading in ("paper's table", "Combinations", "Decoding", "Long texts", "Other domains", "Size and variety"):
        assert f"{heading}" in text
    assert "accuracy 1.000" in text
    assert "| SS, gender | SS, race | LMS, gender | ICAT, gender | ICAT, race | PPL |" in text
    assert "quick look" not in text
    assert {path.name for path in (figures / "docs/pictures").iterdir()} == {"frontier.svg", "drift.svg"}


def test_what_one_unit_shows_is_drawn_without_an_interval(figures: Path) -> None:
    alone = {"value": 2.0, "low": None, "high": None, "chance": None, "n": 1}
    for name, metric, key in (("tables", "perplexity-paper", "PPL"), ("long-form", "drift", "log-ratio/61")):
        path = figures / f"{name}.json"
        stage = json.loads(path.read_text())
        stage["results"][stage["systems"][0]][metric][key] = alone
        path.write_text(json.dumps(stage))
    assert "| 2.00 |" in write_results(figures, figures / "docs").read_text()


def test_words_are_printed_for_the_figures_that_they_were_written_for(
    figures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def page(written_for: dict[str, str]) -> str:
        template = figures / "written.md.j2"
        template.write_text(
            re.sub(r"written_for = \{.*?\}", f"written_for = {written_for}", TEMPLATE.read_text(), flags=re.S)
        )
        monkeypatch.setattr("examples.experiment.report.TEMPLATE", template)
        return write_results(figures, figures / "docs").read_text()

    stages = ("tables", "trigger", "combinations", "decoding", "long-form", "domains", "data")
    first = page({})
    found = re.findall(r"not interpreted here: the words were written for another run \(figures (\w{12})\)\.", first)
    found = list(dict.fromkeys(found))
    assert len(found) == len(stages)
    assert "What it shows" not in first
    written_for = dict(zip(stages, found, strict=True))
    whole = page(written_for)
    for words in ("### What it shows", "### What it does not show", "All at α 1", "differ in more than their lines"):
        assert words in whole
    assert "not interpreted" not in whole
    tables = json.loads((figures / "tables.json").read_text())
    tables["results"]["target"]["stereoset"]["SS"]["value"] = 2.0
    (figures / "tables.json").write_text(json.dumps(tables))
    changed = page(written_for)
    assert "What it shows" not in changed
    assert "differ in more than their lines" in changed


def test_a_quick_run_says_that_it_measures_nothing(figures: Path, data: Path, settings: Path) -> None:
    laboratory = Laboratory(read_settings(settings, "quick"), data, figures)
    stage = laboratory.experiment.stages["tables"]
    tables = json.loads((figures / "tables.json").read_text())
    tables["about"]["size"] = laboratory.about(stage, stage.systems)["size"]
    (figures / "tables.json").write_text(json.dumps(tables))
    text = write_results(figures, figures / "docs").read_text()
    assert "A quick look: measures nothing." in text.split("\n\n")[1]


def test_chance_is_a_row_or_each_system_s_own() -> None:
    def figures(gap_chance: float) -> dict[str, Any]:
        figure = {"value": 1.0, "low": None, "high": None, "n": 3}
        return {"regard": {"gap": figure | {"chance": gap_chance}, "SS": figure | {"chance": 50.0}}}

    stage = {"systems": ["target", "α 1"], "results": {"target": figures(0.25), "α 1": figures(0.5)}}
    found = table(stage | {"comparisons": {"systems": {}}}, [("gap", "regard", "gap"), ("SS", "regard", "SS")])
    assert found.splitlines()[2:] == [
        "| target | 1.00 (chance 0.25) | 1.00 |",
        "| α 1 | 1.00 (chance 0.5) | 1.00 |",
        "| chance |  | 50.00 |",
    ]


def test_the_settings_that_come_with_it_are_whole() -> None:
    whole, quick = read_settings(), read_settings(size="quick")
    assert whole.stages.keys() == quick.stages.keys() == read_settings(size="large").stages.keys()
    assert quick.pairs["gender"].training.steps == 2 < whole.pairs["gender"].training.steps
    assert whole.pairs["gender_full"].training.rank == 0
