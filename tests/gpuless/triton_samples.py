"""Triton kernels that the simulator is tested with."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def over_a_cluster(z_ptr, token_ptr, sum_ptr, V, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """argmax and Σ exp of a row, and a loop whose end depends on the row: every reduction crosses the CTAs."""
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    z = tl.load(z_ptr + row.to(tl.int64) * stride + offs, mask=offs < stride, other=float("-inf")).to(tl.float32)
    z = tl.where(offs < V, z, float("-inf"))
    m = tl.max(z, 0)
    least = m - 30.0
    above = tl.sum((z > least).to(tl.int32), 0)
    while above > 5:
        least = (m + tl.min(tl.where(z > least, z, float("inf")), 0)) * 0.5
        above = tl.sum((z > least).to(tl.int32), 0)
    tl.store(token_ptr + row, tl.argmax(z, 0) + 0 * above)
    tl.store(sum_ptr + row, tl.sum(tl.exp(z - m), 0))


@triton.jit
def split_sum(
    x_ptr, part_ptr, ticket_ptr, out_ptr, V, stride, CHUNK: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr
):  # type: ignore[no-untyped-def]
    """Σ exp of a row in splits; the last CTA to take a ticket adds them up."""
    row, split = tl.program_id(0), tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(split * CHUNK, split * CHUNK + CHUNK, BLOCK):
        offs = start + cols
        total += tl.exp(tl.load(x_ptr + row.to(tl.int64) * stride + offs, mask=offs < V, other=float("-inf")))
    tl.store(part_ptr + row * SPLITS + split, tl.sum(total, 0))
    ticket = tl.atomic_add(ticket_ptr + row, 1, sem="acq_rel", scope="gpu")
    if ticket == SPLITS - 1:
        tl.store(out_ptr + row, tl.sum(tl.load(part_ptr + row * SPLITS + tl.arange(0, SPLITS)), 0))


@triton.jit
def aligned_sum(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """An unmasked row of BLOCK numbers: 16-byte loads where the stride is said to be a multiple of 16."""
    row = tl.program_id(0)
    tl.store(out_ptr + row, tl.sum(tl.load(x_ptr + row.to(tl.int64) * stride + tl.arange(0, BLOCK)), 0))


@triton.jit
def many_operations(x_ptr, sum_ptr, sort_ptr, count_ptr, word_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Running sums, a sort, a histogram and Philox words."""
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(sum_ptr + i, tl.cumsum(x, 0))
    tl.store(sort_ptr + i, tl.sort(x))
    tl.store(count_ptr + tl.arange(0, 16), tl.histogram((x * 2 + 8).to(tl.int32), 16))
    word, _, _, _ = tl.randint4x(77, i)
    tl.store(word_ptr + i, word)
