"""Small random models of many families, made once a session and loaded by the engine from safetensors like any other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING as CONFIGS
from transformers import AutoModelForCausalLM

# Workers that run tests side by side (pytest -n) have a core each: teams of threads would only wait for one another's cores.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
# The models here are tiny: threads would only wait for one another.
torch.set_num_threads(1)

VOCAB = 199  # odd on purpose

_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

#: name → (model type, configuration)
FAMILIES: dict[str, tuple[str, dict]] = {
    "gpt2": ("gpt2", _GPT2),
    "llama": ("llama", _LLAMA),
    "llama-tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "llama-biased": ("llama", {**_LLAMA, "attention_bias": True}),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": None}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen2-tied": ("qwen2", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 16}),
    "gemma": ("gemma", {**_LLAMA, "head_dim": 16, "num_key_value_heads": 1}),
    "gpt_neox": ("gpt_neox", {**{k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}, "rotary_pct": 0.5}),
    "opt": (
        "opt",
        {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "word_embed_proj_dim": 48,
            "ffn_dim": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "phi": ("phi", {**_LLAMA, "num_key_value_heads": 6}),
    "olmo": ("olmo", _LLAMA),
    "starcoder2": ("starcoder2", {**_LLAMA, "sliding_window": None}),
}


def make_model(name: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random model whose logits are far enough apart that greedy text is not a coin toss."""
    kind, config = FAMILIES[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**{**config, **changes}), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


class Models:
    """Folders of small models and adapters, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def model(self, name: str, seed: int = 0, **changes: object) -> str:
        tag = "-".join(f"{key}{value}" for key, value in changes.items())
        folder = self.root / f"{name}-{seed}-{tag}"
        if not folder.exists():
            make_model(name, seed, **changes).save_pretrained(folder)
        return str(folder)

    def adapter(self, name: str, seed: int, rank: int = 4) -> str:
        """A LoRA adapter with random, not zero, up projections over ``model(name)``."""
        folder = self.root / f"{name}-adapter-{seed}-{rank}"
        if not folder.exists():
            model = AutoModelForCausalLM.from_pretrained(self.model(name))
            torch.manual_seed(seed)
            targets = (
                ["c_attn", "c_proj", "c_fc"]
                if name == "gpt2"
                else ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
            )
            peft = get_peft_model(
                model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, fan_in_fan_out=name == "gpt2")
            )
            with torch.no_grad():
                for key, parameter in peft.named_parameters():
                    if "lora_B" in key:
                        parameter.normal_(0, 0.08)
            peft.save_pretrained(folder)
        return str(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))
