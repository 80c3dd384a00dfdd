"""A whole Llama-shaped decoder layer as one operator: between its parts no Python and hardly any memory traffic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import library, reference_layers
from .linear import GROUP_COLUMNS, pack_weight

#: Gate columns, and up columns, that lie together in a packed group.
_HALF_GROUP = GROUP_COLUMNS // 2


def pack_gate_up(gate_up: Tensor) -> Tensor:
    """Packs the merged gate and up projections [2·I, E] so that column i of both comes from one read.

    Only for :func:`decoder_layer`; :func:`~ensemble_decode.ops.linear.linear` cannot use it.
    """
    if not library.packs(gate_up):
        return pack_weight(gate_up)
    both = gate_up.detach().unflatten(0, (2, -1))
    padding = -both.shape[1] % _HALF_GROUP
    if padding:
        both = torch.nn.functional.pad(both, (0, 0, 0, padding))
    return pack_weight(both.unflatten(1, (-1, _HALF_GROUP)).transpose(0, 1).flatten(0, 2))


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
    """Norm, attention with rotary embedding over the paged cache, residual, norm, gated MLP, residual.

    The layer of Llama, Mistral, Qwen2 (bias on qkv), Qwen3 (norms per head) and Gemma (weight_offset 1, gelu_tanh).
    A token's output depends, to the bit, on its own sequence alone.

    Parameters
    ----------
    hidden : Tensor
        [T, E], contiguous: the new tokens of S sequences, one sequence after another.
    cos, sin : Tensor
        [T, R], R ≤ head_dim, in hidden's dtype or float32: rotary embedding of the first R elements of each head.
    norm1, norm2 : Tensor
        [E]: the RMS norms before attention and before the MLP. All weights are of hidden's dtype.
    qkv, o, down : Tensor
        From :func:`~ensemble_decode.ops.linear.pack_weight`: query, key and value projections concatenated along N,
        the output projection, and the MLP's second.
    qkv_bias, o_bias : Tensor or None
        [(H + 2·Hkv)·D], [E].
    gate_up : Tensor
        From :func:`pack_gate_up`.
    q_norm, k_norm : Tensor or None
        [D]: RMS norm of each query and key head, before the rotary embedding.
    lora : list of Tensor
        Nothing, or (a, b) from :func:`~ensemble_decode.ops.lora.pack_lora` for each of qkv (3 segments), o, gate_up
        (2 segments) and down. Members of an ensemble should lie one after another in T: consecutive rows with the
        same adapter read it once.
    adapter : Tensor or None
        [T] int32: each row's adapter, −1 for none.
    k_cache, v_cache, query_start, context_len, block_table : Tensor
        As :func:`~ensemble_decode.ops.paged_attention.paged_attention` takes them.
    num_heads, num_kv_heads, head_dim, intermediate : int
        H, Hkv, D and the MLP's width I.
    eps, weight_offset : float
        Of all the norms, see :func:`~ensemble_decode.ops.rms_norm.rms_norm`.
    scale : float
        Factor on q · k.
    activation : int
        0 silu, 1 gelu_tanh, 2 gelu.
    scales : sequence of Tensor
        Nothing, or those of qkv, o, gate_up and down where all four are int8, from
        :func:`~ensemble_decode.ops.linear.pack_int8` (on a CPU).

    Returns
    -------
    Tensor
        [T, E], of hidden's dtype.

    Raises
    ------
    RuntimeError
        If shapes or dtypes do not fit, or (seen on a CPU only) a table points outside the cache.

    See Also
    --------
    ensemble_decode.ops.reference_layers.decoder_layer : the definition.
    """
    layer = torch.ops.ensemble_decode.decoder_layer if library.serves(hidden) else reference_layers.decoder_layer
    return layer(
        hidden,
        cos,
        sin,
        norm1,
        norm2,
        qkv,
        qkv_bias,
        o,
        o_bias,
        gate_up,
        down,
        q_norm,
        k_norm,
        lora,
        adapter,
        k_cache,
        v_cache,
        query_start,
        context_len,
        block_table,
        num_heads,
        num_kv_heads,
        head_dim,
        intermediate,
        eps,
        weight_offset,
        scale,
        activation,
        scales,
    )


@library.on_cuda("decoder_layer")
def _decoder_layer_cuda(hidden: Tensor, *args: Any) -> Tensor:
    from ensemble_decode.kernels import decoder_layer as kernels

    return kernels.decoder_layer(hidden, *args)


if library.available:

    @torch.library.register_fake("ensemble_decode::decoder_layer")
    def _decoder_layer_fake(hidden: Tensor, *args: object) -> Tensor:
        return hidden.new_empty(hidden.shape)
