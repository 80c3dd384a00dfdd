"""The tensor memory of sm_100: 128 lanes of 512 words a CTA, given out by columns, with the checks of shared memory."""

from __future__ import annotations

import numpy as np

from tests.gpuless.ptxsim.races import Clocks, SharedRaces
from tests.gpuless.ptxsim.values import Array, PtxError

LANES, COLUMNS = 128, 512


class TensorMemory:
    """The tensor memory of all CTAs of a launch; a cell is one word, numbered through all CTAs.

    ``tcgen05.ld`` and ``tcgen05.st`` go on until their warp waits: meanwhile nobody stores where it loads, nor touches where
    it stores.
    """

    def __init__(self, ctas: int, clocks: Clocks) -> None:
        cells = ctas * LANES * COLUMNS
        self.words = np.zeros(cells, np.uint32)
        self.written = np.zeros(cells, bool)
        self.races = SharedRaces(clocks, cells, ctas, "tensor-memory")
        self.storing = np.zeros(cells, bool)
        self.loading = np.zeros(cells, bool)
        self.owned = np.zeros((ctas, COLUMNS), bool)
        self.blocks: dict[tuple[int, int], int] = {}  # columns, by CTA and first column
        self.closed = np.zeros(ctas, bool)

    def allocate(self, cta: int, columns: int) -> int:
        """The first of ``columns`` columns, the last ones that are free: an address that is taken to be 0 is outside."""
        if self.closed[cta]:
            raise PtxError("tcgen05.alloc after relinquish_alloc_permit")
        if columns not in (32, 64, 128, 256, 512):
            raise PtxError(f"tcgen05.alloc of {columns} columns: it must be a power of two from 32 to 512")
        for first in range(COLUMNS - columns, -1, -columns):
            if not self.owned[cta, first : first + columns].any():
                self.owned[cta, first : first + columns] = True
                self.blocks[cta, first] = columns
                return first
        raise PtxError(f"tcgen05.alloc of {columns} columns, which are not free: it would wait")

    def free(self, cta: int, first: int, columns: int, warp: int) -> None:
        """Give columns back, whatever was done there being ordered before it."""
        if self.blocks.pop((cta, first), None) != columns:
            raise PtxError(f"tcgen05.dealloc of {columns} columns at {first}, which were not allocated so")
        cells = self.cells(np.array([cta]), np.arange(LANES)[:, None], np.arange(first, first + columns)).ravel()
        self._change(cells, np.full(cells.size, warp))
        self.written[cells] = False
        self.owned[cta, first : first + columns] = False

    def cells(self, cta: Array, lane: Array, column: Array) -> Array:
        """Numbers of cells, the three broadcast together, after the check that their columns are allocated."""
        cta, lane, column = np.broadcast_arrays(cta, lane, column)
        if (column >= COLUMNS).any() or (lane >= LANES).any() or not self.owned[cta, column].all():
            raise PtxError(f"tensor memory at lane {int(lane.max())}, column {int(column.max())}: not allocated")
        return (cta * LANES + lane) * COLUMNS + column

    def _change(self, cells: Array, warp: Array) -> None:
        if self.storing[cells].any() or self.loading[cells].any():
            raise PtxError("store to tensor memory where a tcgen05.ld or tcgen05.st is under way: no wait for it")
        self.races.store(cells, warp, np.ones(cells.size, bool))

    def load(self, cells: Array, warp: Array) -> Array:
        """The words of cells, loaded by these warps (both one-dimensional)."""
        if self.storing[cells].any():
            raise PtxError("load of tensor memory where a tcgen05.st is under way: no wait for it")
        if not self.written[cells].all():
            raise PtxError("load of tensor memory that nothing was stored to")
        self.races.load(cells, warp)
        return self.words[cells]

    def store(self, cells: Array, words: Array, warp: Array) -> None:
        """Store words to cells (all one-dimensional)."""
        self._change(cells, warp)
        self.words[cells] = words
        self.written[cells] = True

    def wait(self, cells: Array, warp: Array, load: bool) -> None:
        """What these warps began is over: to others it is an access of this moment."""
        if load:
            self.loading[cells] = False
            self.races.load(cells, warp)
        else:
            self.storing[cells] = False
            self.races.stored(cells, warp)

    def finish(self) -> None:
        """At the end of the grid."""
        if self.blocks:
            raise PtxError(f"CTA {min(self.blocks)[0]} ends without tcgen05.dealloc")
