"""Low-rank adapters, one of several or none for each row, added to the output of a linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import library, reference_layers

#: Columns that lie together in a packed b.
_LANES = 16


def pack_lora_b(b: Tensor) -> Tensor:
    """b [A, N, r] as the compiled operators read it fastest, [A, ⌈N/16⌉, r, 16]; b itself where there are none."""
    if not (library.available and b.is_cpu):
        return b
    padded = torch.nn.functional.pad(b.detach(), (0, 0, 0, -b.shape[1] % _LANES))
    return padded.unflatten(1, (-1, _LANES)).transpose(2, 3).contiguous()


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
        [A, N, r], contiguous: the up projections, with the adapter's scale folded in; or :func:`pack_lora_b` of it,
        which is much faster.
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
