"""What the checking interpreter knows about memory: legal windows, what was written, and who touched what before whom."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor


class KernelFault(Exception):
    """A kernel did what a GPU would not forgive."""


def span_bytes(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + last) * tensor.element_size()


def nothing_written(*tensors: Tensor) -> dict[int, np.ndarray]:
    """Which bytes of tensors that the host left empty have been written, by address. Launches that share it go on from it."""
    return {tensor.data_ptr(): np.zeros(span_bytes(tensor), dtype=bool) for tensor in tensors}


@dataclass
class Window:
    """The bytes of one tensor argument: from its first element to its last."""

    name: str
    tensor: Tensor
    start: int
    end: int
    written: np.ndarray | None = None  # bool per byte; None where the tensor was initialised by the host
    # Races: who wrote each element last (-1: nobody), at which of its own times, and who has read what since.
    writer: np.ndarray | None = None
    write_time: np.ndarray | None = None
    reads: dict[tuple[int, int], list[np.ndarray]] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, tensor: Tensor, written: np.ndarray | None) -> Window:
        start = tensor.data_ptr()
        return cls(name, tensor, start, start + span_bytes(tensor), written)

    def cells(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Indices of the tensor's elements that ``size`` bytes at each address touch."""
        width = self.tensor.element_size()
        first = (addresses.astype(np.int64) - self.start) // width
        return first if size <= width else (first[:, None] + np.arange(size // width)).ravel()


class Memory:
    """All tensors of a launch. Every access is checked for bounds, alignment and uninitialised bytes."""

    def __init__(self, tensors: dict[str, Tensor], written: dict[int, np.ndarray]) -> None:
        self.windows = [Window.of(name, tensor, written.get(tensor.data_ptr())) for name, tensor in tensors.items()]

    def check(self, kind: str, addresses: np.ndarray, size: int, program: int) -> Window | None:
        """The window that the active lanes of one access lie in; None where no lane is active."""
        if not addresses.size:
            return None
        low, high = int(addresses.min()), int(addresses.max()) + size
        window = next((w for w in self.windows if w.start <= low and high <= w.end), None)
        if window is None:
            self._report(kind, addresses, size, program)
        assert window is not None
        if (addresses % np.uint64(size)).any():
            raise KernelFault(f"program {program}: misaligned {kind} of {size} bytes in {window.name}")
        if window.written is not None:
            at = (addresses.astype(np.int64) - window.start)[:, None] + np.arange(size)
            if kind == "store":
                window.written[at] = True
            elif not window.written[at].all():
                raise KernelFault(f"program {program}: read of uninitialised bytes of {window.name}")
        return window

    def _report(self, kind: str, addresses: np.ndarray, size: int, program: int) -> None:
        for address in map(int, addresses):
            if not any(w.start <= address and address + size <= w.end for w in self.windows):
                near = min(self.windows, key=lambda w: min(abs(address - w.start), abs(address - w.end)))
                raise KernelFault(
                    f"program {program}: out-of-bounds {kind} of {size} bytes, {address - near.start:+d} bytes from the "
                    f"start of {near.name} ({near.end - near.start} bytes long)"
                )
        raise KernelFault(f"program {program}: one {kind} touches more than one tensor")


class Races:
    """Happens-before between programs by vector clocks: release and acquire order, relaxed atomics order nothing."""

    def __init__(self, programs: int) -> None:
        self.clocks: list[dict[int, int]] = [{i: 1} for i in range(programs)]
        self.released: dict[int, dict[int, int]] = {}

    def read(self, me: int, window: Window, addresses: np.ndarray, size: int) -> None:
        cells = window.cells(addresses, size)
        if window.writer is not None:
            self._ordered_after_writes(me, window, cells, "reads")
        window.reads.setdefault((me, self.clocks[me][me]), []).append(cells)

    def write(self, me: int, window: Window, addresses: np.ndarray, size: int) -> None:
        cells = window.cells(addresses, size)
        if window.writer is None or window.write_time is None:
            width = window.tensor.element_size()
            window.writer = np.full((window.end - window.start) // width, -1, dtype=np.int64)
            window.write_time = np.zeros_like(window.writer)
        self._ordered_after_writes(me, window, cells, "writes")
        for (reader, time), earlier in window.reads.items():
            unordered = reader != me and self.clocks[me].get(reader, 0) < time
            if unordered and any(np.isin(cells, other).any() for other in earlier):
                raise KernelFault(f"race: program {me} writes {window.name} while program {reader} reads it")
        window.writer[cells], window.write_time[cells] = me, self.clocks[me][me]

    def _ordered_after_writes(self, me: int, window: Window, cells: np.ndarray, verb: str) -> None:
        assert window.writer is not None
        assert window.write_time is not None
        writers, times = window.writer[cells], window.write_time[cells]
        for writer in set(writers.tolist()) - {-1, me}:
            if times[writers == writer].max() > self.clocks[me].get(writer, 0):
                raise KernelFault(
                    f"race: program {me} {verb} {window.name}, written by program {writer} with no release and acquire between"
                )

    def atomic(self, me: int, addresses: np.ndarray, semantics: str) -> None:
        mine = self.clocks[me]
        for address in map(int, addresses):
            published = self.released.setdefault(address, {})
            if semantics in ("acquire", "acq_rel"):
                for program, time in published.items():
                    mine[program] = max(mine.get(program, 0), time)
            if semantics in ("release", "acq_rel"):
                for program, time in mine.items():
                    published[program] = max(published.get(program, 0), time)
        if semantics in ("release", "acq_rel"):
            mine[me] += 1


def active_lanes(pointers: Any, mask: Any) -> np.ndarray:
    """Addresses of the lanes that a mask leaves on."""
    lanes = pointers.data.ravel()
    return lanes if mask is None else lanes[np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape).ravel()]
