"""What the layer operators mean, in plain PyTorch: the definition that every other implementation is held to.

All arithmetic is in float32 and rounded once, at the end; only what a cache stores is rounded in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

#: Tokens per KV block, in every pool.
BLOCK_SIZE = 16

#: By the number that the operator's schema has for it: silu, gelu_tanh, gelu.
ACTIVATIONS = (F.silu, partial(F.gelu, approximate="tanh"), F.gelu)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out_fp32: bool = False, scale: Tensor | None = None
) -> Tensor:
    """x [..., K] · weightᵀ [K, N] · scale [N] + bias [N], summed in float32; scale, where weights are int8, is by row."""
    weight = weight.float() if scale is None else weight.float() * scale.unsqueeze(1)
    y = F.linear(x.float(), weight, None if bias is None else bias.float())
    return y if out_fp32 else y.to(x.dtype)


def lora_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, adapter: Tensor, segments: Sequence[int]) -> None:
    """Adds its adapter's b · (a · x) to every row of y that has one; segment s of y uses rows s·r … of a."""
    y.copy_(y.float() + lora_delta(x, a, b, adapter, segments))


def lora_delta(x: Tensor, a: Tensor, b: Tensor, adapter: Tensor, segments: Sequence[int]) -> Tensor:
    """The float32 [T, N] that :func:`lora_` adds."""
    rank = b.shape[-1]
    delta = x.new_zeros(x.shape[0], sum(segments), dtype=torch.float32)
    for row, index in enumerate(adapter.tolist()):
        if index < 0:
            continue
        low = a[index].float() @ x[row].float()
        start = 0
        for s, width in enumerate(segments):
            columns = slice(start, start + width)
            delta[row, columns] = b[index, columns].float() @ low[s * rank : (s + 1) * rank]
            start += width
    return delta


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """x / √(mean(x²) + eps) · (weight_offset + weight), over the last dimension."""
    v = x.float()
    v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    return (v * (weight_offset + weight.float())).to(x.dtype)


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
    """Writes k and v to their slots, then lets every new token attend to its sequence's keys up to itself.

    Here both caches are [num_blocks, kv_heads, 16, head_dim].
    """
    starts, lengths = query_start.tolist(), context_len.tolist()
    k_cache = k_cache.view(v_cache.shape)
    for s, length in enumerate(lengths):
        rows = slice(starts[s], starts[s + 1])
        positions = torch.arange(length - (starts[s + 1] - starts[s]), length)
        blocks = block_table[s, positions // BLOCK_SIZE].long()
        k_cache[blocks, :, positions % BLOCK_SIZE] = k[rows]
        v_cache[blocks, :, positions % BLOCK_SIZE] = v[rows]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    group = q.shape[1] // k.shape[1]
    for s, length in enumerate(lengths):
        rows = slice(starts[s], starts[s + 1])
        count = starts[s + 1] - starts[s]
        if count == 0:
            continue
        blocks = block_table[s, : -(-length // BLOCK_SIZE)].long()
        keys, values = (
            cache[blocks].transpose(1, 2).flatten(0, 1)[:length].float().repeat_interleave(group, dim=1)
            for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("thd,khd->htk", q[rows].float(), keys) * scale
        future = torch.arange(length) > torch.arange(length - count, length).unsqueeze(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("htk,khd->thd", weights, values).to(q.dtype)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, D] with cos and sin [T, R], R ≤ D, in transformers' half-and-half layout."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1).float(), sin.unsqueeze(1).float()
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def decoder_layer(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm1: Tensor,
    norm2: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    o: Tensor,
    o_bias: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    lora: Sequence[Tensor],
    adapter: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    block_table: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate: int,
    eps: float,
    weight_offset: float,
    scale: float,
    activation: int,
    scales: Sequence[Tensor] = (),
) -> Tensor:
    """One pre-norm decoder layer with the weights as matrices: qkv [(H + 2·Hkv)·D, E], o, gate_up [2·I, E], down."""
    dtype = hidden.dtype
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]

    def project(x: Tensor, weight: Tensor, bias: Tensor | None, index: int, segments: list[int]) -> Tensor:
        x = x.to(dtype)
        y = linear(x, weight, bias, out_fp32=True, scale=scales[index] if scales else None)
        if lora and adapter is not None:
            y = y + lora_delta(x, lora[2 * index], lora[2 * index + 1], adapter, segments)
        return y

    x = rms_norm(hidden, norm1, eps, weight_offset)
    q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in project(x, qkv, qkv_bias, 0, sizes).split(sizes, dim=-1))
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps, weight_offset)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps, weight_offset)
    attended = paged_attention(
        rotate(q, cos, sin).to(dtype),
        rotate(k, cos, sin).to(dtype),
        v.to(dtype),
        k_cache,
        v_cache,
        query_start,
        context_len,
        block_table,
        scale,
    ).flatten(1)
    residual = hidden.float() + project(attended, o, o_bias, 1, [o.shape[0]])
    x = rms_norm(residual, norm2, eps, weight_offset)
    gate, up = project(x, gate_up, None, 2, [intermediate, intermediate]).split(intermediate, dim=-1)
    product = ACTIVATIONS[activation](gate) * up
    return (residual + project(product, down, None, 3, [down.shape[0]])).to(dtype)
