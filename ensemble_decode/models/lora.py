"""LoRA adapters in PEFT's format: read, checked, and put into packed linears."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ensemble_decode import ops
from ensemble_decode.models.fast import FusedLayers, PackedLinear, packed_linears

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def is_adapter(path: str) -> bool:
    return (Path(path) / CONFIG).exists()


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter: for each module path, A [r, K] and B [N, r] with the scale folded into B."""

    path: str
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def rank(self) -> int:
        return max(a.shape[0] for a, _ in self.weights.values())


def load_adapter(path: str) -> Adapter:
    """Read a PEFT LoRA folder.

    Raises
    ------
    ValueError
        A file that is missing or damaged, or a kind of adapter that changes more than linears' outputs.
    """
    folder = Path(path)
    if not (folder / WEIGHTS).exists():
        pickle = (
            " (adapter_model.bin is a pickle: save it with safe_serialization=True)"
            if (folder / "adapter_model.bin").exists()
            else ""
        )
        raise ValueError(f"adapter {path!r}: {WEIGHTS} is missing{pickle}")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"adapter {path!r}: {CONFIG} is damaged ({error})") from None
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"adapter {path!r}: peft_type is {kind!r}, allowed is 'LORA'")
    for key, plain in (
        ("use_dora", False),
        ("bias", "none"),
        ("modules_to_save", None),
        ("layer_replication", None),
        ("trainable_token_indices", None),
    ):
        if (value := config.get(key)) and value != plain:
            raise ValueError(f"adapter {path!r}: {key} is {value!r}, allowed is {plain!r}")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"adapter {path!r}: {WEIGHTS} is damaged or truncated ({error})") from None
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            if key.endswith(".lora_B.weight"):
                continue
            raise ValueError(f"adapter {path!r}: tensor {key!r} is not a LoRA factor of a linear")
        module = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        b = tensors.get(key.replace("lora_A", "lora_B"))
        if b is None:
            raise ValueError(f"adapter {path!r}: {WEIGHTS} lacks lora_B of {module!r}")
        weights[module] = (a, b * _scale(config, module, a.shape[0]))
    if not weights:
        raise ValueError(f"adapter {path!r}: {WEIGHTS} holds no LoRA factor")
    return Adapter(path, weights)


def _scale(config: dict, module: str, rank: int) -> float:
    # The first pattern that fits, as in PEFT: a regular expression for the name or for its end after a dot.
    patterns = (config.get("alpha_pattern") or {}).items()
    fitting = (value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = next(fitting, config.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def put_adapters(decoder: torch.nn.Module, adapters: list[Adapter]) -> None:
    """Stack ``adapters`` (index = position) into the packed linears of ``decoder``; ranks are padded with zeros.

    Raises
    ------
    ValueError
        An adapter names a module that the model does not have, or factors of another shape.
    """
    if not adapters:
        return
    rank = max(adapter.rank for adapter in adapters)
    placed: list[set[str]] = [set() for _ in adapters]
    for linear in packed_linears(decoder):
        _put(linear, adapters, rank, placed)
    for module in decoder.modules():
        if isinstance(module, FusedLayers):
            module.collect_lora()
    for adapter, names in zip(adapters, placed, strict=True):
        if rest := sorted(set(adapter.weights) - names):
            raise ValueError(
                f"adapter {adapter.path!r}: {len(rest)} modules do not fit the base model, the first is {rest[0]}"
            )


def _put(linear: PackedLinear, adapters: list[Adapter], rank: int, placed: list[set[str]]) -> None:
    if not any(name in adapter.weights for adapter in adapters for name in linear.names):
        return
    count, parts = len(adapters), len(linear.segments)
    a_all = linear.packed.new_zeros(count, parts * rank, linear.in_features, dtype=linear.dtype)
    b_all = linear.packed.new_zeros(count, linear.out_features, rank, dtype=linear.dtype)
    for index, adapter in enumerate(adapters):
        start = 0
        for part, (name, width) in enumerate(zip(linear.names, linear.segments, strict=True)):
            if name in adapter.weights:
                a, b = adapter.weights[name]
                if a.shape[1] != linear.in_features or b.shape[0] != width:
                    raise ValueError(
                        f"adapter {adapter.path!r}: {name} is {b.shape[0]}×{a.shape[1]}, the base model's is {width}×{linear.in_features}"
                    )
                a_all[index, part * rank : part * rank + a.shape[0]] = a
                b_all[index, start : start + width, : b.shape[1]] = b
                placed[index].add(name)
            start += width
    linear.lora_a, linear.lora_b = ops.pack_lora(a_all, b_all)
