"""Runs a ``@triton.jit`` kernel on the CPU through Triton's interpreter, and checks what the stock interpreter does not.

Per call, with no environment variable, beside real compilation in the same process:

* bounds, alignment and uninitialised bytes of every load, store and atomic; int32 overflow; ``tl.device_assert``
* programs in sequence, reversed, shuffled, or switched at every memory operation, so that protocols between programs
  run, and a deadlock is found
* races between programs (``races=True``), by vector clocks
* bytes read, per argument: a claim about the number of passes is then a test
* float32 → bfloat16 rounds to nearest even, as hardware does (Triton 3.9 truncates)
* a product of bfloat16 matrices multiplies their values (Triton 3.9 multiplies their bits, as integers)

It replaces functions of ``triton.runtime.interpreter`` while a launch runs, and was written for Triton 3.9.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import greenlet
import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from .shadow import KernelFault, Memory, Races, active_lanes, nothing_written

__all__ = ["SCHEDULES", "KernelFault", "Traffic", "nothing_written", "run"]

SCHEDULES = ("sequential", "reversed", "shuffled", "preemptive")
_BUILDER = interpreter.interpreter_builder
_PATCHED = (
    "create_masked_load",
    "create_masked_store",
    "create_atomic_rmw",
    "create_atomic_cas",
    "cast_impl",
    "create_splat",
    "create_dot",
    "options",
)
_SEMANTICS = {
    interpreter._ir.MEM_SEMANTIC.ACQUIRE: "acquire",
    interpreter._ir.MEM_SEMANTIC.RELEASE: "release",
    interpreter._ir.MEM_SEMANTIC.RELAXED: "relaxed",
    interpreter._ir.MEM_SEMANTIC.ACQUIRE_RELEASE: "acq_rel",
}


@dataclass
class Traffic:
    """What a launch moved, by argument name, and how often programs were switched."""

    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    atomics: int = 0
    switches: int = 0


def run(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    schedule: str = "sequential",
    order_seed: int = 0,
    races: bool = False,
    uninitialised: tuple | dict[int, np.ndarray] = (),
    max_switches: int = 200_000,
    **kwargs: Any,
) -> Traffic:
    """Launch ``kernel[grid](*args, **kwargs)`` on CPU tensors.

    Parameters
    ----------
    schedule : str
        One of :data:`SCHEDULES`; ``order_seed`` decides the order of the last two.
    races : bool
        Report unordered accesses of two programs to one element, of which one is a write.
    uninitialised : tuple of Tensor
        Arguments that hold nothing yet: reading what the launch has not written is a fault. For several launches, what
        :func:`nothing_written` makes of those tensors, to each of them.
    max_switches : int
        A preemptive run that takes more is taken for a deadlock.

    Raises
    ------
    KernelFault
        What was found, with the program and the argument's name.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}, allowed are {', '.join(SCHEDULES)}")
    function = kernel.fn
    names = list(inspect.signature(function).parameters)
    options = {"num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion"}
    bound = inspect.getcallargs(function, *args, **{k: v for k, v in kwargs.items() if k not in options})
    constexpr = {name for name, kind in inspect.get_annotations(function).items() if "constexpr" in str(kind)}
    values = {name: bound[name] if name in constexpr else interpreter._implicit_cvt(bound[name]) for name in names}
    written = uninitialised if isinstance(uninitialised, dict) else nothing_written(*uninitialised)
    return _Launch(function, values, bound, grid, written, races).execute(schedule, order_seed, max_switches)


