"""Global, shared, local, constant and parameter memory, with the checks that a GPU makes or leaves to luck."""

from __future__ import annotations

import collections
import ctypes
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.gpuless.ptxsim.races import Clocks, SharedRaces
from tests.gpuless.ptxsim.values import UNSIGNED, Array, PtxError

# Windows of the generic address space, above every host address.
SHARED, LOCAL, CONSTANT, PARAMETER = (1 << bit for bit in (56, 57, 58, 59))
WINDOW = (1 << 56) - 1
RANK_SHIFT = 24  # a shared::cluster address: (rank + 1) << 24 | offset; one without a rank is the CTA's own


@dataclass(slots=True)
class Segment:
    """A tensor's storage as the kernel may touch it."""

    base: int
    data: np.ndarray
    name: str
    written: np.ndarray | None = None
    accesses: list[tuple[Array, int, Array, bool]] = field(default_factory=list)

    @property
    def end(self) -> int:
        """One past the last byte's address."""
        return self.base + self.data.size


def segment_of(name: str, tensor: Any, written: np.ndarray | None, undefined: bool) -> Segment:
    """The whole storage that a torch tensor or NumPy array lies in (views share it with their padding).

    ``written`` says which bytes an earlier launch has stored to; ``undefined``, that none has.
    """
    if hasattr(tensor, "untyped_storage"):
        storage = tensor.untyped_storage()
        base, size = storage.data_ptr(), storage.nbytes()
    else:
        owner = tensor if tensor.base is None or not isinstance(tensor.base, np.ndarray) else tensor.base
        base, size = owner.ctypes.data, owner.nbytes
    data = np.frombuffer((ctypes.c_uint8 * size).from_address(base), np.uint8) if size else np.zeros(0, np.uint8)
    return Segment(base, data, name, np.zeros(size, bool) if undefined and written is None else written)


