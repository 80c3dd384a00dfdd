"""The machine: launches a kernel, chooses which threads go next, and keeps the counts."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tests.gpuless.ptxsim import arithmetic, convert
from tests.gpuless.ptxsim.access import Accesses, parameter_block
from tests.gpuless.ptxsim.barriers import AT_BARRIER, AT_CLUSTER, EXITED, RUNNING, Barriers
from tests.gpuless.ptxsim.copies import Copies
from tests.gpuless.ptxsim.matrix import Matrices
from tests.gpuless.ptxsim.mbarrier import MBarriers
from tests.gpuless.ptxsim.memory import GlobalMemory, SharedMemory, segment_of
from tests.gpuless.ptxsim.parser import Instruction, Kernel
from tests.gpuless.ptxsim.races import Clocks
from tests.gpuless.ptxsim.registers import Registers, Selection
from tests.gpuless.ptxsim.tcgen05 import Tcgen05
from tests.gpuless.ptxsim.values import FLOATS, NUMPY, Array, PtxError
from tests.gpuless.ptxsim.warp import WarpInstructions
from tests.gpuless.ptxsim.wgmma import Wgmma

# Largest relative errors of the approximations, from the PTX manual (lg2: near 1 an absolute one). It has none for matrix
# products: 4 units in the last place of the sum of the terms' magnitudes is more than was found of an A100's (Fasi et al. 2021).
_ERROR = {"ex2": 2**-22, "lg2": 2**-22, "rcp": 2**-23, "sqrt": 2**-23, "rsqrt": 2**-22.9, "div": 2**-22, "mma": 2**-21}
_NO_EFFECT = frozenset(("griddepcontrol", "prefetch", "prefetchu", "nanosleep", "applypriority", "discard"))
_APPROXIMATE = frozenset(("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"))
# Whose decoders look at all modifiers themselves.
_KNOW_THEIR_MODIFIERS = frozenset(("ldmatrix", "stmatrix", "mma", "cp", "wgmma", "mbarrier", "tcgen05"))
# Modifiers that are understood, or that change nothing here; an instruction with any other is refused.
_MODIFIERS = set(
    """
    global shared local param const shared::cta shared::cluster cluster gpu sys cta to nc ca cg cs lu cv wt volatile weak
    relaxed acquire release acq_rel sc L1::evict_last L1::evict_first L1::no_allocate L1::evict_unchanged L2::128B L2::256B
    L2::evict_first L2::evict_last L2::cache_hint v2 v4 v8 rn rz rzi rni rmi rpi ftz sat approx full relu NaN abs lo hi wide
    wrap l r shiftamt sync bfly up down idx all any uni ballot add min max and or xor exch cas inc dec lt le gt ge eq ne ls
    hs ltu leu gtu geu equ neu num nan arrive wait aligned red popc warp launch_dependents rna tf32
    """.split()  # noqa: SIM905
)

Decoder = Callable[[Instruction], arithmetic.Execute]


def _triple(value: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*value, 1, 1)[:3]
    return int(x), int(y), int(z)


def _noise(value: Array, salt: np.uint64) -> Array:
    """A number from -1 to 1 for each float64, by SplitMix64's mixing (Steele, Lea and Flood 2014) of its bits and a salt."""
    bits = value.view(np.uint64) + salt
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return (bits ^ (bits >> np.uint64(31))) * 2.0**-63 - 1


def _refuse_call(ins: Instruction) -> arithmetic.Execute:
    asserted = "__assertfail" in ins.text
    raise PtxError("device-side assert" if asserted else f"call of a function: not simulated ({ins.text})")


