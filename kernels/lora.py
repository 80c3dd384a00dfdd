"""Low-rank adapters, one of several or none for each row: two small products over tiles of 16 rows.

A tile goes over the adapters that its rows have, so neighbours with one adapter read it once; which those are is found on
the device, and the host never waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensemble_decode.kernels.precision import dot_precision

_ROWS = 16
#: No adapter.
NONE: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def _next_adapter(own, after):
    """The least adapter above ``after`` that a row of the tile has; 2³¹ − 1 where there is none."""
    return tl.min(tl.where(own > after, own, NONE), 0)


@triton.jit(do_not_specialize=["rows"])
def down(
    x,
    a,
    adapter,
    low,
    rows,
    x_stride,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_LOW: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: low [T, S·r] = a[adapter] · x for a tile of rows and some of the S·r columns, in float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK_LOW + tl.arange(0, BLOCK_LOW)
    own = tl.load(adapter + row, mask=row < rows, other=-1)
    first_adapter = _next_adapter(own, -1)
    if first_adapter == NONE:
        return
    at = row.to(tl.int64) * x_stride
    result = tl.zeros([ROWS, BLOCK_LOW], tl.float32)
    index = first_adapter
    while index != NONE:
        mine = own == index
        factor = a + index.to(tl.int64) * (LOW * WIDTH)
        total = tl.zeros([ROWS, BLOCK_LOW], tl.float32)
        for begin in range(0, WIDTH, BLOCK_WIDTH):
            k = begin + tl.arange(0, BLOCK_WIDTH)
            in_k = k < WIDTH
            b_x = tl.load(x + at[:, None] + k[None, :], mask=mine[:, None] & in_k[None, :], other=0.0)
            b_a = tl.load(
                factor + column[:, None] * WIDTH + k[None, :], mask=(column < LOW)[:, None] & in_k[None, :], other=0.0
            )
            total = tl.dot(b_x, tl.trans(b_a), total, input_precision=PRECISION)
        result = tl.where(mine[:, None], total, result)
        index = _next_adapter(own, index)
    mask = (own >= 0)[:, None] & (column < LOW)[None, :]
    tl.store(low + row.to(tl.int64)[:, None] * LOW + column[None, :], result, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def up(
    low,
    b,
    adapter,
    y,
    rows,
    y_stride,
    END0: tl.constexpr,
    END1: tl.constexpr,
    END2: tl.constexpr,
    SEGMENTS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: y += b[adapter] · low for a tile of rows and some columns, each with its segment's part of ``low``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    own = tl.load(adapter + row, mask=row < rows, other=-1)
    first_adapter = _next_adapter(own, -1)
    if first_adapter == NONE:
        return
    rank = tl.arange(0, RANK_PADDED)
    in_rank = rank < RANK
    width: tl.constexpr = END0 if SEGMENTS == 1 else (END1 if SEGMENTS == 2 else END2)
    delta = tl.zeros([ROWS, COLUMNS], tl.float32)
    for segment in tl.static_range(SEGMENTS):
        begin = 0 if segment == 0 else (END0 if segment == 1 else END1)
        end = END0 if segment == 0 else (END1 if segment == 1 else END2)
        if (first < end) & (first + COLUMNS > begin):
            inside = (column >= begin) & (column < end)
            b_low = tl.load(
                low + row.to(tl.int64)[:, None] * (SEGMENTS * RANK) + segment * RANK + rank[None, :],
                mask=(own >= 0)[:, None] & in_rank[None, :],
                other=0.0,
            )
            index = first_adapter
            while index != NONE:
                b_b = tl.load(
                    b + index.to(tl.int64) * (width * RANK) + column[:, None] * RANK + rank[None, :],
                    mask=inside[:, None] & in_rank[None, :],
                    other=0.0,
                ).to(tl.float32)
                part = tl.dot(b_low, tl.trans(b_b), input_precision=PRECISION)
                delta += tl.where((own == index)[:, None] & inside[None, :], part, 0.0)
                index = _next_adapter(own, index)
    mask = (own >= 0)[:, None] & (column < width)[None, :]
    at = y + row.to(tl.int64)[:, None] * y_stride + column[None, :]
    total = tl.load(at, mask=mask, other=0.0).to(tl.float32) + delta
    tl.store(at, total.to(y.dtype.element_ty), mask=mask)


def lora_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, adapter: Tensor, segments: Sequence[int]) -> None:
    """See ``ensemble_decode.ops.lora_``; a [A, S·r, K] and b [A, N, r] as they are, contiguous."""
    (rows, width), rank, parts = x.shape, b.shape[2], len(segments)
    if not 1 <= parts <= 3:
        raise RuntimeError(f"lora_: there are {parts} segments, it must be 1 to 3")
    for label, tensor, shape in (
        ("y", y, (rows, sum(segments))),
        ("a", a, (b.shape[0], parts * rank, width)),
        ("b", b, (b.shape[0], sum(segments), rank)),
        ("adapter", adapter, (rows,)),
    ):
        if tensor.shape != shape:
            raise RuntimeError(f"lora_: {label} is {list(tensor.shape)}, it must be {list(shape)}")
    for label, tensor in (("x", x), ("a", a), ("b", b)):
        if tensor.dtype != y.dtype:
            raise RuntimeError(f"lora_: {label} is {tensor.dtype}, it must be y's {y.dtype}")
    if adapter.dtype != torch.int32:
        raise RuntimeError(f"lora_: adapter is {adapter.dtype}, it must be torch.int32")
    if not (a.is_contiguous() and b.is_contiguous() and x.stride(-1) == 1 and y.stride(-1) == 1):
        raise RuntimeError("lora_: a and b must be contiguous, and the last dimension of x and y")
    if rows == 0:
        return
    tiles, block_low, columns = triton.cdiv(rows, _ROWS), 16, 64
    low = torch.empty(rows, parts * rank, dtype=torch.float32, device=x.device)
    down[(tiles, triton.cdiv(parts * rank, block_low))](
        x,
        a,
        adapter,
        low,
        rows,
        x.stride(0),
        WIDTH=width,
        LOW=parts * rank,
        ROWS=_ROWS,
        BLOCK_LOW=block_low,
        BLOCK_WIDTH=256 // x.dtype.itemsize,
        PRECISION=dot_precision(),
        num_warps=2,
        num_stages=3,
    )
    ends = [sum(segments[: i + 1]) for i in range(3)]
    up[(tiles, triton.cdiv(sum(segments), columns))](
        low,
        b,
        adapter,
        y,
        rows,
        y.stride(0),
        END0=ends[0],
        END1=ends[1],
        END2=ends[2],
        SEGMENTS=parts,
        RANK=rank,
        RANK_PADDED=max(16, triton.next_power_of_2(rank)),
        ROWS=_ROWS,
        COLUMNS=columns,
        PRECISION=dot_precision(),
        num_warps=2,
    )
