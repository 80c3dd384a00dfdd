"""A Llama-shaped decoder layer on a GPU: the vendor's products, and a small kernel for each thing between two of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ensemble_decode.kernels.activation import gated
from ensemble_decode.kernels.linear import linear
from ensemble_decode.kernels.lora import lora_
from ensemble_decode.kernels.paged_attention import attention
from ensemble_decode.kernels.rms_norm import add, add_rms_norm, rms_norm
from ensemble_decode.kernels.rotary import rotary_and_cache


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
    lora: list[Tensor],
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
    """One of the layers of ``ensemble_decode.ops.decoder_layers``. What the products give is of hidden's dtype, the residual float32."""
    if scales:
        raise RuntimeError(f"decoder_layers: scales has {len(scales)} tensors, it must have 0 here (int8 is for a CPU)")
    if activation not in (0, 1, 2):
        raise RuntimeError(
            f"decoder_layers: activation is {activation}, it must be 0 (silu), 1 (gelu_tanh) or 2 (gelu)"
        )
    if cos.shape != sin.shape or cos.stride() != sin.stride() or cos.stride(-1) != 1:
        raise RuntimeError(
            "decoder_layers: cos and sin must have the same shape and strides, the last dimension contiguous"
        )
    if k_cache.shape != v_cache.shape or v_cache.shape[1] != num_kv_heads or v_cache.shape[3] != head_dim:
        raise RuntimeError(
            f"decoder_layers: v_cache is {list(v_cache.shape)}, it must be [blocks, {num_kv_heads}, 16, {head_dim}]"
        )
    q_width, kv_width, width = num_heads * head_dim, num_kv_heads * head_dim, hidden.shape[1]

    def project(x: Tensor, weight: Tensor, bias: Tensor | None, index: int, segments: list[int]) -> Tensor:
        y = linear(x, weight, bias, sum(segments))
        if lora and adapter is not None:
            lora_(y, x, lora[2 * index], lora[2 * index + 1], adapter, segments)
        return y

    x = rms_norm(hidden, norm1, eps, weight_offset)
    projected = project(x, qkv, qkv_bias, 0, [q_width, kv_width, kv_width])
    q = rotary_and_cache(
        projected,
        cos,
        sin,
        q_norm,
        k_norm,
        k_cache,
        v_cache,
        query_start,
        context_len,
        block_table,
        num_heads,
        eps,
        weight_offset,
    )
    attended = attention(q, k_cache, v_cache, query_start, context_len, block_table, scale).flatten(1)
    residual, x = add_rms_norm(hidden, project(attended, o, o_bias, 1, [width]), norm2, eps, weight_offset)
    product = gated(project(x, gate_up, None, 2, [intermediate, intermediate]), activation)
    return add(residual, project(product, down, None, 3, [width]), hidden.dtype)
