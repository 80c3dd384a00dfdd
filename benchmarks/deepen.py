"""A depth-expanded SmolLM2: the same function, more blocks; a stand-in for a large target.

    python benchmarks/deepen.py --factor 8 --noise 0          # prints the folder, in the cache

After every block come ``factor`` − 1 more, whose attention and MLP are that block's own but for the two projections that
write into the residual stream. At noise 0 those are zero, so the model computes what the small one does, at ``factor``
times the cost. At noise s they are Gaussian with s times the standard deviation of the block's own, so the model departs
from the small one little by little. Nothing it writes is a result about quality.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ensemble_decode.models.smollm2 import cache_dir, publish, smollm2_path

#: What a block adds to the residual stream goes through these.
OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def deepen(source: Path, folder: Path, factor: int, noise: float, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the model of ``source``, ``factor`` times as deep, into ``folder``.

    Parameters
    ----------
    source, folder : Path
        A Llama-like model as safetensors, and an existing folder.
    factor : int
        Blocks of the new model for each of the old, 1 or more.
    noise : float
        Standard deviation of the added blocks' output projections, as a share of the block's own; 0 or more.
    dtype : torch.dtype
        Of the new file.

    Raises
    ------
    ValueError
        ``factor`` or ``noise`` out of range, or blocks that lack the two output projections.
    """
    if factor < 1:
        raise ValueError(f"deepen: factor is {factor!r}, allowed is 1 or more")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"deepen: noise is {noise!r}, allowed is 0 or more")
    small = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers *= factor
    config.dtype = dtype
    if getattr(config, "layer_types", None):
        config.layer_types = [kind for kind in config.layer_types for _ in range(factor)]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for name, value in small.state_dict().items():
        if not name.startswith("model.layers."):
            state[name] = value
    for block, layer in enumerate(small.model.layers):
        own = layer.state_dict()
        if missing := [name for name in OUTPUTS if name not in own]:
            raise ValueError(f"deepen: blocks of {source} have no {missing[0]}, a Llama-like model is needed")
        for copy in range(factor):
            for name, value in own.items():
                added = value
                if copy and name in OUTPUTS:
                    deviation = noise * value.float().std()
                    added = (torch.randn(value.shape, generator=generator) * deviation).to(dtype)
                # A tensor of its own: safetensors would otherwise find shared memory.
                state[f"model.layers.{block * factor + copy}.{name}"] = added.clone()
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    if unset := [name for name, value in model.named_parameters() if value.is_meta]:
        raise ValueError(f"deepen: {unset[0]} of the new model has no counterpart in {source}")
    model.generation_config = small.generation_config
    model.save_pretrained(folder)
    for file in source.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "vocab", "merges", "chat_template")):
            shutil.copy(file, folder / file.name)


def deepened_path(factor: int = 8, noise: float = 0.0) -> Path:
    """Folder with a deeper SmolLM2-135M-Instruct in bf16 (1.8 GB at factor 8), made on the first call."""
    folder = cache_dir() / f"smollm2-deep-{factor}x-noise-{noise:g}"
    if not folder.is_dir():
        source = smollm2_path()
        publish(folder, lambda partial: deepen(source, partial, factor, noise))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=int, default=8, help="times as many blocks (default 8)")
    parser.add_argument("--noise", type=float, default=0.0, help="size of the added blocks' outputs (default 0)")
    args = parser.parse_args()
    print(deepened_path(args.factor, args.noise))


if __name__ == "__main__":
    main()
