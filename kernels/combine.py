"""z + Σ_p α_p (z⁺_p − z⁻_p) in Triton: the expression that every kernel of the sampler shares, and ``ops.combine``."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch


@triton.jit
def _difference(expert, anti, at, mask, HAS_ANTI: tl.constexpr):
    """z⁺ − z⁻ in float32; what is not finite counts as 0."""
    difference = tl.load(expert + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_ANTI:
        difference = difference - tl.load(anti + at, mask=mask, other=0.0).to(tl.float32)
    return tl.where(difference - difference == 0.0, difference, 0.0)


@triton.jit
def combined_at(
    target,
    expert,
    anti,
    expert_pair_stride,
    anti_pair_stride,
    alpha,
    at,
    inside,
    PAIRS: tl.constexpr,
    HAS_ANTI: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(z, z + Σ α (z⁺ − z⁻)) of one row at tokens ``at``, float32; MASKED: −inf where not ``inside``, which is not read.

    Whether a pair is on is one condition for the whole block: such a mask costs a load nothing of its width. Where α is 0
    nothing of the pair is read.
    """
    if MASKED:
        z = tl.load(target + at, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        z = tl.load(target + at).to(tl.float32)
    combined = z
    if PAIRS <= 4:  # unrolled: the loads of all pairs are in flight together
        for pair in tl.static_range(PAIRS):
            weight = tl.load(alpha + pair)
            mask = (inside & (weight != 0.0)) if MASKED else (weight != 0.0)
            combined += weight * _difference(
                expert + pair * expert_pair_stride, anti + pair * anti_pair_stride, at, mask, HAS_ANTI
            )
    else:
        for pair in range(PAIRS):
            weight = tl.load(alpha + pair)
            mask = (inside & (weight != 0.0)) if MASKED else (weight != 0.0)
            combined += weight * _difference(expert, anti, at, mask, HAS_ANTI)
            expert += expert_pair_stride
            anti += anti_pair_stride
    if PAIRS > 0:
        combined = tl.where(z == float("-inf"), float("-inf"), combined)
    return z, combined


@triton.jit
def combine_kernel(
    target,
    expert,
    anti,
    alpha,
    out,
    target_stride,
    expert_stride,
    expert_pair_stride,
    anti_stride,
    anti_pair_stride,
    alpha_stride,
    out_stride,
    vocab,
    PAIRS: tl.constexpr,
    HAS_ANTI: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, block) writes one block of the combined logits."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    target += row * target_stride
    expert += row * expert_stride
    anti += row * anti_stride
    alpha += row * alpha_stride
    out += row * out_stride
    at = first + tl.arange(0, BLOCK)
    if first + BLOCK <= vocab:
        _, combined = combined_at(
            target, expert, anti, expert_pair_stride, anti_pair_stride, alpha, at, at, PAIRS, HAS_ANTI, False
        )
        tl.store(out + at, combined)
    else:
        _, combined = combined_at(
            target, expert, anti, expert_pair_stride, anti_pair_stride, alpha, at, at < vocab, PAIRS, HAS_ANTI, True
        )
        tl.store(out + at, combined, mask=at < vocab)


def logits_arguments(
    target: Tensor, expert: Tensor | None, anti_expert: Tensor | None, alpha: Tensor | None
) -> dict[str, Any]:
    """The arguments that say where the logits of all models lie. Without experts the target stands in for them, unread."""
    plus = target.unsqueeze(0) if expert is None else expert
    minus = plus if anti_expert is None else anti_expert
    return {
        "target": target,
        "expert": plus,
        "anti": minus,
        "alpha": target if alpha is None else alpha,
        "target_stride": target.stride(0),
        "expert_stride": plus.stride(1),
        "expert_pair_stride": plus.stride(0),
        "anti_stride": minus.stride(1),
        "anti_pair_stride": minus.stride(0),
        "alpha_stride": 0 if alpha is None else alpha.stride(0),
        "vocab": target.shape[1],
        "PAIRS": 0 if expert is None else expert.shape[0],
        "HAS_ANTI": anti_expert is not None,
    }


def plan(
    target: Tensor, expert: Tensor | None, anti_expert: Tensor | None, alpha: Tensor | None, out: Tensor
) -> list[Launch]:
    """The launch that writes z + Σ α (z⁺ − z⁻) to ``out``, float32 [B, V]. Shapes as in ``ops.combine``, not checked."""
    rows, vocab = target.shape
    block = 1024
    arguments = logits_arguments(target, expert, anti_expert, alpha)
    arguments |= {"out": out, "out_stride": out.stride(0), "BLOCK": block}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return [Launch(combine_kernel, (rows, triton.cdiv(vocab, block)), arguments, options)] if rows else []
