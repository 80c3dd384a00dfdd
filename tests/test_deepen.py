"""The depth-expanded target computes what it claims to."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def deepen() -> ModuleType:
    file = Path(__file__).parents[1] / "benchmarks" / "deepen.py"
    spec = importlib.util.spec_from_file_location("deepen", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("small")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(1, 25).reshape(2, 12)).logits


def deeper(deepen: ModuleType, small: Path, folder: Path, noise: float) -> Path:
    folder.mkdir()
    deepen.deepen(small, folder, 4, noise, torch.float32)
    return folder


def test_without_noise_the_logits_are_the_small_models(deepen: ModuleType, small: Path, tmp_path: Path) -> None:
    folder = deeper(deepen, small, tmp_path / "deep", 0.0)
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 8
    torch.testing.assert_close(logits(folder), logits(small), rtol=0, atol=0)


def test_noise_changes_them_in_proportion(deepen: ModuleType, small: Path, tmp_path: Path) -> None:
    plain = logits(small)
    changes = [
        (logits(deeper(deepen, small, tmp_path / str(noise), noise)) - plain).norm().item()
        for noise in (0.01, 0.02, 0.04)
    ]
    assert changes[0] > 0
    assert changes[1] / changes[0] == pytest.approx(2, rel=0.1)
    assert changes[2] / changes[1] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(("factor", "noise", "named"), [(0, 0.0, "factor is 0"), (2, -0.5, "noise is -0.5")])
def test_what_is_not_allowed_is_named(
    deepen: ModuleType, small: Path, tmp_path: Path, factor: int, noise: float, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        deepen.deepen(small, tmp_path, factor, noise)
