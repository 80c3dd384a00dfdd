"""Causal attention over a paged KV cache, for decoding and (chunked) prefill alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import library, reference_layers
from .reference_layers import BLOCK_SIZE


def new_caches(
    num_blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """An empty (k_cache, v_cache) for :func:`paged_attention`, each [num_blocks, kv_heads, 16, head_dim].

    Block b is ``cache[b]`` in both and may be copied whole; within a block the layout of k_cache is private.
    """
    shape = (num_blocks, kv_heads, BLOCK_SIZE, head_dim)
    return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    block_table: Tensor,
    scale: float,
) -> Tensor:
    """Writes the new tokens' keys and values into the caches, then lets each attend to its sequence up to itself.

    A token's output depends, to the bit, on its sequence alone: not on the batch, the threads, or the way in which a
    prefill was cut into chunks.

    Parameters
    ----------
    q : Tensor
        [T, H, D]: the queries of S sequences' new tokens, one sequence after another. D even. Last dimension
        contiguous, as in ``k`` and ``v``.
    k, v : Tensor
        [T, Hkv, D], H a multiple of Hkv.
    k_cache, v_cache : Tensor
        From :func:`new_caches`, of q's dtype; written in place.
    query_start : Tensor
        [S + 1] int32: sequence s owns rows ``query_start[s]`` … ``query_start[s + 1] − 1`` of q.
    context_len : Tensor
        [S] int32: its tokens, the new ones included.
    block_table : Tensor
        [S, max_blocks] int32: the block of positions 16·i … 16·i + 15. A sequence may read blocks that another one
        writes in the same call only where both write the same values.
    scale : float
        Factor on q · k.

    Returns
    -------
    Tensor
        [T, H, D].

    Raises
    ------
    RuntimeError
        If shapes or dtypes do not fit, or (seen on a CPU only, a GPU's values would have to be waited for) a table points
        outside the cache.

    Notes
    -----
    On a GPU nothing is read back from the device and the launches follow from shapes alone, so that a CUDA graph can hold
    them; padding rows of a batch need a length of at least 1 and a block of their own. Tokens come through a tile of 16
    rows where a sequence brings few of them and through one of 64 where it brings many: between those two the bits
    may differ, and only there.

    See Also
    --------
    ensemble_decode.ops.reference_layers.paged_attention : the definition.
    """
    if library.serves(q):
        return torch.ops.ensemble_decode.paged_attention(
            q, k, v, k_cache, v_cache, query_start, context_len, block_table, scale
        )
    return reference_layers.paged_attention(q, k, v, k_cache, v_cache, query_start, context_len, block_table, scale)


@library.on_cuda("paged_attention")
def _paged_attention_cuda(q: Tensor, *args: Any) -> Tensor:
    from ensemble_decode.kernels import paged_attention as kernels

    return kernels.paged_attention(q, *args)


if library.available:

    @torch.library.register_fake("ensemble_decode::paged_attention")
    def _paged_attention_fake(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        block_table: Tensor,
        scale: float,
    ) -> Tensor:
        return q.new_empty(q.shape)
