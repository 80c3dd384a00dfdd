"""The heart of the project: combine, softmax, filter and sample in one pass over the vocabulary."""

from __future__ import annotations

import math
import os
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import library, reference

#: Whether the operators were built with the CUDA kernels of csrc/cuda.
_has_cuda_kernels: bool = library.available and hasattr(torch.ops.ensemble_decode, "ensemble_sample_cuda")


class EnsembleSample(NamedTuple):
    """What :func:`ensemble_sample` returns, one entry a row."""

    token: Tensor
    logprob: Tensor
    target_logprob: Tensor


def ensemble_sample(
    target: Tensor,
    expert: Tensor | None = None,
    anti_expert: Tensor | None = None,
    *,
    alpha: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    min_p: Tensor | float = 0.0,
    seed: Tensor | int,
    position: Tensor | int,
    nucleus: Literal["combined", "target"] = "combined",
    target_is_combined: bool = False,
) -> EnsembleSample:
    """Sample one token a row from softmax((z + Σ_p α_p (z⁺_p − z⁻_p)) / T) inside the kept set.

    The token is a pure function of the row's logits, parameters, seed and position: not of the batch, the row's place
    in it, or the number of threads.

    Parameters
    ----------
    target : Tensor
        z, [B, V], float32, bfloat16 or float16; last dimension contiguous, any row stride.
    expert, anti_expert : Tensor, optional
        z⁺ and z⁻ of P pairs, [P, B, V], of the same dtype. ``anti_expert=None``: ``expert`` holds z⁺ − z⁻.
    alpha : Tensor or float
        [B, P] float32, or one number for all. Where it is 0 the pair is off, and its logits are not read.
    temperature, top_p, min_p : Tensor or float
        [B] float32, or one number for all rows. Temperature 0 is greedy (lowest id on ties, no noise).
    top_k : Tensor or int
        [B] int32. 0 or ≥ V is off. Every filter keeps all tokens tied at its boundary.
    seed, position : Tensor or int
        [B] int64: key of the row's noise, and number of tokens before the sampled one.
    nucleus : {"combined", "target"}
        Which distribution the filters look at.
    target_is_combined : bool
        ``target`` is a combination already: ``target_logprob`` is NaN then, and ``nucleus="target"`` an error.

    Returns
    -------
    EnsembleSample
        ``token`` int64 [B], −1 where a row has no valid sample (NaN or +inf in z, or every token masked by −inf);
        ``logprob`` float32 [B] under softmax(s) before filtering; ``target_logprob`` under softmax(z / T).

    Raises
    ------
    RuntimeError, ValueError
        A shape, dtype or value that is not allowed, in one line. On a GPU the values of tensors are not looked at, which
        would make the host wait for the device.

    See Also
    --------
    ensemble_decode.ops.reference.ensemble_sample : the definition of correct.

    Examples
    --------
    >>> z = torch.tensor([[0.0, 1.0, 2.0]])
    >>> ensemble_sample(z, temperature=0.0, seed=0, position=0).token
    tensor([2])
    """
    if nucleus not in ("combined", "target"):
        raise ValueError(f"ensemble_sample: nucleus is {nucleus!r}, allowed are 'combined' and 'target'")
    rows = target.shape[0]
    parameters = (
        None if expert is None else _rows_of(alpha, (rows, expert.shape[0]), torch.float32, target),
        _rows_of(temperature, (rows,), torch.float32, target),
        _rows_of(top_k, (rows,), torch.int32, target),
        _rows_of(top_p, (rows,), torch.float32, target),
        _rows_of(min_p, (rows,), torch.float32, target),
        _rows_of(seed, (rows,), torch.int64, target),
        _rows_of(position, (rows,), torch.int64, target),
    )
    if library.serves(target) or (_has_cuda_kernels and target.is_cuda):
        return EnsembleSample(
            *torch.ops.ensemble_decode.ensemble_sample(
                target, expert, anti_expert, *parameters, nucleus == "target", target_is_combined
            )
        )
    names = ("alpha", "temperature", "top_k", "top_p", "min_p", "seed", "position")
    return EnsembleSample(
        *reference.ensemble_sample(
            target,
            expert,
            anti_expert,
            **dict(zip(names, parameters, strict=True)),  # type: ignore[arg-type]
            nucleus=nucleus,
            target_is_combined=target_is_combined,
        )
    )


