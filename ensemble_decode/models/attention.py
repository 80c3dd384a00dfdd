"""Paged attention under transformers' unchanged modelling code.

Registered with ``AttentionInterface`` and in no mask table, so transformers builds no mask. Which tokens belong to
which sequence, and where their keys and values lie, is not in transformers' arguments: the forward in progress is
kept per thread (a lane runs one forward at a time).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AttentionInterface

from ensemble_decode import ops

ATTENTION = "ensemble_decode"


@dataclass(slots=True)
class Forward:
    """One forward of one group: T tokens of S sequences laid one after another.

    Attributes
    ----------
    query_start : int32 [S + 1]
        Where each sequence's new tokens begin.
    context_len : int32 [S]
        Tokens of each sequence, the new ones included.
    block_table : int32 [S, max_blocks]
    k_cache, v_cache : list of tensors, one a layer
    adapter : int32 [T] or None
        LoRA adapter of each row, −1 for none; None when no row has one.
    """

    query_start: torch.Tensor
    context_len: torch.Tensor
    block_table: torch.Tensor
    k_cache: list[torch.Tensor]
    v_cache: list[torch.Tensor]
    adapter: torch.Tensor | None = None


class _Current(threading.local):
    forward: Forward | None = None


_current = _Current()


def current_forward() -> Forward:
    """The forward that this thread is in."""
    forward = _current.forward
    if forward is None:
        raise RuntimeError("a model made fast by ensemble_decode was called outside its engine")
    return forward


@contextmanager
def running(forward: Forward) -> Iterator[None]:
    """Make ``forward`` the one that layers called from this thread belong to."""
    _current.forward = forward
    try:
        yield
    finally:
        _current.forward = None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query [1, H, T, D], key and value [1, Hkv, T, D]; returns [1, T, H, D]."""
    forward = current_forward()
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = ops.paged_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        forward.k_cache[layer],
        forward.v_cache[layer],
        forward.query_start,
        forward.context_len,
        forward.block_table,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION, _attention)
