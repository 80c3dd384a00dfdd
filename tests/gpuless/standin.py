"""A stand-in for a GPU: on CPU tensors, the operators' CUDA implementations with every Triton kernel interpreted.

Inside :func:`standing_in` the dispatcher's CPU key holds what the CUDA key holds, so a call takes the same way as on a GPU:
schema, dispatch, the host code that plans the launches, the kernels. Only hardware and compiler are left out.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from ensemble_decode.ops import library

from .interp import Traffic, run


@contextmanager
def interpreted(**options: Any) -> Iterator[Counter[str]]:
    """Launches of Triton kernels run in the checking interpreter; ``options`` go to :func:`~.interp.run`.

    Gives a counter that fills with the number of launches by kernel, and with "kernel.argument" for the bytes read.
    """
    seen: Counter[str] = Counter()

    def launch(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool = False, **kwargs: Any) -> None:
        name = kernel.fn.__name__
        traffic: Traffic = run(kernel, grid, *args, **options, **kwargs)
        seen[name] += 1
        seen.update({f"{name}.{argument}": size for argument, size in traffic.read.items()})

    before = JITFunction.run
    JITFunction.run = launch
    try:
        yield seen
    finally:
        JITFunction.run = before


@contextmanager
def standing_in(**options: Any) -> Iterator[Counter[str]]:
    """CPU tensors count as CUDA tensors for every operator that has a CUDA implementation in Python."""
    overrides = torch.library.Library("ensemble_decode", "IMPL")
    packs = library.packs
    with interpreted(**options) as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says of every override that it is one
        for name, implementation in library.cuda_implementations.items():
            overrides.impl(name, implementation, "CPU", allow_override=True)
        library.packs = lambda tensor: False  # type: ignore[assignment]
        try:
            yield seen
        finally:
            library.packs = packs  # type: ignore[assignment]
            overrides._destroy()
