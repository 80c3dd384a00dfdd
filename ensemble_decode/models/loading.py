"""Loading a causal language model with transformers, and refusing in one line what can't be served."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ensemble_decode.models.attention import ATTENTION
from ensemble_decode.ops import library

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
#: How weights are kept: as they are (None), or as int8 with a scale for each output channel.
Quantization = Literal["int8"]
QUANTIZATIONS: tuple[Quantization | None, ...] = (None, "int8")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def resolve_dtype(dtype: str | torch.dtype, device: torch.device | None = None) -> torch.dtype:
    """``"auto"`` is bfloat16 where the device multiplies it natively (a CPU with AVX512-BF16 or AMX, a GPU since 2020).

    Elsewhere it is float32 on a CPU and float16 on a GPU.
    """
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    if dtype == "auto" and device is not None and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if dtype == "auto":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise ValueError(f"dtype is {dtype!r}, allowed are 'auto', {', '.join(map(repr, _DTYPES))} or the torch dtypes")


def resolve_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is the first GPU where there is one, else the CPU.

    Raises
    ------
    ValueError
        Another kind of device, or a GPU where torch or Triton sees none.
    """
    usable = torch.cuda.device_count() if library.available and library.has_triton and torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda", 0) if usable else torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = torch.device("meta")
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type == "cuda" and (resolved.index or 0) < usable:
        return torch.device("cuda", resolved.index or 0)
    allowed = ["'auto'", "'cpu'", *(f"'cuda:{index}'" for index in range(usable))]
    raise ValueError(f"device is {str(device)!r}, allowed are {', '.join(allowed)}{_why_no_gpu(resolved, usable)}")


def _why_no_gpu(device: torch.device, usable: int) -> str:
    if device.type != "cuda" or usable:
        return ""
    if not torch.cuda.is_available():
        return f" (torch {torch.__version__} sees no GPU)"
    return " (Triton is not installed)" if library.available else " (the compiled operators are missing)"


def check_quantization(quantization: Quantization | None, device: torch.device) -> None:
    """Refuse a kind of quantization that is not known, or not served on ``device``."""
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization is {quantization!r}, allowed are {', '.join(map(repr, QUANTIZATIONS))}")
    if quantization is not None and device.type != "cpu":
        raise ValueError(f"quantization is {quantization!r}, on {device} None is allowed (int8 weights are for a CPU)")


def check_checkpoint(path: str) -> None:
    """Refuse a folder without intact safetensors. A hub id (not a folder) is left to transformers."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or os.path.isabs(path) or path.startswith("."):
            raise ValueError(f"model is {path!r}: no such folder; a hub id or a folder with safetensors is allowed")
        return
    if not (folder / "config.json").exists():
        raise ValueError(f"model {path!r}: config.json is missing")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"model {path!r}: {index.name} is damaged: it has no weight_map of files") from None
    else:
        files = sorted(p.name for p in folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"model {path!r}: {pickles[0]} is a pickle, which can run code when opened; only safetensors are read: "
                "convert it with `AutoModelForCausalLM.from_pretrained(path, use_safetensors=False)"
                ".save_pretrained(new_path)` where you trust it"
            )
        raise ValueError(f"model {path!r}: no *.safetensors file in it")
    for name in files:
        file = folder / name
        if not file.exists():
            raise ValueError(f"model {path!r}: {name} is missing, the index names {len(files)} files")
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"model {path!r}: {name} is damaged or truncated ({error})") from None


def check_servable(config: PretrainedConfig, path: str, max_model_len: int | None) -> None:
    """Refuse, with the reason, what is not a causal LM with full attention."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model {path!r}: {kind} is an encoder-decoder, only decoder-only causal LMs are served")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model {path!r}: {kind} has no causal LM in transformers {_transformers_version()}")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    kinds = set(getattr(config, "layer_types", None) or [])
    other = kinds - {"full_attention", "sliding_attention"}
    if other:
        raise ValueError(f"model {path!r}: {kind} has layers of type {sorted(other)}, only full attention is served")
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds or (not kinds and getattr(config, "use_sliding_window", True))
    if window and slides and (max_model_len is None or max_model_len > window):
        raise ValueError(
            f"model {path!r}: {kind} slides its attention over {window} tokens, which is served only up to that length: "
            f"max_model_len is {max_model_len}, allowed is 1 … {window}"
        )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type") == "longrope":
        # transformers takes the factors of the longest sequence of a forward for all of them: text would depend on company.
        short: int = (
            rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", 0) or 0
        )
        if max_model_len is None or max_model_len > short:
            raise ValueError(
                f"model {path!r}: {kind} stretches its positions beyond {short} tokens (longrope), which is served only up to "
                f"that length: max_model_len is {max_model_len}, allowed is 1 … {short}"
            )
    if not getattr(model_class, "_supports_attention_backend", False):
        raise ValueError(
            f"model {path!r}: {kind}'s modelling code has its own attention (no AttentionInterface), it can't be served"
        )


def _transformers_version() -> str:
    import transformers

    return transformers.__version__


def load_config(path: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {path!r}: its configuration can't be read ({_first_line(error)})") from error


def load_model(
    path: str, dtype: torch.dtype, max_model_len: int | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a causal LM in eval mode on ``device``, with this package's attention chosen.

    Raises
    ------
    ValueError
        Missing, damaged or pickled weights; a model that can't be served. One line, naming the path and the reason.
    """
    check_checkpoint(path)
    config = load_config(path)
    check_servable(config, path, max_model_len)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(f"model {path!r}: its weights can't be loaded ({_first_line(error)})") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"model {path!r}: {len(missing)} weights are missing, the first is {missing[0]}")
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(path: str) -> Any | None:
    """The model's tokenizer, or None where the folder has none (requests must then be token ids)."""
    folder = Path(path)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if folder.is_dir() and not any((folder / name).exists() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {path!r}: its tokenizer can't be read ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
