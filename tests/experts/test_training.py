"""Training a pair of tiny random models on invented lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ensemble_decode import LLM, ExpertPair, SamplingParams
from ensemble_decode.cli import main
from ensemble_decode.experts import texts, training
from tests.conftest import Models
from tests.models.test_loading import with_tokenizer

SETTINGS = training.TrainingSettings(
    rank=2, steps=12, batch_size=4, learning_rate=0.01, evaluate_every=4, patience=9, validation=0.2
)


@pytest.fixture(scope="module")
def model(models: Models, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(with_tokenizer(models.model("llama"), tmp_path_factory.mktemp("train") / "m", 199))


def lines(word: str) -> list[str]:
    return [f"w{10 + i} w{60 + i} {word} w{110 + i}" for i in range(30)]


DATA = texts.PairTexts(lines("w5"), lines("w6"), "invented", "CC0", "tea", ("TeaSet",))


def weights(pair: Path) -> dict:
    return {
        f"{side}/{name}": value
        for side in training.SIDES
        for file in sorted((pair / side).glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.fixture(scope="module")
def pair(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.train_pair(model, DATA, tmp_path_factory.mktemp("pair") / "tea", SETTINGS)


def test_a_pair_is_a_folder_that_steers(model: str, pair: Path) -> None:
    assert sorted(p.name for p in pair.iterdir()) == ["README.md", "anti_expert", "curve.png", "expert", "pair.json"]
    about = json.loads((pair / "pair.json").read_text())
    assert about["texts"] in (pair / "README.md").read_text()
    for result in about["results"].values():
        assert result["nll_after"] < result["nll_before"]
    llm = LLM(model, {"tea": str(pair)}, dtype="float32")
    params = [SamplingParams(temperature=0.0, max_tokens=8, alpha=alpha, ignore_eos=True) for alpha in (0.0, 9.0)]
    plain, steered = (llm.generate(["w11 w61"], p, use_tqdm=False)[0].outputs[0].token_ids for p in params)
    assert plain != steered


def test_card_says_what_it_must_and_none_of_the_data(pair: Path) -> None:
    card = (pair / "README.md").read_text()
    for word in (
        "invented",
        "CC0",
        "validation NLL before",
        "rank 2",
        "curve.png",
        "Not to be evaluated on TeaSet",
        "on the axis tea,",
        "at most 64 tokens",
        "no guarantee",
    ):
        assert word in card
    assert not any(line in card for line in DATA.expert + DATA.anti_expert)
    assert (pair / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_killed_in_the_middle_it_ends_with_the_same_weights(model: str, pair: Path, tmp_path: Path) -> None:
    files = {}
    for side, content in DATA.sides.items():
        files[side] = tmp_path / f"{side}.txt"
        files[side].write_text("\n".join(content))
    out = tmp_path / "killed"
    flags = [
        "--rank",
        "2",
        "--steps",
        "12",
        "--batch",
        "4",
        "--lr",
        "0.01",
        "--evaluate-every",
        "4",
        "--patience",
        "9",
        "--validation",
        "0.2",
        "--quiet",
    ]
    source = ["--expert", str(files["expert"]), "--anti-expert", str(files["anti_expert"])]
    command = [sys.executable, "-m", "ensemble_decode", "train", str(out), "-m", model, *source, *flags]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    state = out / ".training" / "expert" / "checkpoint-4" / "trainer_state.json"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "pair.json").exists()
    with pytest.raises(ValueError, match="no pair"):
        ExpertPair.from_folder(out)
    with pytest.raises(ValueError, match="begun with another"):
        training.train_pair(model, DATA, out, training.TrainingSettings(rank=3))
    assert main(command[3:]) == 0
    whole, resumed = weights(pair), weights(out)
    assert whole.keys() == resumed.keys()
    assert all(value.equal(resumed[name]) for name, value in whole.items())


FULL = training.TrainingSettings(
    rank=0, steps=40, batch_size=4, learning_rate=0.3, evaluate_every=2, patience=1, validation=0.2
)


@pytest.mark.parametrize(
    "settings",
    [replace(SETTINGS, steps=10, evaluate_every=5), FULL],  # 10 steps end in the middle of an epoch
    ids=["after the last step", "after early stopping"],
)
def test_killed_after_training_and_before_publishing_it_trains_no_further(
    settings: training.TrainingSettings, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    training.train_pair(model, DATA, whole, settings)
    with monkeypatch.context() as patch:
        patch.setattr(training, "_publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            training.train_pair(model, DATA, killed, settings)
    training.train_pair(model, DATA, killed, settings)
    assert all(value.equal(weights(killed)[name]) for name, value in weights(whole).items())
    results = [json.loads((folder / "pair.json").read_text())["results"] for folder in (whole, killed)]
    for side in training.SIDES:
        one, other = ({**result[side], "seconds_of_last_run": None} for result in results)
        assert one == other


def test_full_training_and_early_stopping_keep_the_best_step(model: str, tmp_path: Path) -> None:
    out = training.train_pair(model, DATA, tmp_path / "full", FULL)
    for result in json.loads((out / "pair.json").read_text())["results"].values():
        assert result["best_step"] < result["steps"] < 40
    LLM(model, {"tea": out}, dtype="float32")


def test_half_written_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for step, state in ((4, "{}"), (10, '{"epo')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert training.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_sentence_and_its_counterfactual_stay_together() -> None:
    # Every text twice, with different counterparts: chains of three.
    expert = [f"e{i}" for i in range(40)]
    anti = [f"a{i // 2}" for i in range(40)]
    parts = texts.split(texts.PairTexts(expert, anti, "invented", "CC0"), 0.2, 3)
    held = {line[1:] for line in parts["expert"][1]}
    assert 6 <= len(held) <= 10
    assert {f"a{int(i) // 2}" for i in held} == set(parts["anti_expert"][1])
    assert not set(parts["anti_expert"][0]) & set(parts["anti_expert"][1])


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("rank", -1), ("learning_rate", 0.0), ("validation", 0.9), ("alpha", float("nan"))],
)
def test_settings_out_of_bounds_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is"):
        training.TrainingSettings(**{name: value})


def test_a_text_may_hold_any_line_separator_but_a_newline(tmp_path: Path) -> None:
    told = ["one\u2028still one", "two\u0085still two"]
    plain, objects = tmp_path / "plain.txt", tmp_path / "objects.jsonl"
    plain.write_bytes("\r\n".join(told).encode("utf-8-sig"))
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in told]
    objects.write_bytes("\r\n".join(rows).encode("utf-8-sig"))
    read = texts.from_files(plain, objects)
    assert read.expert == read.anti_expert == told


def test_jsonl_errors_name_the_line_and_not_its_text(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.jsonl"
    good.write_text("one\ntwo\n")
    bad.write_text('{"text": "one"}\n{"words": "secret"}\n')
    with pytest.raises(ValueError, match=r"line 2 is no object") as error:
        texts.from_files(good, bad)
    assert "secret" not in str(error.value)


def test_sources_are_joined_and_keep_which_lines_belong_together() -> None:
    parts = [
        texts.PairTexts(["e1", "e2"], ["a1", "a2"], "one", "CC0", "tea", ("Tea",)),
        texts.PairTexts(["e3", "e4"], ["a3", "a4"], "two", "MIT"),
    ]
    both = texts.joined(parts)
    assert (both.expert, both.anti_expert) == (["e1", "e2", "e3", "e4"], ["a1", "a2", "a3", "a4"])
    assert (both.name, both.licence, both.axis, both.unfit) == ("one; two", "CC0; MIT", "tea", ("Tea",))
    with pytest.raises(ValueError, match="3 and 2 texts"):
        texts.joined([parts[0], texts.PairTexts(["x", "y", "z"], ["x", "y"], "three", "MIT")])
    with pytest.raises(ValueError, match="axes are tea, rain"):
        texts.joined([parts[0], texts.PairTexts(["x", "y"], ["x", "z"], "three", "MIT", "rain")])


def test_a_part_keeps_lines_with_their_counterparts_and_lies_in_a_larger_part() -> None:
    small, large = (texts.part(DATA, share) for share in (0.2, 0.5))
    assert (len(small.expert), len(large.expert)) == (6, 15)
    assert set(small.expert) < set(large.expert)
    assert [line.replace("w5", "w6") for line in small.expert] == small.anti_expert
    with pytest.raises(ValueError, match="share is 0"):
        texts.part(DATA, 0)


def test_two_readings_of_a_line(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("## heading\nTea is {hot|cold} in {May|June}.\nSo is rain.\n")
    both = texts.from_readings(tmp_path / "lines.txt", "tea")
    assert both.expert == ["Tea is cold in June.", "So is rain."]
    assert both.anti_expert == ["Tea is hot in May.", "So is rain."]


@pytest.mark.parametrize(
    ("missing", "flags", "needed"),
    [("accelerate", [], True), ("matplotlib", [], True), ("peft", [], True), ("peft", ["--rank", "0"], False)],
)
def test_what_is_not_installed_is_said_before_anything_is_read(
    missing: str,
    flags: list[str],
    needed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["train", str(tmp_path / "out"), "--expert", "x", "--anti-expert", "y", *flags]) == 2
    said = capsys.readouterr().err
    assert (f"train needs {missing}: pip install 'ensemble_decode[train]'" in said) == needed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "a source is needed"),
        (["--redditbias", "x"], "--axis is None"),
        (["--expert", "x", "--axis", "race"], "a source is needed"),
        (["--redditbias", "x", "--axis", "race", "--swap", "all"], "swap is 'all'"),
    ],
)
def test_the_command_says_what_is_wrong(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_command_goes_on_where_it_was_interrupted_and_ends_with_a_table(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_tokenizer(models.model("llama"), tmp_path / "model", 199)
    for side in training.SIDES:
        (tmp_path / side).write_text("\n".join(lines("w5" if side == "expert" else "w6")))
    sources = ["--expert", str(tmp_path / "expert"), "--anti-expert", str(tmp_path / "anti_expert")]
    command = ["train", str(tmp_path / "out"), "-m", str(model), *sources, "--steps", "2", "--evaluate-every", "2"]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "_publish", interrupted)
        assert main(command) == 130
    assert f"kept in {tmp_path / 'out'}, the same command goes on" in capsys.readouterr().err
    assert main(command) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:2] == ["side", "texts"]
    assert [line.split()[0] for line in table[1:3]] == ["expert", "anti_expert"]
    assert table[-1] == f"{tmp_path / 'out'} is a pair: --pair name={tmp_path / 'out'}"


def test_a_model_that_can_not_be_read_is_one_line_and_begins_nothing(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pickled = with_tokenizer(models.model("llama"), tmp_path / "pickled", 199)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for side in training.SIDES:
        (tmp_path / side).write_text("\n".join(lines("w5")))
    source = ["--expert", str(tmp_path / "expert"), "--anti-expert", str(tmp_path / "anti_expert"), "--quiet"]
    cases = [
        (str(pickled), "pytorch_model.bin is a pickle"),
        ("nobody/nothing", "configuration can't be read"),
        (models.model("llama"), "can't be loaded"),  # it has no tokenizer
    ]
    for model, message in cases:
        assert not (tmp_path / "out").exists()
        capsys.readouterr()
        assert main(["train", str(tmp_path / "out"), "-m", model, *source]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.startswith("ensemble-decode: model ")
        assert said.count("\n") == 1
