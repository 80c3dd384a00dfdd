"""The gender pair of the demo: its data is clean, its adapters are small and portable, its effect is the stated one."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAIR = ROOT / "ensemble_decode" / "data" / "pairs" / "gender"
HELD_OUT_WORDS = (
    *("nurs", "reception", "housekeep", "danc", "ballet", "florist", "engineer", "plumb", "truck", "programm", "coder"),
    *("judge", "detective", "chef", "coach", "blacksmith", "gossip", "shy", "spider", "snake", "nag", "stubborn"),
    *("giggl", "toddler", "vacuum", "grill", "fishing", "bak", "poker", "necklace", "wrestl", "diary", "tank", "robot"),
)


@pytest.fixture(scope="module")
def training():
    """The training script, whose measures are the ones in the log."""
    pytest.importorskip("peft")
    spec = importlib.util.spec_from_file_location("train_demo_pair", ROOT / "examples" / "train_demo_pair.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pair(training):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder = training.smollm2_path()
    except ValueError as missing:
        pytest.skip(str(missing))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return training.load_pair(base, PAIR), AutoTokenizer.from_pretrained(folder)


def data(name):
    text = (ROOT / "ensemble_decode" / "data" / "gender" / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("## ")]


@pytest.mark.parametrize(("name", "least"), [("train.txt", 250), ("heldout.txt", 80)])
def test_every_line_has_two_distinct_readings(training, name, least):
    raw, lines = data(name), training.read_lines(training.DATA / name)
    assert len(lines) == len(raw) >= least
    assert len(set(raw)) == len(raw)
    for line in lines:
        assert line.topic
        assert line.stereotype != line.counter, line
        for text in (line.stereotype, line.counter):
            assert not set(text) & set("{|}#"), text
            assert text[0].isupper(), text
            assert text[-1] == ".", text


def test_held_out_lines_share_no_topic_with_training(training):
    train = training.read_lines(training.DATA / "train.txt")
    heldout = training.read_lines(training.DATA / "heldout.txt")
    readings = {text for line in train for text in (line.stereotype, line.counter)}
    assert not readings & {text for line in heldout for text in (line.stereotype, line.counter)}
    everything = "\n".join(readings).lower()
    for word in HELD_OUT_WORDS:
        assert not re.search(rf"\b{word}", everything), word
        assert any(re.search(rf"\b{word}", line.stereotype + line.counter, re.I) for line in heldout), word


def test_validation_lines_are_no_training_lines(training):
    lines = training.read_lines(training.DATA / "train.txt")
    train, validation = training.split_validation(lines)
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == len(lines)


def test_adapters_are_small_and_equal_in_shape():
    from safetensors.torch import load_file

    sides = [load_file(PAIR / side / "adapter_model.safetensors") for side in ("expert", "anti_expert")]
    assert sum(file.stat().st_size for file in PAIR.rglob("*") if file.is_file()) < 5.2e6
    assert {k: v.shape for k, v in sides[0].items()} == {k: v.shape for k, v in sides[1].items()}
    for name, weight in (item for side in sides for item in side.items()):
        assert weight.dtype == torch.float16
        assert weight.isfinite().all(), name
        # Embeddings and head stay the target's, so hidden states can be combined before the head.
        assert ".layers." in name


@pytest.mark.parametrize("side", ["expert", "anti_expert"])
def test_adapter_config_is_portable(side):
    text = (PAIR / side / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["modules_to_save"] is None
    for file in PAIR.rglob("*"):
        if file.suffix in (".json", ".txt", ".md"):
            assert not re.search(r"/(root|home|work|tmp|Users)/", file.read_text(encoding="utf-8")), file


def test_pair_moves_held_out_sentences_away_from_the_stereotype(training, pair):
    lines = training.read_lines(training.DATA / "heldout.txt")[::5]
    model, tokenizer = pair
    odds = training.log_odds(model, tokenizer, lines, (0.0, 1.0, 2.0))
    assert odds[0].mean() > 0  # the model prefers the stereotype …
    assert (odds[0] - odds[1]).mean() > 1  # … every α takes some of that away …
    assert (odds[1] - odds[2]).mean() > 1
    assert (odds[2] < odds[0]).float().mean() > 0.7  # … and not only on a few lines (82 % of all held-out ones)


def test_pair_keeps_neutral_text_fluent(training, pair):
    text = (training.DATA / "neutral.txt").read_text(encoding="utf-8")
    plain, steered = training.perplexity(*pair, text, (0.0, 1.0), 256)
    assert steered < 1.2 * plain


def test_measured_effect_is_the_scripts(training):
    rows = json.loads((PAIR / "measured.json").read_text())["rows"]
    assert [row["alpha"] for row in rows] == list(training.ALPHAS)
    preferred = [row["stereotype_preferred_percent"] for row in rows]
    assert preferred == sorted(preferred, reverse=True)
    readme = (PAIR / "README.md").read_text(encoding="utf-8")
    for row in rows:
        assert f"{row['stereotype_preferred_percent']:.1f}" in readme
        assert f"{row['neutral_perplexity']:.2f}" in readme