class _Launch:
    """One launch: its memory, its programs, and the interpreter's functions with checks around them."""

    def __init__(
        self, function: Callable, values: dict, bound: dict, grid: tuple, written: dict[int, np.ndarray], races: bool
    ) -> None:
        self.function, self.values = function, values
        self.grid = (*grid, 1, 1)[:3]
        x, y, z = self.grid
        self.programs = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]  # as hardware: x fastest
        self.memory = Memory({k: v for k, v in bound.items() if hasattr(v, "data_ptr")}, written)
        self.races = Races(len(self.programs)) if races else None
        self.traffic = Traffic()
        self.current = 0
        self.scheduler: Any = None  # the greenlet to give way to, where programs are preemptive

    # ── the checks ──────────────────────────────────────────────────────────────────────────────────────────────────
    def _access(self, kind: str, pointers: Any, mask: Any) -> np.ndarray:
        if self.scheduler is not None:
            self.scheduler.switch()
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        lanes = active_lanes(pointers, mask)
        window = self.memory.check(kind, lanes, size, self.current)
        if window is None:
            return lanes
        if kind == "load":
            self.traffic.read[window.name] += lanes.size * size
            if self.races:
                self.races.read(self.current, window, lanes, size)
        elif kind == "store":
            self.traffic.written[window.name] += lanes.size * size
            if self.races:
                self.races.write(self.current, window, lanes, size)
        return lanes

    def _load(self, pointers: Any, mask: Any, *rest: Any) -> Any:
        self._access("load", pointers, mask)
        return type(_BUILDER).create_masked_load(_BUILDER, pointers, mask, *rest)

    def _store(self, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        lanes = self._access("store", pointers, mask)
        if lanes.size != np.unique(lanes).size:
            on = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape).ravel()
            stored: dict = {}
            for address, x in zip(
                lanes.tolist(), np.broadcast_to(value.data, pointers.data.shape).ravel()[on].tolist(), strict=True
            ):
                if stored.setdefault(address, x) != x:
                    raise KernelFault(f"program {self.current}: one store writes two values to the same address")
        return type(_BUILDER).create_masked_store(_BUILDER, pointers, value, mask, *rest)

    def _atomic(self, pointers: Any, mask: Any, semantics: Any) -> None:
        lanes = self._access("atomic", pointers, mask)
        self.traffic.atomics += lanes.size
        if self.races:
            self.races.atomic(self.current, lanes, _SEMANTICS[semantics])

    def _atomic_rmw(self, op: Any, pointers: Any, value: Any, mask: Any, semantics: Any, scope: Any) -> Any:
        self._atomic(pointers, mask, semantics)
        return type(_BUILDER).create_atomic_rmw(_BUILDER, op, pointers, value, mask, semantics, scope)

    def _atomic_cas(self, pointers: Any, expected: Any, value: Any, semantics: Any, scope: Any) -> Any:
        self._atomic(pointers, None, semantics)
        return type(_BUILDER).create_atomic_cas(_BUILDER, pointers, expected, value, semantics, scope)

    # ── the programs ────────────────────────────────────────────────────────────────────────────────────────────────
    def execute(self, schedule: str, seed: int, max_switches: int) -> Traffic:
        rng = random.Random(seed)
        with self._patched(), _language_restored(), np.errstate(all="ignore"):
            program = _rewritten(self.function)
            scope = interpreter._patch_lang(_EVERY_NAME)
            try:
                _BUILDER.set_grid_dim(*self.grid)
                if schedule == "preemptive":
                    self._run_preemptive(program, rng, max_switches)
                else:
                    order = list(range(len(self.programs)))
                    if schedule == "reversed":
                        order.reverse()
                    elif schedule == "shuffled":
                        rng.shuffle(order)
                    for self.current in order:
                        _BUILDER.set_grid_idx(*self.programs[self.current])
                        program(**self.values)
            finally:
                scope.restore()
        return self.traffic

    def _run_preemptive(self, program: Callable, rng: random.Random, max_switches: int) -> None:
        self.scheduler = greenlet.getcurrent()
        alive = {i: greenlet.greenlet(lambda: program(**self.values)) for i in range(len(self.programs))}
        while alive:
            self.current = rng.choice(list(alive))
            _BUILDER.set_grid_idx(*self.programs[self.current])
            alive[self.current].switch()
            self.traffic.switches += 1
            if alive[self.current].dead:
                del alive[self.current]
            elif self.traffic.switches > max_switches:
                raise KernelFault(
                    f"no end after {max_switches} switches, programs {sorted(alive)[:8]} still run: deadlock or livelock"
                )

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        missing = object()
        before = {name: _BUILDER.__dict__.get(name, missing) for name in _PATCHED}
        replacements = (self._load, self._store, self._atomic_rmw, self._atomic_cas, _cast, _splat, _dot)
        for name, value in zip(_PATCHED, (*replacements, interpreter.InterpreterOptions(debug=True)), strict=True):
            setattr(_BUILDER, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is missing:
                    delattr(_BUILDER, name)
                else:
                    setattr(_BUILDER, name, value)


def _cast(source: Any, dtype: Any) -> Any:
    if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        bits = source.data.astype(np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
        return interpreter.TensorHandle(
            np.where(np.isnan(source.data), np.uint16(0x7FFF), rounded).astype(np.uint16), dtype.scalar
        )
    return type(_BUILDER).cast_impl(_BUILDER, source, dtype)


def _splat(type_: Any, scalar: Any) -> Any:
    """The stock function gives a comparison of scalars back the type of what was compared."""
    if scalar.data.dtype == np.bool_:
        return interpreter.TensorHandle(np.full(type_.shape, scalar.data.item()), tl.int1)
    return type(_BUILDER).create_splat(_BUILDER, type_, scalar)


def _dot(a: Any, b: Any, *rest: Any) -> Any:
    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)

    return type(_BUILDER).create_dot(_BUILDER, widened(a), widened(b), *rest)


def _rewritten(function: Callable) -> Callable:
    """A kernel or a function it calls, as the interpreter runs it; made once."""
    return (
        interpreter.InterpretedFunction.rewritten_fn.get(function)
        or interpreter.InterpretedFunction(function).rewrite()
    )


# What the stock interpreter patches again for the names each function sees, as many times as one is called; here once, for all.
_EVERY_NAME = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


@contextlib.contextmanager
def _language_restored() -> Iterator[None]:
    """Undoes every patch of ``triton.language``, with which a later compile would fail."""
    candidates = [tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base, tl.dtype, tl.condition]
    candidates += [tl.core.range, tl.core.static_range]
    objects = [x for x in candidates if isinstance(x, (types.ModuleType, type))]
    before = [(x, dict(vars(x))) for x in objects]
    call = JITFunction.__call__
    JITFunction.__call__ = lambda self, *args, **kwargs: _rewritten(self.fn)(*args, **kwargs)
    try:
        yield
    finally:
        JITFunction.__call__ = call
        for x, attributes in before:
            for name in set(vars(x)) - set(attributes):
                delattr(x, name)
            for name, value in attributes.items():
                if vars(x).get(name) is not value:
                    setattr(x, name, value)
