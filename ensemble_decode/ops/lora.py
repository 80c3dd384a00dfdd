"""Low-rank adapters, one of several or none for each row, added to the output of a linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import library, reference_layers

#: Columns that lie together in a packed factor.
_LANES = 16


def _pack(factor: Tensor) -> Tensor:
    """[A, n, k] → [A, ⌈n/16⌉, k, 16], in bfloat16 [A, ⌈n/16⌉, ⌈k/2⌉, 16, 2]; padded with zeros."""
    per_step = 2 if factor.dtype == torch.bfloat16 else 1
    padded = torch.nn.functional.pad(factor, (0, -factor.shape[2] % per_step, 0, -factor.shape[1] % _LANES))
    packed = padded.unflatten(1, (-1, _LANES)).unflatten(3, (-1, per_step)).transpose(2, 3).contiguous()
    return packed if per_step == 2 else packed.squeeze(-1)


def pack_lora(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors as the compiled CPU operators read them; unchanged on a GPU, and where there are none.

    Parameters
    ----------
    a : Tensor
        [A, S·r, K]: for each of A adapters the down projections of the S linears that are merged along N.
    b : Tensor
        [A, N, r]: the up projections, with the adapter's scale folded in.

    Returns
    -------
    tuple of Tensor
        (a, b) for :func:`lora_` and for the ``lora`` of :func:`~ensemble_decode.ops.decoder_layers.decoder_layers`.
    """
    if not library.packs(b):
        return a.detach().contiguous(), b.detach().contiguous()
    a, b = a.detach(), b.detach()
    if b.dtype == torch.bfloat16 and b.shape[2] % 2:  # each segment's rank in whole steps
        a = torch.nn.functional.pad(a.unflatten(1, (-1, b.shape[2])), (0, 0, 0, 1)).flatten(1, 2)
        b = torch.nn.functional.pad(b, (0, 1))
    return _pack(a), _pack(b)


def lora_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, adapter: Tensor, segments: Sequence[int]) -> None:
    """y += b · (a · x), in place, with each row's own adapter.

    Parameters
    ----------
    y : Tensor
        [T, N], last dimension contiguous: the output of a linear, or of several merged along N.
    x : Tensor
        [T, K]: its input.
    a, b : Tensor
        From :func:`pack_lora`. (Factors as they were before it work too, and are packed at every call.)
    adapter : Tensor
        [T] int32: the row's adapter, −1 for none.
    segments : sequence of int
        The S output widths; their sum is N.

    Raises
    ------
    RuntimeError
        If shapes or dtypes do not fit, or (seen on a CPU only) an adapter's index is out of range.

    See Also
    --------
    ensemble_decode.ops.reference_layers.lora_ : the definition.
    """
    if library.serves(x):
        if b.dim() == 3 and library.packs(b):
            a, b = pack_lora(a, b)
        torch.ops.ensemble_decode.lora_(y, x, a, b, adapter, segments)
    else:
        reference_layers.lora_(y, x, a, b, adapter, segments)


@library.on_cuda("lora_")
def _lora_cuda(y: Tensor, x: Tensor, a: Tensor, b: Tensor, adapter: Tensor, segments: Sequence[int]) -> None:
    from ensemble_decode.kernels import lora as kernels

    kernels.lora_(y, x, a, b, adapter, segments)


if library.available:

    @torch.library.register_fake("ensemble_decode::lora_")
    def _lora_fake(y: Tensor, x: Tensor, a: Tensor, b: Tensor, adapter: Tensor, segments: Sequence[int]) -> None:
        return None
