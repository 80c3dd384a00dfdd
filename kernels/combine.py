"""z + Σ_p α_p (z⁺_p − z⁻_p) in Triton: the expression that every kernel of the sampler shares, and ``ops.combine``."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

#: How a block lies in its row: inside it; across its end; or holding a whole row with room to spare.
INSIDE, ACROSS, WHOLE_ROW = (tl.constexpr(i) for i in range(3))


@triton.jit
def _load(source, at, on, vocab, other, PLACE: tl.constexpr):
    """Logits in float32; ``other`` where the row has ended or ``on``, one condition for the block, is false.

    A mask that ends at a multiple of 16 leaves a load its width, and so does one condition for all. Of a whole row, up to
    15 tokens that remain are loaded one by one.
    """
    if PLACE == INSIDE:
        x = tl.load(source + at, mask=on, other=other)
    elif PLACE == ACROSS:
        x = tl.load(source + at, mask=on & (at < vocab), other=other)
    else:
        even = vocab // 16 * 16
        x = tl.load(source + at, mask=on & (at < even), other=other)
        if even < vocab:
            x = tl.where(at < even, x, tl.load(source + at, mask=on & (at >= even) & (at < vocab), other=other))
    return x.to(tl.float32)


@triton.jit
def _difference(expert, anti, at, on, vocab, HAS_ANTI: tl.constexpr, PLACE: tl.constexpr):
    """z⁺ − z⁻; what is not finite counts as 0."""
    difference = _load(expert, at, on, vocab, 0.0, PLACE)
    if HAS_ANTI:
        difference = difference - _load(anti, at, on, vocab, 0.0, PLACE)
    return tl.where(difference - difference == 0.0, difference, 0.0)


@triton.jit
def combined_at(logits, at, vocab, PAIRS: tl.constexpr, HAS_ANTI: tl.constexpr, PLACE: tl.constexpr):
    """(z, z + Σ α (z⁺ − z⁻)) of one row at tokens ``at``, float32; −inf from ``vocab`` on. Pairs with α = 0 are not read.

    ``logits`` says where the row's lie: target, expert and anti-expert of the first pair, the steps to those of the next, α.
    """
    target, expert, anti, expert_pair_stride, anti_pair_stride, alpha = logits
    z = _load(target, at, vocab > 0, vocab, float("-inf"), PLACE)
    combined = z
    # Unrolled, the loads of all pairs are in flight together, which takes registers: a whole row needs them, and with more
    # pairs the sampler's second launch spills.
    if PAIRS <= 2 and PLACE != WHOLE_ROW:
        for pair in tl.static_range(PAIRS):
            weight = tl.load(alpha + pair)
            combined += weight * _difference(expert, anti, at, weight != 0.0, vocab, HAS_ANTI, PLACE)
            expert += expert_pair_stride
            anti += anti_pair_stride
    else:
        for pair in range(PAIRS):
            weight = tl.load(alpha + pair)
            combined += weight * _difference(expert, anti, at, weight != 0.0, vocab, HAS_ANTI, PLACE)
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
    logits = (
        target + row * target_stride,
        expert + row * expert_stride,
        anti + row * anti_stride,
        expert_pair_stride,
        anti_pair_stride,
        alpha + row * alpha_stride,
    )
    out += row * out_stride
    at = first + tl.arange(0, BLOCK)
    if first + BLOCK <= vocab:
        _, combined = combined_at(logits, at, vocab, PAIRS, HAS_ANTI, INSIDE)
        tl.store(out + at, combined)
    else:
        _, combined = combined_at(logits, at, vocab, PAIRS, HAS_ANTI, ACROSS)
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
    target: Tensor,
    expert: Tensor | None,
    anti_expert: Tensor | None,
    alpha: Tensor | None,
    out: Tensor,
    *,
    warp_size: int = 32,
) -> list[Launch]:
    """The launch that writes z + Σ α (z⁺ − z⁻) to ``out``, float32 [B, V]. Shapes as in ``ops.combine``, not checked."""
    rows, vocab = target.shape
    block = 1024
    arguments = logits_arguments(target, expert, anti_expert, alpha)
    arguments |= {"out": out, "out_stride": out.stride(0), "BLOCK": block}
    options = {"num_warps": block // 8 // warp_size, "enable_fp_fusion": False}
    return [Launch(combine_kernel, (rows, triton.cdiv(vocab, block)), arguments, options)] if rows else []
