"""The gated activation of an MLP: act(gate) · up, from the merged projection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def gate_rows(x, out, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a piece of a row [gate | up]. Activations are numbered as in the operators' schema."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(x + row * 2 * width + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + column, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == 0:
        gate = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == 1:  # x / 2 (1 + tanh u) = x / (1 + e^-2u)
        inner = (gate * gate * gate * 0.044715 + gate) * 0.7978845608028654
        gate = gate / (1.0 + tl.exp(-2.0 * inner))
    else:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + row * width + column, (gate * up).to(out.dtype.element_ty), mask=mask)


def gated(x: Tensor, activation: int) -> Tensor:
    """act(x[:, :I]) · x[:, I:] of x [T, 2·I], contiguous; activation 0 silu, 1 gelu_tanh, 2 gelu."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows > 0:
        gate_rows[(rows, triton.cdiv(width, _BLOCK))](x, out, width, ACTIVATION=activation, BLOCK=_BLOCK, num_warps=4)
    return out