class GlobalMemory:
    """The tensors of a launch, in one address space.

    Attributes
    ----------
    loaded, stored : Counter
        Bytes by tensor, each thread's counted.
    sectors : Counter
        Bytes by tensor in whole 32-byte sectors, each counted once per warp and instruction: what the L1 cache asks for.
    """

    def __init__(self, segments: Iterable[Segment], warp: Array, cta: Array, check_races: bool) -> None:
        merged: dict[int, Segment] = {}
        for segment in segments:
            known = merged.get(segment.base)
            if known is None:
                merged[segment.base] = segment
            elif segment.name not in known.name.split("/"):
                known.name += "/" + segment.name
        self.segments = sorted(merged.values(), key=lambda s: s.base)
        self.bases = np.array([s.base for s in self.segments], np.uint64)
        self.ends = np.array([s.end for s in self.segments], np.uint64)
        self.warp, self.cta, self.check_races = warp, cta, check_races
        self.loaded: collections.Counter[str] = collections.Counter()
        self.stored: collections.Counter[str] = collections.Counter()
        self.sectors: collections.Counter[str] = collections.Counter()

    def locate(self, address: Array, size: int, what: str) -> Array:
        """Index of each address's segment; refuses what is outside or misaligned."""
        if not self.segments:
            raise PtxError(f"global {what} in a launch without tensors")
        index = np.maximum(np.searchsorted(self.bases, address, "right").astype(np.int64) - 1, 0)
        bad = (address < self.bases[index]) | (address + np.uint64(size) > self.ends[index])
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            segment = self.segments[index[at]]
            raise PtxError(
                f"out-of-bounds global {what} of {size} bytes at byte {int(address[at]) - segment.base:+d} "
                f"of {segment.name} ({segment.data.size} bytes)"
            )
        off = address % np.uint64(size)
        if off.any():
            at = int(np.flatnonzero(off)[0])
            raise PtxError(
                f"misaligned {size}-byte global {what} in {self.segments[index[at]].name}: address % {size} = {int(off[at])}"
            )
        return index

    def _record(self, segment: Segment, address: Array, size: int, threads: Array, store: bool) -> None:
        (self.stored if store else self.loaded)[segment.name] += size * address.size
        if not store:
            pairs = self.warp[threads].astype(np.int64) << 40 | (
                (address - np.uint64(segment.base)).astype(np.int64) >> 5
            )
            self.sectors[segment.name] += 32 * max(1, size // 32) * np.unique(pairs).size
        if self.check_races:
            segment.accesses.append((address, size, threads, store))

    def load(self, address: Array, dtype: np.dtype, count: int, threads: Array) -> list[Array]:
        """``count`` neighbouring values of ``dtype`` for each address."""
        size = dtype.itemsize
        index = self.locate(address, size * count, "load")
        result = [np.empty(address.size, dtype) for _ in range(count)]
        for i in np.unique(index):
            segment = self.segments[i]
            own = slice(None) if len(self.segments) == 1 or (index == i).all() else index == i
            offset = (address[own] - np.uint64(segment.base)).astype(np.int64)
            if segment.written is not None:
                touched = offset[:, None] + np.arange(size * count)
                if not segment.written[touched].all():
                    raise PtxError(f"load from {segment.name} of bytes that nothing was stored to")
            self._record(segment, address[own], size * count, threads[own], False)
            usable = segment.data[: segment.data.size // size * size].view(dtype)
            for j in range(count):
                result[j][own] = usable[offset // size + j]
        return result

    def store(self, address: Array, values: list[Array], threads: Array) -> None:
        """Store neighbouring values at each address; two threads storing different values at one place are refused."""
        size = values[0].dtype.itemsize
        index = self.locate(address, size * len(values), "store")
        for i in np.unique(index):
            segment = self.segments[i]
            own = index == i
            offset = (address[own] - np.uint64(segment.base)).astype(np.int64)
            self._record(segment, address[own], size * len(values), threads[own], True)
            usable = segment.data[: segment.data.size // size * size].view(UNSIGNED[size])
            for j, value in enumerate(values):
                bits = np.broadcast_to(value, address.shape)[own].view(UNSIGNED[size])
                usable[offset // size + j] = bits
                if (usable[offset // size + j] != bits).any():
                    raise PtxError(
                        f"two threads store different values to one place of {segment.name} in one instruction"
                    )
            if segment.written is not None:
                segment.written[offset[:, None] + np.arange(size * len(values))] = True

    def finish(self) -> None:
        """At the end of the grid: no CTA touched what another one stored (launches have no order among their CTAs)."""
        for segment in self.segments:
            if not any(stored for *_, stored in segment.accesses):
                continue
            places, ctas, stores = [], [], []
            for address, size, threads, stored in segment.accesses:
                place = (address - np.uint64(segment.base)).astype(np.int64)[:, None] + np.arange(size)
                places.append(place.ravel())
                ctas.append(np.repeat(self.cta[threads], size))
                stores.append(np.full(place.size, stored))
            place, cta, store = (np.concatenate(x) for x in (places, ctas, stores))
            first = np.full(segment.data.size, -1)
            first[place[store]] = cta[store]
            if (first[place] >= 0).any() and (cta[first[place] >= 0] != first[place][first[place] >= 0]).any():
                raise PtxError(f"race in global memory: two CTAs touch one place of {segment.name}, one of them stores")


class SharedMemory:
    """The shared memory of all CTAs, with that of the other CTAs of a cluster within reach.

    Parameters
    ----------
    ctas, size, granule : int
        Number of CTAs, bytes of each, bytes of the unit in which races and initialisation are followed.
    cta, warp : of each thread
    per_cluster : CTAs in a cluster
    """

    def __init__(
        self, ctas: int, size: int, granule: int, cta: Array, warp: Array, per_cluster: int, clocks: Clocks
    ) -> None:
        self.size, self.granule, self.per_cluster = size, granule, per_cluster
        self.cta, self.warp = cta, warp
        self.stride = -(-max(size, 1) // 16) * 16
        self.bytes = np.zeros((ctas, self.stride), np.uint8)
        self.written = np.zeros(ctas * self.stride // granule, bool)
        self.races = SharedRaces(clocks, ctas * self.stride // granule, ctas)
        self.exited = np.zeros(ctas, bool)
        self.copied_to = np.zeros(self.written.size, bool)  # by copies that are under way
        self.copies = False
        self.readers = np.zeros(self.written.size, np.int64)  # warps that have not waited for a wgmma which reads it
        self.reads = False
        self.mbarrier = np.zeros(self.written.size, bool)  # a live one lies there
        self.mbarriers = False

    def place(self, address: Array, size: int, threads: Array, what: str, cluster: bool) -> tuple[Array, Array]:
        """(CTA, offset) of each address, after the checks of bounds, alignment and life time."""
        number = address.astype(np.int64)
        rank, offset = (number >> RANK_SHIFT) - 1, number & ((1 << RANK_SHIFT) - 1)
        own = self.cta[threads]
        mapped = rank >= 0
        if mapped.any() and not cluster:
            raise PtxError(f"shared::cta {what} with an address that mapa made: it needs shared::cluster")
        if (rank >= self.per_cluster).any():
            raise PtxError(f"shared::cluster {what} of CTA rank {int(rank.max())} in a cluster of {self.per_cluster}")
        if (offset + size > self.size).any():
            raise PtxError(f"shared-memory {what} out of bounds: {int(offset.max())} + {size} > {self.size} bytes")
        if (offset % size).any():
            raise PtxError(f"misaligned {size}-byte shared-memory {what}")
        cta = np.where(mapped, own // self.per_cluster * self.per_cluster + rank, own)
        far = cta != own
        if far.any():
            if self.exited[cta[far]].any():
                raise PtxError(f"shared-memory {what} of a CTA that has exited")
            self.races.reach(cta[far], self.warp[threads[far]])
        return cta, offset

    def _granules(self, cta: Array, offset: Array, size: int, what: str) -> Array:
        count = max(1, size // self.granule)
        places = ((cta * self.stride + offset) // self.granule)[:, None] + np.arange(count)
        if self.copies and self.copied_to[places].any():
            raise PtxError(f"shared-memory {what} where a cp.async is under way: its thread has not waited for it")
        if self.mbarriers and self.mbarrier[places].any():
            raise PtxError(f"shared-memory {what} of an mbarrier, which is not invalidated")
        if self.reads and what != "load" and self.readers[places].any():
            raise PtxError(f"shared-memory race: {what} where a wgmma may still read: a warp has not waited for it")
        return places

    def load(self, address: Array, dtype: np.dtype, count: int, threads: Array, cluster: bool) -> list[Array]:
        """``count`` neighbouring values for each address."""
        size = dtype.itemsize * count
        cta, offset = self.place(address, size, threads, "load", cluster)
        places = self._granules(cta, offset, size, "load")
        if not self.written[places].all():
            raise PtxError("load of shared memory that nothing was stored to")
        self.races.load(places.ravel(), np.repeat(self.warp[threads], places.shape[1]))
        table = self.bytes.view(dtype)
        return [table[cta, offset // dtype.itemsize + j] for j in range(count)]

    def store(self, address: Array, values: list[Array], threads: Array, cluster: bool) -> Array:
        """Store neighbouring values at each address; gives the granules [addresses, granules of each]."""
        width = values[0].dtype.itemsize
        cta, offset = self.place(address, width * len(values), threads, "store", cluster)
        places = self._granules(cta, offset, width * len(values), "store")
        table = self.bytes.view(UNSIGNED[width])
        bits = np.stack([np.broadcast_to(v, address.shape).view(UNSIGNED[width]) for v in values], 1)
        columns = (offset // width)[:, None] + np.arange(len(values))
        changed = (table[cta[:, None], columns] != bits).any(1) | ~self.written[places].all(1)
        per_thread = places.shape[1]
        self.races.store(places.ravel(), np.repeat(self.warp[threads], per_thread), np.repeat(changed, per_thread))
        table[cta[:, None], columns] = bits
        self.written[places] = True
        if (table[cta[:, None], columns] != bits).any():
            raise PtxError("shared-memory race: two threads store different values to one place in one instruction")
        return places

    def begin_copy(self, address: Array, values: list[Array], threads: Array) -> Array:
        """A store that may happen at any time from now on; nobody may touch its granules, which it gives, until it ends."""
        places = self.store(address, values, threads, cluster=False)
        if np.unique(places).size < places.size:
            raise PtxError("cp.async: two threads copy to one place of shared memory")
        self.copies = self.copied_to[places] = True
        return places

    def end_copy(self, places: Array, threads: Array) -> None:
        """It has happened by now: to other warps it is a store of this moment."""
        self.copied_to[places] = False
        self.races.stored(places.ravel(), np.repeat(self.warp[threads], places.shape[1]))

    def read_asynchronously(self, chunks: Array, cta: Array, warps: Array) -> tuple[Array, Array]:
        """A matrix product's load of chunks of 16 bytes, in the asynchronous proxy.

        Parameters
        ----------
        chunks : offsets [matrices, lines, chunks of a line]
        cta, warps : [matrices] and [matrices, warps of each], which load all of it

        Returns
        -------
        words [matrices, lines, 4 × chunks of a line], granules of each warp [warps of all matrices, granules]
        """
        if (chunks + 16 > self.size).any():
            raise PtxError(f"shared memory of a product out of bounds: {int(chunks.max())} + 16 > {self.size} bytes")
        where = np.broadcast_to(cta[:, None, None], chunks.shape)
        places = self._granules(where.ravel(), chunks.ravel(), 16, "load")
        if not self.written[places].all():
            raise PtxError("product of shared memory that nothing was stored to")
        places = places.reshape(len(chunks), 1, -1).repeat(warps.shape[1], 1).reshape(warps.size, -1)
        self.races.load_asynchronously(places.ravel(), np.repeat(warps.ravel(), places.shape[1]))
        words = self.bytes.view(np.uint32)[where[..., None], chunks[..., None] // 4 + np.arange(4)]
        return words.reshape(*chunks.shape[:2], -1), places

    def begin_read(self, places: Array) -> None:
        """Warps load these granules [warps, granules] at any time from now on; nobody may store to them until it ends."""
        self.readers += np.bincount(places.ravel(), minlength=self.readers.size)
        self.reads = True

    def end_read(self, places: Array, warps: Array) -> None:
        """These warps [warps] have waited for their loads of the granules [warps, granules]: loads of this moment."""
        self.readers -= np.bincount(places.ravel(), minlength=self.readers.size)
        self.races.load(places.ravel(), np.repeat(warps, places.shape[1]))

    def atomic(self, address: Array, size: int, threads: Array, cluster: bool) -> tuple[np.ndarray, Array]:
        """A flat table of ``size``-byte words and each address's index in it, checked and recorded as an atomic."""
        cta, offset = self.place(address, size, threads, "atomic", cluster)
        places = self._granules(cta, offset, size, "atomic")
        if not self.written[places].all():
            raise PtxError("atomic on shared memory that nothing was stored to")
        changes = np.ones(places.size, bool)
        self.races.store(places.ravel(), np.repeat(self.warp[threads], places.shape[1]), changes, atomic=True)
        return self.bytes.reshape(-1).view(UNSIGNED[size]), (cta * self.stride + offset) // size
