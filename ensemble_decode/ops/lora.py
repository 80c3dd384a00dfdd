"""Low-rank adapters, one of several or none for each row, added to the output of a linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import library, reference_layers


def pack_lora_b(b: Tensor) -> Tensor:
    """A copy of b [A, N, r] whose memory lies as [A, r, N], which the compiled operators read fastest."""
    return b.detach().transpose(1, 2).contiguous().transpose(1, 2)


def lora_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, adapter: Tensor, segments: Sequence[int]) -> None:
    """y += b · (a · x), in place, with each row's own adapter.

    Parameters
    ----------
    y : Tensor
        [T, N], last dimension contiguous: the output of a linear, or of several merged along N.
    x : Tensor
        [T, K]: its input.
    a : Tensor
        [A, S·r, K], contiguous: for each of A adapters the down projections of the S merged linears.
    b : Tensor
        [A, N, r]: the up projections, with the adapter's scale folded in. Fastest from :func:`pack_lora_b`.
    adapter : Tensor
        [T] int32: the row's adapter, −1 for none.
    segments : sequence of int
        The S output widths; their sum is N.

    Raises
    ------
    RuntimeError
        If shapes or dtypes do not fit, or an adapter's index is out of range.

    See Also
    --------
    ensemble_decode.ops.reference_layers.lora_ : the definition.
    """
    if library.available and x.is_cpu:
        torch.ops.ensemble_decode.lora_(y, x, a, b, adapter, segments)
    else:
        reference_layers.lora_(y, x, a, b, adapter, segments)


if library.available:

    @torch.library.register_fake("ensemble_decode::lora_")
    def _lora_fake(y: Tensor, x: Tensor, a: Tensor, b: Tensor, adapter: Tensor, segments: Sequence[int]) -> None:
        return None
