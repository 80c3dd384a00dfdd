"""Loads the compiled operators (``ensemble_decode/_C.abi3.so``), or says once, loudly, that there are none."""

import warnings
from pathlib import Path

import torch

_library = Path(__file__).parent.parent / "_C.abi3.so"

#: Whether the C++ operators are loaded. Without them every operator runs its PyTorch reference.
available: bool = _library.exists()

if available:
    torch.ops.load_library(str(_library))
else:
    warnings.warn(
        f"ensemble_decode: the compiled operators are missing ({_library} not found), everything runs on the slow "
        "PyTorch reference; install a C++ compiler and run `pip install --no-build-isolation .`",
        RuntimeWarning,
        stacklevel=2,
    )
