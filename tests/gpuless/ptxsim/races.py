"""Happens-before in the shared memory of a cluster: vector clocks, one per warp (FastTrack, Flanagan and Freund 2009)."""

from __future__ import annotations

import numpy as np

from tests.gpuless.ptxsim.values import Array, PtxError

NOBODY, MANY = -1, -2


class Clocks:
    """What each warp knows of the other warps of its cluster.

    ``known[w, x]`` is the last moment of warp x (its number within the cluster) that is ordered before what warp w (its
    number within the grid) does now. A warp's own moment advances whenever it releases. ``published`` says the same of
    what a proxy fence lies behind: the asynchronous proxy (wgmma) sees no other stores.

    Parameters
    ----------
    ctas, warps_per_cta, ctas_per_cluster : int
    """

    def __init__(self, ctas: int, warps_per_cta: int, ctas_per_cluster: int) -> None:
        self.per_cta = warps_per_cta
        self.per_cluster = warps_per_cta * ctas_per_cluster
        total = ctas * warps_per_cta
        self.local = np.arange(total) % self.per_cluster
        self.both = np.zeros((total, 2 * self.per_cluster), np.int32)  # what passes from warp to warp
        self.known, self.published = self.both[:, : self.per_cluster], self.both[:, self.per_cluster :]
        self.known[np.arange(total), self.local] = 1
        self.fenced = self.both.copy()
        self.arrived = np.zeros((ctas // ctas_per_cluster, 2 * self.per_cluster), np.int32)
        self.completed = self.arrived.copy()
        self.met = np.zeros(total, bool)

    def now(self, warps: Array) -> Array:
        """The present moment of these warps."""
        return self.known[warps, self.local[warps]]

    def _advance(self, warps: Array) -> None:
        self.known[warps, self.local[warps]] += 1

    def join(self, warps: Array) -> None:
        """A CTA barrier: everybody learns what anybody knows."""
        self.both[warps] = self.both[warps].max(0)
        self._advance(warps)

    def fence(self, warps: Array) -> None:
        """A fence: later relaxed arrivals publish what was known and done here."""
        self.fenced[warps] = self.both[warps]
        self._advance(warps)

    def publish(self, warps: Array) -> None:
        """A proxy fence: the asynchronous proxy sees what was known and done here, if the access comes after the fence."""
        self.published[warps] = self.known[warps]
        self._advance(warps)

    def learn(self, warp: int, known: Array) -> None:
        """An acquiring wait: what was published comes to be known."""
        np.maximum(self.both[warp], known, out=self.both[warp])

    def follow(self, warps: Array, others: Array) -> None:
        """Each of these warps goes on where the other one is, which told it to."""
        self.both[warps] = np.maximum(self.both[warps], self.both[others])
        self._advance(others)

    def release(self, warps: Array) -> Array:
        """What these warps know and have done, for others to learn."""
        known = self.both[warps]
        self._advance(warps)
        return known

    def arrive(self, warps: Array, release: bool) -> None:
        """Arrival at the cluster barrier; ``relaxed`` publishes only what a fence covered."""
        cluster = warps // self.per_cluster
        np.maximum.at(self.arrived, cluster, (self.both if release else self.fenced)[warps])
        self._advance(warps)

    def complete(self, cluster: int) -> None:
        """Everybody has arrived."""
        self.completed[cluster] = self.arrived[cluster]
        self.arrived[cluster] = 0

    def acquire(self, warps: Array) -> None:
        """Past the wait of the cluster barrier: the other CTAs exist, and what they released is visible."""
        self.both[warps] = np.maximum(self.both[warps], self.completed[warps // self.per_cluster])
        self.met[warps] = True


class SharedRaces:
    """Who last wrote and who read each granule of a memory, and whether the next access is ordered after them.

    Two unordered stores of the same value are harmless, as compute-sanitizer's racecheck has it; Triton makes them.
    """

    def __init__(self, clocks: Clocks, granules: int, ctas: int, memory: str = "shared-memory") -> None:
        self.clocks, self.memory = clocks, memory
        self.writer = np.full(granules, NOBODY, np.int32)
        self.written_at = np.zeros(granules, np.int32)
        self.atomic = np.zeros(granules, bool)
        self.reader = np.full(granules, NOBODY, np.int32)
        self.read_at = np.zeros(granules, np.int32)
        self.row = np.full(granules, -1, np.int32)
        self.rows = np.zeros((64, clocks.per_cluster), np.int32)
        self.used = 0
        self.remote = np.zeros((ctas, clocks.per_cluster), np.int32)

    def _after_write(self, place: Array, warp: Array) -> Array:
        """Is the last write of these places ordered before these warps' present?"""
        writer = self.writer[place]
        own = self.clocks.local[warp]
        return (writer < 0) | (writer == own) | (self.clocks.known[warp, writer] >= self.written_at[place])

    def _after_reads(self, place: Array, warp: Array) -> Array:
        reader = self.reader[place]
        own = self.clocks.local[warp]
        ordered = (reader < 0) | (reader == own) | (self.clocks.known[warp, reader] >= self.read_at[place])
        many = np.flatnonzero(reader == MANY)
        if many.size:
            seen = self.rows[self.row[place[many]]]
            seen[np.arange(many.size), own[many]] = 0
            ordered[many] = (seen <= self.clocks.known[warp[many]]).all(1)
        return ordered

    def _pool(self, place: Array) -> None:
        """Give these granules a row with a moment per warp, as more than one warp has read them."""
        fresh = np.unique(place[self.reader[place] != MANY])
        new = fresh[self.row[fresh] < 0]
        while self.used + new.size > len(self.rows):
            self.rows = np.concatenate([self.rows, np.zeros((max(64, len(self.rows)), self.rows.shape[1]), np.int32)])
        self.row[new] = np.arange(self.used, self.used + new.size)
        self.used += new.size
        self.rows[self.row[fresh]] = 0
        single = fresh[self.reader[fresh] >= 0]
        self.rows[self.row[single], self.reader[single]] = self.read_at[single]
        self.reader[fresh] = MANY

    def load(self, place: Array, warp: Array) -> None:
        """Check and record a load of granules ``place`` by ``warp`` (both one-dimensional)."""
        if not self._after_write(place, warp).all():
            raise PtxError(f"{self.memory} race: load of a word that another warp wrote, no barrier between")
        own, now = self.clocks.local[warp], self.clocks.now(warp)
        alone = (self.reader[place] != MANY) & self._after_reads(place, warp)
        before = self.reader[place[alone]], self.read_at[place[alone]]
        self.reader[place[alone]], self.read_at[place[alone]] = own[alone], now[alone]
        clash = self.reader[place[alone]] != own[alone]
        if clash.any():  # several warps in this very instruction
            again = np.flatnonzero(alone)[clash]
            shared = np.isin(place[alone], place[again])
            self.reader[place[alone]], self.read_at[place[alone]] = before
            alone[np.flatnonzero(alone)[shared]] = False
        rest = ~alone
        if rest.any():
            self._pool(place[rest])
            self.rows[self.row[place[rest]], own[rest]] = now[rest]

    def load_asynchronously(self, place: Array, warp: Array) -> None:
        """Check a load by the asynchronous proxy that these warps begin; it counts as theirs when they have waited for it."""
        if not self._after_write(place, warp).all():
            raise PtxError(f"{self.memory} race: a product of a word that another warp wrote, no barrier between")
        writer = self.writer[place]
        if not ((writer < 0) | (self.clocks.published[warp, writer] >= self.written_at[place])).all():
            raise PtxError("product of shared memory that was stored to, no fence.proxy.async between")

    def store(self, place: Array, warp: Array, changes: Array, atomic: bool = False) -> None:
        """Check and record a store; ``changes`` says where the value differs from what is there."""
        conflict = ~self._after_write(place, warp) & changes
        if atomic:
            conflict &= ~self.atomic[place]
        if conflict.any():
            raise PtxError(f"{self.memory} race: store to a word that another warp wrote, no barrier between")
        if not self._after_reads(place, warp).all():
            raise PtxError(f"{self.memory} race: store to a word that another warp read, no barrier between")
        self.stored(place, warp)
        self.atomic[place] = atomic
        self.reader[place] = NOBODY

    def stored(self, place: Array, warp: Array) -> None:
        """Record that the last store to these granules was made by ``warp``, now."""
        self.writer[place], self.written_at[place] = self.clocks.local[warp], self.clocks.now(warp)

    def reach(self, cta: Array, warp: Array) -> None:
        """An access to another CTA's shared memory: that CTA must have begun, and must not end before it."""
        if not self.clocks.met[warp].all():
            raise PtxError("access to the shared memory of a CTA that may not have begun: no cluster barrier before it")
        self.remote[cta, self.clocks.local[warp]] = self.clocks.now(warp)

    def finish(self) -> None:
        """At the end of the grid: was every remote access ordered before its CTA ended?"""
        per_cta = self.clocks.per_cta
        for cta, warp in zip(*np.nonzero(self.remote), strict=True):
            if (self.clocks.known[cta * per_cta : (cta + 1) * per_cta, warp] < self.remote[cta, warp]).all():
                raise PtxError(
                    f"CTA {cta} may end before warp {warp % per_cta} of CTA {warp // per_cta} of its cluster has "
                    "accessed its shared memory: no cluster barrier after the access"
                )
