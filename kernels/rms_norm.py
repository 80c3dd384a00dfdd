"""RMS norm, alone or after adding to the residual, and that addition alone: a row is read once and kept in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def norm_rows(
    x,
    y,
    weight,
    total,
    out,
    x_stride,
    y_stride,
    eps,
    offset,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
):
    """One program a row: total = x + y (``ADD``), out = total / rms(total) · (offset + weight) (``NORM``)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    mask = column < WIDTH
    value = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(y + row * y_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + row * WIDTH + column, value.to(total.dtype.element_ty), mask=mask)
    if NORM:
        value *= tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
        value *= offset + tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row * WIDTH + column, value.to(out.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor, y: Tensor, weight: Tensor, total: Tensor, out: Tensor, eps: float, offset: float, add: bool, norm: bool
) -> None:
    rows, width = x.shape
    if rows == 0:
        return
    padded = triton.next_power_of_2(width)
    norm_rows[(rows,)](
        x,
        y,
        weight,
        total,
        out,
        x.stride(0),
        y.stride(0),
        eps,
        offset,
        WIDTH=width,
        PADDED=padded,
        ADD=add,
        NORM=norm,
        num_warps=min(16, max(1, padded // 512)),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """See ``ensemble_decode.ops.rms_norm``."""
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise RuntimeError(
            f"rms_norm: weight is {weight.dtype} {list(weight.shape)}, it must be {x.dtype} {list(x.shape[-1:])}"
        )
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    _launch(rows, rows, weight.contiguous(), out, out, float(eps), float(weight_offset), False, True)
    return out


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, weight_offset: float) -> tuple[Tensor, Tensor]:
    """(x + y in float32, its RMS norm in x's dtype) of rows [T, E]."""
    total = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, y, weight, total, out, float(eps), float(weight_offset), True, True)
    return total, out


def add(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x + y of rows [T, E], summed in float32."""
    total = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(x, y, x, total, total, 0.0, 0.0, True, False)
    return total
