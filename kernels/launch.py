"""A kernel launch as plain data: what a host function decides, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, its arguments by name, and the compiler's options.

    The same data is launched on a GPU, interpreted on a CPU, or compiled for a device that isn't there.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)