class Machine:
    """One launch of a kernel.

    Threads run in basic blocks. Among those that can run, the ones whose block has the lowest rank (flow.py) go first:
    others wait for them where paths come together, as a warp's threads do on a GPU.

    Parameters
    ----------
    kernel : Kernel
    grid : CTAs in x, y, z, as in CUDA (Triton's grid times ``num_ctas``)
    block : threads; the kernel's ``.reqntid`` if not given
    cluster : CTAs of a cluster; the kernel's ``.reqnctapercluster`` if not given
    shared_bytes : dynamic shared memory
    tensors : (name, tensor) pairs that the kernel may touch
    scratch : names of tensors whose content is undefined until the kernel stores to it
    written : by name of a tensor, which of its bytes an earlier launch has stored to
    withheld : by name of a tensor, how many bytes at its end the kernel must not touch
    arguments : in the order of the kernel's parameters
    order : "together": all CTAs in step; "random": CTAs take turns by chance
    approximate : add a random error to ex2, lg2 and others, within the PTX manual's bound
    steps : basic blocks after which the launch is taken to hang

    Attributes
    ----------
    instructions : Counter
        Executed instructions by name, one for each warp that executed it.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        arguments: Sequence[Any],
        *,
        block: Sequence[int] | None = None,
        cluster: Sequence[int] | None = None,
        shared_bytes: int = 0,
        tensors: Iterable[tuple[str, Any]] = (),
        scratch: Iterable[str] = (),
        written: Mapping[str, np.ndarray] | None = None,
        withheld: Mapping[str, int] | None = None,
        order: str = "together",
        approximate: bool = False,
        seed: int = 0,
        steps: int = 1_000_000,
    ) -> None:
        shape = block or kernel.threads
        if shape is None:
            raise PtxError(f"{kernel.name} has no .reqntid: pass block")
        self.kernel, self.order, self.approximate, self.steps = kernel, order, approximate, steps
        self.rng = np.random.default_rng(seed)
        self.salts = self.rng.integers(0, 2**64, 2, np.uint64)
        self.grid, self.block = _triple(grid), _triple(shape)
        self.cluster = _triple(cluster or kernel.cluster or (1,))
        if any(g % c for g, c in zip(self.grid, self.cluster, strict=True)):
            raise PtxError(f"a grid of {self.grid} is no multiple of the cluster {self.cluster}")
        per_cta, ctas, per_cluster = (int(np.prod(v)) for v in (self.block, self.grid, self.cluster))
        if per_cluster > 16:
            raise PtxError(
                f"a cluster of {per_cluster} CTAs: at most 16, and more than 8 only where the launch allows it"
            )
        self.threads = np.arange(per_cta * ctas)
        cta, thread = self.threads // per_cta, self.threads % per_cta
        tensor_cores = any(i.base == "tcgen05" for i in kernel.code)
        warps = -(-per_cta // 32) + tensor_cores  # which count as a warp without threads
        self.warp, self.cta = cta * warps + thread // 32, cta
        special = self._special(cta, thread)
        special["%dynamic_smem_size"] = np.full(self.threads.size, shared_bytes, np.uint32)
        special["%total_smem_size"] = special["%dynamic_smem_size"] + np.uint32(kernel.static_shared)
        self.registers = Registers(kernel, special, self.threads.size)
        clocks = Clocks(ctas, warps, per_cluster)
        self.clocks = clocks
        undefined = set(scratch)
        ordering = (i for i in kernel.code if "proxy" not in i.parts)
        orderless = not any(i.base in ("atom", "red", "fence", "membar") for i in ordering)
        known = written or {}
        segments = [segment_of(name, tensor, known.get(name), name in undefined) for name, tensor in tensors]
        for segment in segments:
            segment.data = segment.data[: segment.data.size - (withheld or {}).get(segment.name, 0)]
        self.memory = GlobalMemory(segments, self.warp, cta, check_races=orderless)
        size = shared_bytes + kernel.static_shared
        self.shared = SharedMemory(ctas, size, kernel.granule, cta, self.warp, per_cluster, clocks)
        self.barriers = Barriers(self.registers, self.warp, ctas, per_cluster, clocks)
        block_of_parameters = parameter_block(kernel.parameters, list(arguments))
        self.accesses = Accesses(self.registers, self.memory, self.shared, block_of_parameters, self.rng)
        self.lanes = WarpInstructions(self.registers, self.warp, thread % 32)
        perturb = self._perturb if approximate else None
        self.matrices = Matrices(self.registers, self.shared, thread % 32, perturb)
        self.wgmma = Wgmma(self.registers, self.shared, thread, perturb)
        self.mbarriers = MBarriers(self.registers, self.shared)
        self.tcgen05 = Tcgen05(self.registers, self.shared, self.mbarriers, thread, perturb) if tensor_cores else None
        self.copies = Copies(self.registers, self.memory, self.shared)
        self.decoders = self._decoders()
        self.decoded: dict[int, arithmetic.Execute] = {}
        self.instructions: collections.Counter[str] = collections.Counter()
        self.executed = np.zeros(len(kernel.code), np.int64)
        self.rank = np.full(len(kernel.code) + 1, len(kernel.code))
        self.rank[list(kernel.rank)] = list(kernel.rank.values())

    def _special(self, cta: Array, thread: Array) -> dict[str, Array]:
        """The special registers that are known before the launch."""
        (bx, by, _), (gx, gy, _), (cx, cy, cz) = self.block, self.grid, self.cluster
        grid_place = (cta % gx, cta // gx % gy, cta // (gx * gy))
        thread_place = (thread % bx, thread // bx % by, thread // (bx * by))
        in_cluster = [p % c for p, c in zip(grid_place, self.cluster, strict=True)]
        lane = (thread % 32).astype(np.int64)
        bit = np.int64(1) << lane
        values: dict[str, Array | int] = {
            "%laneid": lane,
            "%warpid": thread // 32,
            "%nwarpid": -(-int(np.prod(self.block)) // 32),
            "%cluster_ctarank": in_cluster[0] + cx * (in_cluster[1] + cy * in_cluster[2]),
            "%cluster_nctarank": cx * cy * cz,
            "%lanemask_eq": bit,
            "%lanemask_lt": bit - 1,
            "%lanemask_le": 2 * bit - 1,
            "%lanemask_gt": 0xFFFFFFFF ^ (2 * bit - 1),
            "%lanemask_ge": 0xFFFFFFFF ^ (bit - 1),
            "%smid": cta,
        }
        for i, axis in enumerate("xyz"):
            values[f"%tid.{axis}"], values[f"%ntid.{axis}"] = thread_place[i], self.block[i]
            values[f"%ctaid.{axis}"], values[f"%nctaid.{axis}"] = grid_place[i], self.grid[i]
            values[f"%cluster_ctaid.{axis}"], values[f"%cluster_nctaid.{axis}"] = in_cluster[i], self.cluster[i]
            values[f"%clusterid.{axis}"] = grid_place[i] // self.cluster[i]
            values[f"%nclusterid.{axis}"] = self.grid[i] // self.cluster[i]
        result = {n: np.broadcast_to(np.asarray(v).astype(np.uint32), cta.shape) for n, v in values.items()}
        if self._numbered_by_rows():
            return result
        raise PtxError(f"a cluster of {self.cluster} in a grid of {self.grid}: only clusters along x are simulated")

    def _numbered_by_rows(self) -> bool:
        """Do the CTAs of a cluster follow one another in number?"""
        return self.cluster[1:] == (1, 1)

    def _perturb(self, value: Array, name: str) -> Array:
        """``value`` with an error by chance, but the same for equal values: threads that compute the same agree on a GPU."""
        if not self.approximate:
            return value
        wide = value.astype(np.float64)
        error, absolute = (_noise(wide, salt) for salt in self.salts)
        error, absolute = error * _ERROR.get(name, 2**-21), absolute * (2**-22 if name == "lg2" else 0)
        return (wide * (1 + error) + absolute).astype(value.dtype)

    def _decoders(self) -> dict[str, Decoder]:
        """By an instruction's first word, what makes it a function of the threads that execute it; arithmetic is not in it."""
        own = {
            "ldmatrix": self.matrices.load,
            "stmatrix": self.matrices.store,
            "mma": self.matrices.multiply,
            "cp": self.copies.decode,
            "wgmma": self.wgmma.decode,
            "mbarrier": self.mbarriers.decode,
            **({} if self.tcgen05 is None else {"tcgen05": self.tcgen05.decode}),
        }
        assert own.keys() <= _KNOW_THEIR_MODIFIERS
        by_registers = {
            "mov": convert.move,
            "selp": convert.select,
            "cvt": convert.convert,
            "cvta": convert.change_space,
            "setp": arithmetic.comparison,
            "set": arithmetic.comparison,
        }
        return {
            **own,
            **{name: functools.partial(decode, self.registers) for name, decode in by_registers.items()},
            "mapa": functools.partial(convert.map_shared, self.registers, per_cluster=int(np.prod(self.cluster))),
            "ld": self.accesses.load,
            "ldu": self.accesses.load,
            "st": self.accesses.store,
            "atom": self.accesses.atomic,
            "red": self.accesses.atomic,
            "shfl": self.lanes.shuffle,
            "redux": self.lanes.reduce,
            "vote": self.lanes.vote,
            "match": self.lanes.match,
            "elect": self.lanes.active,
            "activemask": self.lanes.active,
            "bar": self.lanes.synchronise,
            "fence": lambda ins: self._fence,
            "membar": lambda ins: self._fence,
            "call": _refuse_call,
            **dict.fromkeys(_NO_EFFECT, lambda ins: lambda sel: None),
            **dict.fromkeys(_APPROXIMATE, lambda ins: arithmetic.transcendental(self.registers, ins, self._perturb)),
        }

    def _decode(self, ins: Instruction) -> arithmetic.Execute:
        """An instruction as a function of the threads that execute it."""
        if ins.name in ("fence.proxy.async", "fence.proxy.async.shared::cta"):
            return self._publish
        if ins.base not in _KNOW_THEIR_MODIFIERS:
            unknown = [p for p in ins.parts[1:] if p not in _MODIFIERS and p not in NUMPY]
            if unknown:
                raise PtxError(f"{ins.name}: the modifier .{unknown[0]} is not simulated")
        if ins.base in self.decoders:
            return self.decoders[ins.base](ins)
        if ins.kind in FLOATS:
            return arithmetic.float_arithmetic(self.registers, ins, self._perturb)
        return arithmetic.integer_arithmetic(self.registers, ins)

    def _fence(self, sel: Selection) -> None:
        self.clocks.fence(np.unique(self.warp[sel.threads]))

    def _publish(self, sel: Selection) -> None:
        """fence.proxy.async; one that some lanes of a warp do not execute says nothing of their stores, and is not counted."""
        warps, lanes = np.unique(self.warp[sel.threads], return_counts=True)
        self.clocks.publish(warps[lanes == 32])

    def _execute(self, index: int, sel: Selection) -> None:
        if index not in self.decoded:
            self.decoded[index] = self._decode(self.kernel.code[index])
        self.decoded[index](sel)
        self.executed[index] += sel.warps

    def _select(self, threads: Array) -> Selection:
        whole = threads.size == self.threads.size
        warp = self.warp[threads]
        return Selection(threads, slice(None) if whole else threads, int(np.count_nonzero(warp[1:] != warp[:-1])) + 1)

    def run(self) -> Machine:
        """Execute until every thread has exited.

        Raises
        ------
        PtxError
            What the checks found, with the instruction, thread and CTA.
        """
        state, place = self.barriers.state, np.zeros(self.threads.size, np.int64)
        with np.errstate(all="ignore"):
            for step in range(self.steps):
                running = np.flatnonzero(state == RUNNING)
                if not running.size:
                    break
                if self.order == "random" or step % 64 == 63:
                    chosen = self.rng.choice(np.unique(self.cta[running]))
                    running = running[self.cta[running] == chosen]
                at = place[running]
                first = int(at[self.rank[at].argmin()])
                self._block(first, self._select(running[at == first]), place)
            else:
                raise PtxError(f"no end after {self.steps} basic blocks: a spin or a livelock")
        waiting = int(((state == AT_BARRIER) | (state == AT_CLUSTER)).sum())
        if waiting:
            raise PtxError(f"barrier deadlock: {waiting} threads wait, {int((state == EXITED).sum())} have exited")
        self.shared.races.finish()
        self.memory.finish()
        if self.tcgen05 is not None:
            self.tcgen05.memory.finish()
        for index, times in enumerate(self.executed):
            if times:
                self.instructions[self.kernel.code[index].name] += int(times)
        return self

    def _block(self, start: int, sel: Selection, place: Array) -> None:
        """Execute one basic block for the selected threads."""
        if start >= len(self.kernel.code):
            self._leave(sel.threads)
            return
        end = self.kernel.block_end[start]
        for index in range(start, end):
            ins = self.kernel.code[index]
            active = sel
            try:
                if ins.guard is not None:
                    holds = self.registers.predicate(("!" if ins.negated else "") + ins.guard)(sel)
                    active = sel if holds.all() else self._select(sel.threads[np.broadcast_to(holds, (sel.size,))])
                if not self._control(ins, index, sel, active, place):
                    if active.size:
                        self._execute(index, active)
                    continue
                return
            except PtxError as error:
                first = int(active.threads[0]) if active.size else -1
                per_cta = self.barriers.per_cta
                where = f"at '{ins.text}', CTA {first // per_cta}, thread {first % per_cta}"
                raise PtxError(f"{error} [{where}]") from None
        place[sel.index] = end

    def _control(self, ins: Instruction, index: int, sel: Selection, active: Selection, place: Array) -> bool:
        """Branches, exits and barriers: moves the threads on and says True; False for all other instructions."""
        base = ins.base
        if base not in ("bra", "brx", "ret", "exit", "trap", "bar", "barrier") or "warp" in ins.parts:
            return False
        place[sel.index] = index + 1
        if not active.size:
            return True
        self.executed[index] += active.warps
        if base == "bra":
            place[active.index] = self.kernel.labels[ins.operands[0]]
        elif base == "brx":
            targets = [self.kernel.labels[t] for t in self.kernel.tables[ins.operands[1]]]
            place[active.index] = np.array(targets)[self.registers.reader(ins.operands[0], "u32")(active)]
        elif base in ("ret", "exit"):
            self._leave(active.threads)
        elif base == "trap":
            raise PtxError("trap: a device-side assert")
        elif "arrive" in ins.parts and "cluster" in ins.parts:
            self.barriers.cluster_arrive(ins, active)
        elif "cluster" in ins.parts:
            self.barriers.cluster_wait(ins, active)
        else:
            self.barriers.arrive(ins, index, active)
        return True

    def _leave(self, threads: Array) -> None:
        self.barriers.leave(threads)
        alive = np.bincount(self.cta[self.barriers.state != EXITED], minlength=self.shared.exited.size)
        self.shared.exited[:] = alive == 0


def launch(
    ptx: str | Kernel, grid: Sequence[int], arguments: Sequence[Any], *, names: Sequence[str] = (), **options: Any
) -> Machine:
    """Run a kernel to its end.

    Parameters
    ----------
    ptx : str or Kernel
    grid : CTAs in x, y, z
    arguments : tensors (by address) and numbers; parameters behind them (Triton's scratch pointers) are 0
    names : of the tensors among the arguments, in their order, for messages and counts
    options : of `Machine`
    """
    kernel = ptx if isinstance(ptx, Kernel) else Kernel(ptx)
    tensors = [a for a in arguments if hasattr(a, "data_ptr") or isinstance(a, np.ndarray)]
    named = [(names[i] if i < len(names) else f"tensor {i}", t) for i, t in enumerate(tensors)]
    named += list(options.pop("tensors", ()))
    filled = [*arguments, *[0] * (len(kernel.parameters) - len(arguments))]
    return Machine(kernel, grid, filled, tensors=named, **options).run()
