"""Linear layers on packed weights: near the memory's speed for a few rows, near the cores' for many."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import library, reference_layers

#: Largest magnitude of an int8 weight: symmetric, so that −128 is not used.
INT8_MAX = 127
#: Output columns that lie together in a packed weight.
GROUP_COLUMNS = 32


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds every row of a weight matrix to int8 times a scale of its own.

    Parameters
    ----------
    weight : Tensor
        [N, K], floating point.

    Returns
    -------
    tuple of Tensor
        int8 [N, K], magnitudes up to 127, and float32 [N], largest magnitude of the row / 127 (1 for a row of zeros).
    """
    rows = weight.detach().float()
    largest = rows.abs().amax(1)
    scale = torch.where(largest > 0, largest / INT8_MAX, torch.ones_like(largest))
    return (rows / scale.unsqueeze(1)).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """What :func:`quantize_int8` made of a weight matrix, in float32."""
    return weight.float() * scale.unsqueeze(1)


def pack_weight(weight: Tensor) -> Tensor:
    """Copies a weight matrix into the layout that :func:`linear` reads.

    Parameters
    ----------
    weight : Tensor
        [N, K], float32, bfloat16, float16, or int8 (on a CPU).

    Returns
    -------
    Tensor
        Private layout, of the same dtype: on a CPU [⌈N/32⌉, K, 32] ([⌈N/32⌉, ⌈K/2⌉, 32, 2] in bfloat16; K rounded up
        to two in int8), padded with zeros; on a GPU ``weight`` itself (a copy where it is not contiguous); a copy where the compiled operators are
        missing.
    """
    if library.packs(weight):
        return torch.ops.ensemble_decode.pack_weight(weight.detach())
    if weight.is_cuda:
        return weight.detach().contiguous()
    return weight.detach().clone(memory_format=torch.contiguous_format)


def pack_int8(weight: Tensor, pack: Callable[[Tensor], Tensor] = pack_weight) -> tuple[Tensor, Tensor]:
    """Quantizes a weight matrix and packs it: (packed, scale) for :func:`linear`.

    ``pack`` arranges rows, :func:`pack_weight` or :func:`~ensemble_decode.ops.decoder_layers.pack_gate_up`; the scales
    follow the packed columns.
    """
    quantized, scale = quantize_int8(weight)
    return pack(quantized), pack(scale.unsqueeze(1)).flatten()


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    out_fp32: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
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
    scale : Tensor, optional
        With int8 weights, both from :func:`pack_int8` (on a CPU): the sums are multiplied by it, before the bias.

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
        return torch.ops.ensemble_decode.linear(x, packed, bias, out_features, out_fp32, scale)
    return reference_layers.linear(x, packed, bias, out_fp32, scale)


def cpu_variant() -> str:
    """The instruction set in use: "v4" (AVX-512 with BF16), "v3" (AVX2), "base", or "reference" (not compiled).

    The environment variable ``ENSEMBLE_DECODE_CPU`` chooses a lower one.
    """
    return torch.ops.ensemble_decode.cpu_variant() if library.available else "reference"


@library.on_cuda("linear")
def _linear_cuda(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    out_fp32: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    if scale is not None:
        raise NotImplementedError("linear: int8 weights are for a CPU")
    from ensemble_decode.kernels import linear as kernels

    return kernels.linear(x, packed, bias, out_features, out_fp32)


if library.available:

    @torch.library.register_fake("ensemble_decode::pack_weight")
    def _pack_weight_fake(weight: Tensor) -> Tensor:
        n, k = weight.shape
        groups = (n + GROUP_COLUMNS - 1) // GROUP_COLUMNS
        if weight.dtype == torch.int8:
            return weight.new_empty(groups, (k + 1) // 2 * 2, GROUP_COLUMNS)
        if weight.dtype == torch.bfloat16:
            return weight.new_empty(groups, (k + 1) // 2, GROUP_COLUMNS, 2)
        return weight.new_empty(groups, k, GROUP_COLUMNS)

    @torch.library.register_fake("ensemble_decode::linear")
    def _linear_fake(
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        out_features: int,
        out_fp32: bool = False,
        scale: Tensor | None = None,
    ) -> Tensor:
        return x.new_empty(*x.shape[:-1], out_features, dtype=torch.float32 if out_fp32 else x.dtype)
