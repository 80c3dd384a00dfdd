"""The heart of the project: combine, softmax, filter and sample in one pass over the vocabulary."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import library, reference


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
        A shape, dtype or value that is not allowed, in one line.

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
    if library.available and target.is_cpu:
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
    if library.available and target.is_cpu:
        if out is None:
            out = torch.empty(target.shape, dtype=torch.float32)
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
        int64 [B].
    target, expert, anti_expert, alpha, temperature
        As in :func:`ensemble_sample`; temperature 0 counts as 1.
    """
    heat = _rows_of(temperature, (target.shape[0],), torch.float32, target)
    heat = torch.where(heat == 0, 1.0, heat).unsqueeze(1)
    index = token.unsqueeze(1)
    combined = combine(target, expert, anti_expert, alpha)
    return tuple((x / heat).log_softmax(-1).gather(1, index).squeeze(1) for x in (combined, target.float()))  # type: ignore[return-value]


def _rows_of(value: Any, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """A parameter as one value a row. Tensors are taken as they are: a wrong dtype is an error, not a copy."""
    if isinstance(value, Tensor):
        return value
    if value is None:
        raise ValueError("ensemble_sample: alpha is None, a number or [batch, pairs] is needed where there are experts")
    return torch.full(shape, value, dtype=dtype, device=like.device)


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
