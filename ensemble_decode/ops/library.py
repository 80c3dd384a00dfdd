"""Loads the compiled operators (``ensemble_decode/_C.abi3.so``), or says once, loudly, that there are none.

The library defines every operator's schema and its CPU implementation. On CUDA tensors an operator is a Python function
over Triton kernels (``ensemble_decode/kernels``), registered here under the same schema; that of the sampler may choose the
library's CUDA kernels instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_library = Path(__file__).parent.parent / "_C.abi3.so"

#: Whether the C++ operators are loaded. Without them every operator runs its PyTorch reference.
available: bool = _library.exists()

#: Whether Triton is there to compile the kernels for a GPU.
has_triton: bool = find_spec("triton") is not None

#: By operator: the function that serves CUDA tensors.
cuda_implementations: dict[str, Callable[..., Any]] = {}

if available:
    torch.ops.load_library(str(_library))
else:
    warnings.warn(
        f"ensemble_decode: the compiled operators are missing ({_library} not found), everything runs on the slow "
        "PyTorch reference; install a C++ compiler and run `pip install --no-build-isolation .`",
        RuntimeWarning,
        stacklevel=2,
    )


def serves(tensor: Tensor) -> bool:
    """Whether the operators have an implementation for the tensor's device; the reference serves all others."""
    return available and (tensor.is_cpu or (tensor.is_cuda and has_triton))


def packs(tensor: Tensor) -> bool:
    """Whether weights on the tensor's device are kept in the compiled CPU operators' layout."""
    return available and tensor.is_cpu


def capability(tensor: Tensor) -> tuple[int, int] | None:
    """The compute capability of a CUDA tensor's device; None where that is AMD's."""
    return None if torch.version.hip else torch.cuda.get_device_capability(tensor.device)


def on_cuda(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the operator's CUDA implementation; it runs with the first tensor's device current."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def guarded(first: Tensor, *args: Any, **kwargs: Any) -> Any:
            with torch.cuda.device_of(first):  # a launch goes to the current device; nothing where it is not CUDA's
                return function(first, *args, **kwargs)

        cuda_implementations[name] = guarded
        if available:
            torch.library.impl(f"ensemble_decode::{name}", "CUDA")(guarded)
        return guarded

    return register
