"""Runs csrc/cuda/ensemble_sample.cu, compiled by nvcc to PTX, in the simulator."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble_decode.ops import EnsembleSample
from tests.gpuless.ptxsim import Kernel, Machine, launch
from tests.ops.sampling_cases import Case

SOURCE = Path(__file__).parents[2] / "csrc" / "cuda" / "ensemble_sample.cu"
#: kThreads, kCluster, kVisitSlice, kGrain of the headers, and the bytes of a Sums. A test compares them, and the structures.
CONSTANTS = THREADS, CLUSTER, VISIT_SLICE, GRAIN, SUMS = 512, 8, 4096, 8, 16
_DTYPES = {torch.float32: (0, "If"), torch.bfloat16: (1, "INS_8bfloat16E"), torch.float16: (2, "INS_7float16E")}
_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64


class SampleArgs(ctypes.Structure):
    """csrc/cpu/ensemble_sample.h's struct of the same name."""

    _fields_ = (
        ("dtype", ctypes.c_int),
        *((name, _POINTER) for name in ("target", "expert", "anti")),
        *((name, _COUNT) for name in ("rows", "vocab", "pairs", "target_stride", "expert_pair_stride")),
        *((name, _COUNT) for name in ("expert_stride", "anti_pair_stride", "anti_stride")),
        ("alpha", _POINTER),
        ("alpha_stride", _COUNT),
        *((name, _POINTER) for name in ("temperature", "top_p", "min_p", "top_k", "seed", "position")),
        ("nucleus_target", ctypes.c_bool),
        ("target_is_combined", ctypes.c_bool),
        *((name, _POINTER) for name in ("token", "logprob", "target_logprob", "out")),
        ("out_stride", _COUNT),
    )


class Workspace(ctypes.Structure):
    """ensemble_sample.cuh's struct of the same name."""

    _fields_ = (
        ("score", _POINTER),
        ("target", _POINTER),
        ("sums", _POINTER),
        ("padded", _COUNT),
        ("slices", ctypes.c_int),
    )


def has_nvcc() -> bool:
    """Is there a CUDA compiler?"""
    return shutil.which("nvcc") is not None


@functools.cache
def ptx(arch: int, source: Path = SOURCE) -> str:
    """The module for ``sm_<arch>``."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "module.ptx"
        command = ["nvcc", "-std=c++17", f"-arch=sm_{arch}", "-ptx", str(source), "-o", str(out)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "LC_ALL": "C"})
        return out.read_text()


@functools.cache
def kernel(arch: int, name: str, dtype: torch.dtype) -> Kernel:
    """``ensemble_sample_<name>`` for a dtype."""
    return Kernel(ptx(arch), rf"\w*ensemble_sample_{name}{_DTYPES[dtype][1]}\w*")


def _tensors(case: Case, out: EnsembleSample) -> dict[str, Tensor]:
    given = {
        "target": case.target,
        "expert": case.expert,
        "anti": case.anti_expert,
        "alpha": case.alpha,
        "temperature": case.temperature,
        "top_p": case.top_p,
        "min_p": case.min_p,
        "top_k": case.top_k,
        "seed": case.seed,
        "position": case.position,
        "token": out.token,
        "logprob": out.logprob,
        "target_logprob": out.target_logprob,
    }
    return {name: value for name, value in given.items() if value is not None}


def arguments(case: Case, tensors: dict[str, Tensor]) -> SampleArgs:
    """The structure that the kernels take."""
    args = SampleArgs(
        dtype=_DTYPES[case.target.dtype][0],
        rows=case.batch,
        vocab=case.target.shape[1],
        pairs=0 if case.expert is None else case.expert.shape[0],
        target_stride=case.target.stride(0),
        nucleus_target=case.nucleus == "target",
        target_is_combined=case.target_is_combined,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    for name, tensor in (("expert", case.expert), ("anti", case.anti_expert)):
        if tensor is not None:
            setattr(args, f"{name}_pair_stride", tensor.stride(0))
            setattr(args, f"{name}_stride", tensor.stride(1))
    if case.alpha is not None:
        args.alpha_stride = case.alpha.stride(0)
    return args


def run(
    case: Case, arch: int, form: str, edit: Callable[[str], str] | None = None, **options: Any
) -> tuple[EnsembleSample, list[Machine]]:
    """The operator's result and the machines of its launches.

    Parameters
    ----------
    form : "cluster" (one launch) or "two launches"
    edit : changes the PTX, to plant a bug
    """
    batch, vocab = case.target.shape
    out = EnsembleSample(torch.full((batch,), -7), torch.full((batch,), -7.0), torch.full((batch,), -7.0))
    tensors = _tensors(case, out)
    args = arguments(case, tensors)

    def get(name: str) -> Kernel:
        if edit is None:
            return kernel(arch, name, case.target.dtype)
        return Kernel(edit(ptx(arch)), rf"\w*ensemble_sample_{name}{_DTYPES[case.target.dtype][1]}\w*")

    outputs = ("token", "logprob", "target_logprob")
    keeps_target = bool(args.nucleus_target and args.pairs and not args.target_is_combined)
    if form == "cluster":
        slice_ = math.ceil(math.ceil(vocab / CLUSTER) / GRAIN) * GRAIN
        machine = launch(
            get("cluster"), (batch * CLUSTER,), [args, slice_], block=(THREADS,), cluster=(CLUSTER,),
            shared_bytes=4 * slice_ * (1 + keeps_target), tensors=tensors.items(), scratch=outputs, **options,
        )  # fmt: skip
        return out, [machine]
    slices = -(-vocab // VISIT_SLICE)
    padded = slices * VISIT_SLICE
    work = {"scores": torch.empty(batch * padded), "sums": torch.empty(batch * slices * SUMS, dtype=torch.uint8)}
    if keeps_target:
        work["targets"] = torch.empty(batch * padded)
    workspace = Workspace(work["scores"].data_ptr(), None, work["sums"].data_ptr(), padded, slices)
    if keeps_target:
        workspace.target = work["targets"].data_ptr()
    both = [*tensors.items(), *work.items()]
    visit = launch(
        get("visit"), (batch, slices), [args, VISIT_SLICE, workspace], block=(THREADS,), tensors=both,
        scratch=(*outputs, *work), **options,
    )  # fmt: skip
    finish = launch(
        get("finish"), (batch,), [args, workspace], block=(THREADS,), tensors=both, scratch=outputs,
        written={s.name: s.written for s in visit.memory.segments if s.name in work}, **options,
    )  # fmt: skip
    return out, [visit, finish]
