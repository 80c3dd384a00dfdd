"""The Llama-shaped decoder layers of a model as one operator: between their parts no Python and hardly any memory traffic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import library, reference_layers
from .linear import GROUP_COLUMNS, pack_weight

#: Gate columns, and up columns, that lie together in a packed group.
_HALF_GROUP = GROUP_COLUMNS // 2
#: Lists that a model may have none of.
_OPTIONAL = ("qkv_bias", "o_bias", "q_norm", "k_norm", "lora", "scales")


def pack_gate_up(gate_up: Tensor) -> Tensor:
    """Packs the merged gate and up projections [2·I, E] so that column i of both comes from one read.

    Only for :func:`decoder_layers`; :func:`~ensemble_decode.ops.linear.linear` cannot use it.
    """
    if not library.packs(gate_up):
        return pack_weight(gate_up)
    both = gate_up.detach().unflatten(0, (2, -1))
    padding = -both.shape[1] % _HALF_GROUP
    if padding:
        both = torch.nn.functional.pad(both, (0, 0, 0, padding))
    return pack_weight(both.unflatten(1, (-1, _HALF_GROUP)).transpose(0, 1).flatten(0, 2))


def decoder_layers(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm1: Sequence[Tensor],
    norm2: Sequence[Tensor],
    qkv: Sequence[Tensor],
    qkv_bias: Sequence[Tensor],
    o: Sequence[Tensor],
    o_bias: Sequence[Tensor],
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    q_norm: Sequence[Tensor],
    k_norm: Sequence[Tensor],
    lora: Sequence[Tensor],
    adapter: Tensor | None,
    k_cache: Sequence[Tensor],
    v_cache: Sequence[Tensor],
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
    """Norm, attention with rotary embedding over the paged cache, residual, norm, gated MLP, residual; L times.

    The layers of Llama, Mistral, Qwen2 (bias on qkv), Qwen3 (norms per head) and Gemma (weight_offset 1, gelu_tanh).
    A token's output depends, to the bit, on its own sequence alone.

    Parameters
    ----------
    hidden : Tensor
        [T, E], contiguous: the new tokens of S sequences, one sequence after another.
    cos, sin : Tensor
        [T, R], R ≤ head_dim, in hidden's dtype or float32: rotary embedding of the first R elements of each head.
    norm1, norm2 : sequence of L Tensor
        [E]: the RMS norms before attention and before the MLP. All weights are of hidden's dtype.
    qkv, o, down : sequence of L Tensor
        From :func:`~ensemble_decode.ops.linear.pack_weight`: query, key and value projections concatenated along N,
        the output projection, and the MLP's second.
    qkv_bias, o_bias : sequence of L Tensor, or of none
        [(H + 2·Hkv)·D], [E].
    gate_up : sequence of L Tensor
        From :func:`pack_gate_up`.
    q_norm, k_norm : sequence of L Tensor, or of none
        [D]: RMS norm of each query and key head, before the rotary embedding.
    lora : sequence of 8·L Tensor, or of none
        (a, b) from :func:`~ensemble_decode.ops.lora.pack_lora` for each of qkv (3 segments), o, gate_up (2 segments) and
        down of the first layer, then of the second, and so on. Members of an ensemble should lie one after another in T:
        consecutive rows with the same adapter read it once.
    adapter : Tensor or None
        [T] int32: each row's adapter, −1 for none.
    k_cache, v_cache : sequence of L Tensor
        As :func:`~ensemble_decode.ops.paged_attention.paged_attention` takes them; all of the same shape.
    query_start, context_len, block_table : Tensor
        As :func:`~ensemble_decode.ops.paged_attention.paged_attention` takes them, the same for every layer.
    num_heads, num_kv_heads, head_dim, intermediate : int
        H, Hkv, D and the MLP's width I.
    eps, weight_offset : float
        Of all the norms, see :func:`~ensemble_decode.ops.rms_norm.rms_norm`.
    scale : float
        Factor on q · k.
    activation : int
        0 silu, 1 gelu_tanh, 2 gelu.
    scales : sequence of 4·L Tensor, or of none
        Those of each layer's qkv, o, gate_up and down where all four are int8, from
        :func:`~ensemble_decode.ops.linear.pack_int8` (on a CPU).

    Returns
    -------
    Tensor
        [T, E], of hidden's dtype.

    Raises
    ------
    RuntimeError
        If counts, shapes or dtypes do not fit, or (seen on a CPU only) a table points outside the cache.

    See Also
    --------
    ensemble_decode.ops.reference_layers.decoder_layer : the definition of one layer.
    """
    layers = torch.ops.ensemble_decode.decoder_layers if library.serves(hidden) else _decoder_layers_reference
    return layers(
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


def _one_by_one(
    layer: Callable[..., Tensor],
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    *rest: Any,
) -> Tensor:
    """:func:`decoder_layers` by a function of one layer."""
    *vectors, lora, adapter, k_cache, v_cache = rest[:14]
    shared, scales = rest[14:-1], rest[-1]
    count = len(vectors[0])
    if count == 0:
        raise RuntimeError("decoder_layers: norm1 has 0 tensors, it must have one for each layer")
    names = ["norm1", "norm2", "qkv", "qkv_bias", "o", "o_bias", "gate_up", "down", "q_norm", "k_norm"]
    lists = dict(zip(names, vectors, strict=True), k_cache=k_cache, v_cache=v_cache, lora=lora, scales=scales)
    each = {"lora": 8 * count, "scales": 4 * count}
    for name, tensors in lists.items():
        allowed, optional = each.get(name, count), name in _OPTIONAL
        if len(tensors) != allowed and not (optional and len(tensors) == 0):
            or_none = "0 or " if optional else ""
            raise RuntimeError(f"decoder_layers: {name} has {len(tensors)} tensors, it must have {or_none}{allowed}")
    for i in range(count):
        own = [tensors[i] if tensors else None for tensors in vectors]
        of_layer = (lora[8 * i : 8 * i + 8], adapter, k_cache[i], v_cache[i])
        hidden = layer(hidden, cos, sin, *own, *of_layer, *shared, scales[4 * i : 4 * i + 4])
    return hidden


def _decoder_layers_reference(hidden: Tensor, *args: Any) -> Tensor:
    return _one_by_one(reference_layers.decoder_layer, hidden, *args)


@library.on_cuda("decoder_layers")
def _decoder_layers_cuda(hidden: Tensor, *args: Any) -> Tensor:
    from ensemble_decode.kernels import decoder_layer as kernels

    return _one_by_one(kernels.decoder_layer, hidden, *args)


if library.available:

    @torch.library.register_fake("ensemble_decode::decoder_layers")
    def _decoder_layers_fake(hidden: Tensor, *args: object) -> Tensor:
        return hidden.new_empty(hidden.shape)
