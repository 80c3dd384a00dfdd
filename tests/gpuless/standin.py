"""A stand-in for a GPU: on CPU tensors, the operators' CUDA implementations with every Triton kernel interpreted.

Inside :func:`standing_in` the dispatcher's CPU key holds what the CUDA key holds, so a call takes the same way as on a GPU:
schema, dispatch, the host code that plans the launches, the kernels. Only hardware and compiler are left out.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from ensemble_decode.ops import library

from ..ops.sampling_cases import Case
from . import cuda_cases
from .interp import Traffic, run


@dataclass(frozen=True)
class Planned:
    """A launch that was asked for: kernel, grid, arguments by name, and the compiler's options."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@contextmanager
def planned() -> Iterator[list[Planned]]:
    """Launches are written down and not made: host code can run on tensors that have no data, as fake CUDA tensors."""
    launches: list[Planned] = []

    def note(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool = False, **kwargs: Any) -> None:
        names = kernel.arg_names
        options = {key: value for key, value in kwargs.items() if key not in names}
        arguments = {**dict(zip(names, args, strict=False)), **{k: v for k, v in kwargs.items() if k in names}}
        launches.append(Planned(kernel, grid, arguments, options))

    before = JITFunction.run
    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run = before


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
def memory_starts_as_nan() -> Iterator[None]:
    """``torch.empty`` gives NaN: a result that comes from a workspace nobody wrote shows."""
    filling: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        filling.fill_uninitialized_memory = before[1]


@contextmanager
def standing_in(capability: tuple[int, int] = (8, 0), **options: Any) -> Iterator[Counter[str]]:
    """CPU tensors count as CUDA tensors, of a device of ``capability``, for every operator with a CUDA implementation."""
    overrides = torch.library.Library("ensemble_decode", "IMPL")
    packs, of_device = library.packs, library.capability
    with interpreted(**options) as seen, memory_starts_as_nan(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says of every override that it is one
        for name, implementation in library.cuda_implementations.items():
            overrides.impl(name, implementation, "CPU", allow_override=True)
        library.packs = lambda tensor: False  # type: ignore[assignment]
        library.capability = lambda tensor: capability  # type: ignore[assignment]
        try:
            yield seen
        finally:
            library.packs, library.capability = packs, of_device  # type: ignore[assignment]
            overrides._destroy()


@contextmanager
def cuda_source_standing_in(program: Path) -> Iterator[Counter[str]]:
    """``ensemble_sample_cuda`` on CPU tensors runs csrc/cuda as ``program`` (:func:`.cuda_cases.build`); counts calls."""
    overrides = torch.library.Library("ensemble_decode", "IMPL")
    seen: Counter[str] = Counter()

    def call(*arguments: Any) -> tuple[torch.Tensor, ...]:
        *tensors, nucleus_target, target_is_combined = arguments
        case = Case(*tensors, "target" if nucleus_target else "combined", target_is_combined)  # type: ignore[call-arg]
        seen["ensemble_sample_cuda"] += 1
        return tuple(x.clone() for x in cuda_cases.run(program, [case])[0])  # of memory of their own

    overrides.impl("ensemble_sample_cuda", call, "CPU")
    try:
        yield seen
    finally:
        overrides._destroy()
