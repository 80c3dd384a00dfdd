"""RMS norm in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from . import library, reference_layers


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """x / √(mean(x²) + eps) · (weight_offset + weight) over the last dimension, in float32, rounded once.

    Parameters
    ----------
    x : Tensor
        [..., E], float32, bfloat16 or float16.
    weight : Tensor
        [E], of the same dtype.
    eps : float
        Added to the mean of squares.
    weight_offset : float
        1 for models that store weight − 1 (Gemma), else 0.

    Returns
    -------
    Tensor
        [..., E], of x's dtype.

    Raises
    ------
    RuntimeError
        If shapes or dtypes do not fit.

    See Also
    --------
    ensemble_decode.ops.reference_layers.rms_norm : the definition.
    """
    if library.serves(x):
        return torch.ops.ensemble_decode.rms_norm(x, weight, eps, weight_offset)
    return reference_layers.rms_norm(x, weight, eps, weight_offset)


@library.on_cuda("rms_norm")
def _rms_norm_cuda(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    from ensemble_decode.kernels import rms_norm as kernels

    return kernels.rms_norm(x, weight, eps, weight_offset)


if library.available:

    @torch.library.register_fake("ensemble_decode::rms_norm")
    def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
        return x.new_empty(x.shape)
