"""Runs the launches of the Triton kernels, compiled to PTX, in the simulator."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ensemble_decode.ops import EnsembleSample
from tests.gpuless.aot import compile_call, is_compiled_in
from tests.gpuless.ptxsim import Kernel, Machine, launch
from tests.gpuless.triton_sample import launches
from tests.ops.sampling_cases import Case


def tensors_of(call: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors among a launch's arguments, by name."""
    return [(name, value) for name, value in call.arguments.items() if isinstance(value, torch.Tensor)]


parsed = functools.lru_cache(maxsize=256)(Kernel)


def run_launch(call: Any, arch: int, edit: Callable[[str], str] | None = None, **options: Any) -> Machine:
    """Compile a ``Launch`` for ``sm_<arch>`` and execute it; ``edit`` changes the PTX, to plant a bug."""
    built = compile_call(call.kernel, arch, call.arguments, **call.options)
    values = ((parameter, call.arguments[parameter.name]) for parameter in call.kernel.params)
    passed = [value for parameter, value in values if not is_compiled_in(parameter, value)]
    ptx = parsed(built.asm["ptx"]) if edit is None else edit(built.asm["ptx"])
    ctas = call.options.get("num_ctas", 1)
    grid = (call.grid[0] * ctas, *call.grid[1:])
    names = [name for name, _ in tensors_of(call)]
    order = [p.name for p in call.kernel.params if p.name in names and isinstance(call.arguments[p.name], torch.Tensor)]
    return launch(ptx, grid, passed, names=order, shared_bytes=built.metadata.shared, **options)


def run_all(
    planned: Iterable[Any],
    arch: int,
    undefined: Iterable[str] = (),
    edit: Callable[[str], str] | None = None,
    only: Iterable[int] | None = None,
    **options: Any,
) -> list[Machine]:
    """Execute launches one after another; their machines.

    Parameters
    ----------
    undefined : names of the tensors that hold nothing until a launch stores to them
    edit : changes the PTX of the launches whose numbers are in ``only`` (of all, if None)
    """
    undefined = set(undefined)
    written: dict[str, Any] = {}
    machines = []
    for number, call in enumerate(planned):
        change = edit if only is None or number in only else None
        machine = run_launch(call, arch, change, scratch=undefined - written.keys(), written=written, **options)
        written |= {s.name: s.written for s in machine.memory.segments if s.name in undefined}
        machines.append(machine)
    return machines


def run(
    case: Case,
    arch: int,
    form: str,
    edit: Callable[[str], str] | None = None,
    only: Iterable[int] | None = None,
    **options: Any,
) -> tuple[EnsembleSample, list[Machine]]:
    """The operator's result and the machines of its launches.

    Parameters
    ----------
    form : "cluster" (one launch) or "two launches"
    edit : changes the PTX of the launches whose numbers are in ``only`` (of all, if None)
    """
    planned, outputs = launches(case, one_launch=form == "cluster", capability=divmod(arch, 10))
    for tensor, value in zip(outputs, (-7, math.nan, math.nan), strict=True):
        tensor.fill_(value)
    undefined = ("token", "logprob", "target_logprob", "workspace", "ticket")
    machines = run_all(planned, arch, undefined, edit, only, **options)
    return EnsembleSample(*outputs), machines