def combine(
    target: Tensor,
    expert: Tensor | None,
    anti_expert: Tensor | None,
    alpha: Tensor | float | None,
    out: Tensor | None = None,
) -> Tensor:
    """z + Σ_p α_p (z⁺_p − z⁻_p) in float32, for stacks that sample by themselves.

    Parameters
    ----------
    target, expert, anti_expert, alpha
        As in :func:`ensemble_sample`.
    out : Tensor, optional
        float32 [B, V] to write to.

    Returns
    -------
    Tensor
        float32 [B, V]; ``out`` where it is given.
    """
    weights = None if expert is None else _rows_of(alpha, (target.shape[0], expert.shape[0]), torch.float32, target)
    if library.serves(target):
        if out is None:
            out = torch.empty(target.shape, dtype=torch.float32, device=target.device)
        torch.ops.ensemble_decode.combine_out(target, expert, anti_expert, weights, out)
        return out
    combined = reference.combine(target, expert, anti_expert, weights)
    return combined if out is None else out.copy_(combined)


def ensemble_logprob(
    target: Tensor,
    expert: Tensor | None,
    anti_expert: Tensor | None,
    token: Tensor,
    *,
    alpha: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given tokens: (under softmax(s), under softmax(z / T)), float32 [B].

    Parameters
    ----------
    token : Tensor
        int64 [B]. A token outside 0 … V − 1, as −1 of a row without a sample, has the log-probability NaN.
    target, expert, anti_expert, alpha, temperature
        As in :func:`ensemble_sample`; temperature 0 counts as 1.
    """
    heat = _rows_of(temperature, (target.shape[0],), torch.float32, target)
    heat = torch.where(heat == 0, 1.0, heat).unsqueeze(1)
    index = token.clamp(0, target.shape[1] - 1).unsqueeze(1)
    outside = (token < 0) | (token >= target.shape[1])
    combined = combine(target, expert, anti_expert, alpha)
    logprob, target_logprob = (
        (x / heat).log_softmax(-1).gather(1, index).squeeze(1).masked_fill(outside, math.nan)
        for x in (combined, target.float())
    )
    return logprob, target_logprob


def _rows_of(value: Any, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """A parameter as one value a row. Tensors are taken as they are: a wrong dtype is an error, not a copy."""
    if isinstance(value, Tensor):
        return value
    if value is None:
        raise ValueError("ensemble_sample: alpha is None, a number or [batch, pairs] is needed where there are experts")
    return torch.full(shape, value, dtype=dtype, device=like.device)


# ── CUDA tensors: Triton or CUDA C++ ────────────────────────────────────────────────────────────────────────────────
def _runs_cuda_kernels(capability: tuple[int, int] | None) -> bool:
    """Whether a device's rows are sampled by CUDA C++ (csrc/cuda) or by Triton (kernels/).

    CUDA C++ where it is compiled in and the device forms clusters (9.0 and later): one read of the logits there, fewer
    instructions a row than Triton's form of it, clusters of a portable size, and nothing to compile at run time. Elsewhere
    Triton's two launches, which split a row over the chip and keep no scores in memory. It never depends on the batch.

    Parameters
    ----------
    capability : (int, int) or None
        Of an NVIDIA device; None for AMD's.

    Raises
    ------
    ValueError
        ``ENSEMBLE_DECODE_SAMPLER`` names a back end that doesn't exist, or that this installation doesn't have.
    """
    wanted = os.environ.get("ENSEMBLE_DECODE_SAMPLER", "auto")
    usable = {"triton": library.has_triton, "cuda": _has_cuda_kernels and capability is not None}
    if wanted == "auto":
        return usable["cuda"] and (not usable["triton"] or (capability or (0, 0)) >= (9, 0))
    if not usable.get(wanted, False):
        allowed = ", ".join(repr(name) for name in ("auto", *(name for name, there in usable.items() if there)))
        raise ValueError(f"ENSEMBLE_DECODE_SAMPLER is {wanted!r}, allowed here are {allowed}")
    return wanted == "cuda"


@library.on_cuda("ensemble_sample")
def _ensemble_sample_cuda(
    target: Tensor,
    expert: Tensor | None,
    anti_expert: Tensor | None,
    alpha: Tensor | None,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    nucleus_target: bool,
    target_is_combined: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    filters = (temperature, top_k, top_p, min_p, seed, position)
    capability = library.capability(target)
    if _runs_cuda_kernels(capability):
        return torch.ops.ensemble_decode.ensemble_sample_cuda(
            target, expert, anti_expert, alpha, *filters, nucleus_target, target_is_combined
        )
    _check_logits("ensemble_sample", target, expert, anti_expert, alpha)
    if target_is_combined:
        _require(expert is None, "ensemble_sample: target_is_combined is true, but experts are given")
        _require(
            not nucleus_target,
            "ensemble_sample: nucleus is 'target', which needs the target's own logits: target_is_combined must be false",
        )
    for name, value, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("seed", seed, torch.int64),
        ("position", position, torch.int64),
    ):
        _check_tensor("ensemble_sample", name, value, dtype, (target.shape[0],), target)
        _require(value.is_contiguous(), f"ensemble_sample: {name} must be contiguous")
    from ensemble_decode.kernels import ensemble_sample as kernel

    launches, results = kernel.plan(
        target, expert, anti_expert, alpha, *filters, nucleus_target, target_is_combined, capability=capability
    )
    for launch in launches:
        launch()
    return results


@library.on_cuda("combine_out")
def _combine_out_cuda(
    target: Tensor, expert: Tensor | None, anti_expert: Tensor | None, alpha: Tensor | None, out: Tensor
) -> None:
    _check_logits("combine", target, expert, anti_expert, alpha)
    _check_tensor("combine", "out", out, torch.float32, tuple(target.shape), target)
    from ensemble_decode.kernels import combine as kernel

    for launch in kernel.plan(target, expert, anti_expert, alpha, out, warp_size=64 if torch.version.hip else 32):
        launch()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _check_tensor(
    op: str, name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...], target: Tensor
) -> None:
    where = f"it must be on target's device, {target.device}"
    _require(value.device == target.device, f"{op}: {name} is on {value.device}, {where}")
    _require(value.dtype == dtype, f"{op}: {name} is {value.dtype}, it must be {dtype}")
    _require(tuple(value.shape) == shape, f"{op}: {name} is {list(value.shape)}, it must be {list(shape)}")
    dense = value.shape[-1] <= 1 or value.stride(-1) == 1
    _require(dense, f"{op}: {name} must be contiguous in its last dimension")


def _check_logits(
    op: str, target: Tensor, expert: Tensor | None, anti_expert: Tensor | None, alpha: Tensor | None
) -> None:
    _require(target.dim() == 2, f"{op}: target is {list(target.shape)}, it must be [batch, vocabulary]")
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    _require(target.dtype in kinds, f"{op}: target is {target.dtype}, it must be float32, bfloat16 or float16")
    _check_tensor(op, "target", target, target.dtype, tuple(target.shape), target)
    rows, vocab = target.shape
    _require(1 <= vocab <= 1 << 24, f"{op}: target has {vocab} tokens, allowed are 1 to {1 << 24}")
    if expert is None:
        _require(anti_expert is None, f"{op}: anti_expert is given without expert")
        return
    _require(expert.dim() == 3, f"{op}: expert is {list(expert.shape)}, it must be [pairs, batch, vocabulary]")
    pairs = expert.shape[0]
    _require(pairs <= 64, f"{op}: expert has {pairs} pairs, at most 64 are allowed")
    _check_tensor(op, "expert", expert, target.dtype, (pairs, rows, vocab), target)
    if anti_expert is not None:
        _check_tensor(op, "anti_expert", anti_expert, target.dtype, (pairs, rows, vocab), target)
    if alpha is None:
        raise RuntimeError(f"{op}: alpha is None, it must be [batch, pairs] where there are experts")
    _check_tensor(op, "alpha", alpha, torch.float32, (rows, pairs), target)


if library.available:

    @torch.library.register_fake("ensemble_decode::ensemble_sample")
    def _ensemble_sample_fake(target: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        rows = target.shape[0]
        return (
            target.new_empty(rows, dtype=torch.int64),
            target.new_empty(rows, dtype=torch.float32),
            target.new_empty(rows, dtype=torch.float32),
        )

    @torch.library.register_fake("ensemble_decode::combine_out")
    def _combine_out_fake(*_: Any) -> None:
        return None


if _has_cuda_kernels:
    torch.library.register_fake("ensemble_decode::ensemble_sample_cuda", _ensemble_sample_fake)
