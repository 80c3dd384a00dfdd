"""How many threads the operators of the calling thread may use."""

from __future__ import annotations

import torch

from . import library


def num_threads() -> int:
    """Threads that operators called from this thread may use."""
    return torch.ops.ensemble_decode.num_threads() if library.available else torch.get_num_threads()


def set_num_threads(count: int) -> None:
    """Set them, for the calling thread only. Results never depend on it."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"set_num_threads: count is {count!r}, allowed is 1 or more")
    if library.available:
        torch.ops.ensemble_decode.set_num_threads(count)
