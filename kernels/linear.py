"""Linear layers on a GPU are the vendor's: the weight as it is, cuBLAS's (hipBLAS's) product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, out_fp32: bool = False) -> Tensor:
    """See ``ensemble_decode.ops.linear``. Sums are float32's; how they are cut is the library's choice, by shape."""
    if weight.shape != (out_features, x.shape[-1]):
        raise RuntimeError(f"linear: packed is {list(weight.shape)}, it must be {[out_features, x.shape[-1]]}")
    if not out_fp32 or x.dtype == torch.float32:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    # A product with unrounded sums exists for CUDA alone.
    y = torch.mm(rows, weight.t(), out_dtype=torch.float32) if x.is_cuda else rows.float() @ weight.float().t()
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], out_features)
