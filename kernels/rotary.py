"""From a merged projection to attention's inputs: norms per head, rotary embedding, and the new slots of the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensemble_decode.kernels.paged_attention import BLOCK_SIZE, padded_dim, slot_of

#: Heads of one program.
_HEADS = 4


@triton.jit(do_not_specialize=["sequences", "table_stride"])
def rotate_and_write(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    q,
    k_cache,
    v_cache,
    query_start,
    context_len,
    block_table,
    sequences,
    table_stride,
    rotary_stride,
    eps,
    offset,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
):
    """One program: some heads of one token. Query heads go to ``q`` [T, H, D], keys and values to the cache."""
    token = tl.program_id(0)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    dim = tl.arange(0, DIM_PADDED)[None, :]
    mask = (head < HEADS + 2 * KV_HEADS) & (dim < HEAD_DIM)
    row = token.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    is_query = head < HEADS
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)

    # The element that each one is turned with: i with i ± R / 2 among the first R.
    half: tl.constexpr = ROTARY_DIM // 2
    other = tl.where(dim < half, dim + half, tl.where(dim < ROTARY_DIM, dim - half, dim))
    value = tl.load(qkv + row + head * HEAD_DIM + dim, mask=mask, other=0.0)
    plain = value
    partner = tl.load(qkv + row + head * HEAD_DIM + other, mask=mask, other=0.0).to(tl.float32)
    value = value.to(tl.float32)
    if Q_NORM or K_NORM:
        scale = tl.rsqrt(tl.sum(value * value, 1) / HEAD_DIM + eps)[:, None]
        if Q_NORM:
            value = tl.where(is_query, value * scale * (offset + _weight(q_norm, dim, HEAD_DIM)), value)
            partner = tl.where(is_query, partner * scale * (offset + _weight(q_norm, other, HEAD_DIM)), partner)
        if K_NORM:
            value = tl.where(is_key, value * scale * (offset + _weight(k_norm, dim, HEAD_DIM)), value)
            partner = tl.where(is_key, partner * scale * (offset + _weight(k_norm, other, HEAD_DIM)), partner)
    turns = dim < ROTARY_DIM
    at = token.to(tl.int64) * rotary_stride + dim
    b_cos = tl.load(cos + at, mask=turns, other=1.0).to(tl.float32)
    b_sin = tl.load(sin + at, mask=turns, other=0.0).to(tl.float32)
    turned = value * b_cos + tl.where(dim < half, -partner, partner) * b_sin
    turned = tl.where(turns, turned, value).to(plain.dtype)

    tl.store(q + token.to(tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM + dim, turned, mask=mask & is_query)
    block, place = slot_of(token, query_start, context_len, block_table, sequences, table_stride)
    key_head = head - HEADS
    value_head = key_head - KV_HEADS
    to_key = ((block * KV_HEADS + key_head) * BLOCK_SIZE + place) * HEAD_DIM + dim
    to_value = ((block * KV_HEADS + value_head) * BLOCK_SIZE + place) * HEAD_DIM + dim
    tl.store(k_cache + to_key, turned, mask=mask & is_key)
    tl.store(v_cache + to_value, plain, mask=mask & (value_head >= 0))


@triton.jit
def _weight(pointer, dim, HEAD_DIM: tl.constexpr):
    return tl.load(pointer + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)


def rotary_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    block_table: Tensor,
    num_heads: int,
    eps: float,
    weight_offset: float,
) -> Tensor:
    """Splits ``qkv`` [T, (H + 2·Hkv)·D], normalises and rotates queries and keys, writes keys and values to the cache.

    Returns
    -------
    Tensor
        Queries [T, H, D].
    """
    tokens = qkv.shape[0]
    kv_heads, head_dim = v_cache.shape[1], v_cache.shape[3]
    q = torch.empty(tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return q
    rotate_and_write[(tokens, triton.cdiv(num_heads + 2 * kv_heads, _HEADS))](
        qkv,
        cos,
        sin,
        q if q_norm is None else q_norm,
        q if k_norm is None else k_norm,
        q,
        k_cache,
        v_cache,
        query_start,
        context_len,
        block_table,
        context_len.shape[0],
        block_table.stride(0),
        cos.stride(0),
        float(eps),
        float(weight_offset),
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        DIM_PADDED=padded_dim(head_dim),
        ROTARY_DIM=cos.shape[-1],
        BLOCK_HEADS=_HEADS,
        Q_NORM=q_norm is not None,
        K_NORM=k_norm is not None,
        num_warps=1 if head_dim <= 128 else 2,
    )
    return q
