"""Linear layers on packed weights: near the memory's speed for a few rows, near the cores' for many."""

from __future__ import annotations

import torch
from torch import Tensor

from . import library, reference_layers

#: Output columns that lie together in a packed weight.
GROUP_COLUMNS = 32


def pack_weight(weight: Tensor) -> Tensor:
    """Copies a weight matrix into the layout that :func:`linear` reads.

    Parameters
    ----------
    weight : Tensor
        [N, K], float32, bfloat16 or float16.

    Returns
    -------
    Tensor
        Private layout, of the same dtype: on a CPU [⌈N/32⌉, K, 32] ([⌈N/32⌉, ⌈K/2⌉, 32, 2] in bfloat16), padded with
        zeros; on a GPU ``weight`` itself (a copy where it is not contiguous); a copy where the compiled operators are
        missing.
    """
    if library.packs(weight):
        return torch.ops.ensemble_decode.pack_weight(weight.detach())
    if weight.is_cuda:
        return weight.detach().contiguous()
    return weight.detach().clone(memory_format=torch.contiguous_format)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, out_fp32: bool = False) -> Tensor:
    """x · Wᵀ + bias with a packed weight.

    Every output is one chain of additions over K in float32, so a row's bits do not depend on the other rows. (On a GPU
    the product is the vendor's library's, which chooses how to cut the sums by the number of rows.)

    Parameters
    ----------
    x : Tensor
        [..., K], of the weight's dtype.
    packed : Tensor
        From :func:`pack_weight`.
    bias : Tensor or None
        [N], of the same dtype.
    out_features : int
        N.
    out_fp32 : bool
        Return the float32 sums unrounded.

    Returns
    -------
    Tensor
        [..., N], of x's dtype, or float32.

    Raises
    ------
    RuntimeError
        If shapes or dtypes do not fit; the message names the tensor and what it must be.

    See Also
    --------
    ensemble_decode.ops.reference_layers.linear : the definition.
    """
    if library.serves(x):
        return torch.ops.ensemble_decode.linear(x, packed, bias, out_features, out_fp32)
    return reference_layers.linear(x, packed, bias, out_fp32)


def cpu_variant() -> str:
    """The instruction set in use: "v4" (AVX-512 with BF16), "v3" (AVX2), "base", or "reference" (not compiled).

    The environment variable ``ENSEMBLE_DECODE_CPU`` chooses a lower one.
    """
    return torch.ops.ensemble_decode.cpu_variant() if library.available else "reference"


@library.on_cuda("linear")
def _linear_cuda(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, out_fp32: bool = False) -> Tensor:
    from ensemble_decode.kernels import linear as kernels

    return kernels.linear(x, packed, bias, out_features, out_fp32)


if library.available:

    @torch.library.register_fake("ensemble_decode::pack_weight")
    def _pack_weight_fake(weight: Tensor) -> Tensor:
        n, k = weight.shape
        groups = (n + GROUP_COLUMNS - 1) // GROUP_COLUMNS
        if weight.dtype == torch.bfloat16:
            return weight.new_empty(groups, (k + 1) // 2, GROUP_COLUMNS, 2)
        return weight.new_empty(groups, k, GROUP_COLUMNS)

    @torch.library.register_fake("ensemble_decode::linear")
    def _linear_fake(
        x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, out_fp32: bool = False
    ) -> Tensor:
        return x.new_empty(*x.shape[:-1], out_features, dtype=torch.float32 if out_fp32 else x.dtype)
