"""Causal attention over a paged KV cache: decoding and chunked prefill, grouped heads, three small kernels.

The query heads of one key-value head are the rows of a tile, so keys and values are read once for all of them. Sequences
with few new tokens go through tiles of 16 rows, with the context cut into splits that run side by side and are
merged in a fixed order; longer pieces of prompts go through tiles of 64 rows and over their whole context.
Blocks of keys and splits begin at fixed positions, and a row of a product does not depend on the rows beside it, so the
other sequences of a batch do not change a token's bits.

The grid comes from shapes alone and nothing is read back, so a launch can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensemble_decode.kernels.precision import dot_precision

#: Tokens per KV block; the caches are [num_blocks, kv_heads, 16, head_dim].
BLOCK_SIZE: tl.constexpr = tl.constexpr(16)
#: Positions of a split, as long as that makes at most MAX_SPLITS of the block table's width.
SPLIT = 256
MAX_SPLITS = 64
_DECODE_ROWS = 16
_EVERY = 2**31 - 1


@triton.jit
def sequence_of(index, query_start, sequences, TOKENS: tl.constexpr):
    """The sequence that tile ``index`` of ``TOKENS`` tokens belongs to, where no tile spans two sequences.

    With more than one token a tile, sequence s begins at tile ⌊query_start[s] / TOKENS⌋ + s, which leaves room for its
    last, partial tile whatever the lengths are, so that a grid needs to know only their sum.
    """
    found = 0
    for begin in range(0, sequences, 128):
        s = begin + tl.arange(0, 128)
        tile = tl.load(query_start + s, mask=s < sequences, other=0)
        if TOKENS > 1:
            tile = tile // TOKENS + s
        found += tl.sum(((s < sequences) & (tile <= index)).to(tl.int32), 0)
    return found - 1


@triton.jit
def slot_of(token, query_start, context_len, block_table, sequences, table_stride):
    """Where the cache holds a new token: block · 16 + place in the block, int64, is split as (block, place)."""
    s = sequence_of(token, query_start, sequences, 1)
    end = tl.load(query_start + s + 1)
    position = tl.load(context_len + s) - end + token
    block = tl.load(block_table + s.to(tl.int64) * table_stride + position // BLOCK_SIZE)
    return block.to(tl.int64), position % BLOCK_SIZE


@triton.jit(do_not_specialize=["sequences", "table_stride"])
def write_cache(
    k,
    v,
    k_cache,
    v_cache,
    query_start,
    context_len,
    block_table,
    sequences,
    table_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """One program a token: its keys and values to their slot."""
    token = tl.program_id(0)
    block, place = slot_of(token, query_start, context_len, block_table, sequences, table_stride)
    head = tl.arange(0, HEADS_PADDED)[:, None]
    dim = tl.arange(0, DIM_PADDED)[None, :]
    mask = (head < KV_HEADS) & (dim < HEAD_DIM)
    to = ((block * KV_HEADS + head) * BLOCK_SIZE + place) * HEAD_DIM + dim
    row = token.to(tl.int64)
    tl.store(k_cache + to, tl.load(k + row * k_token_stride + head * k_head_stride + dim, mask=mask), mask=mask)
    tl.store(v_cache + to, tl.load(v + row * v_token_stride + head * v_head_stride + dim, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["sequences", "table_stride", "splits", "fewest", "most"])
def attend(
    q,
    k_cache,
    v_cache,
    query_start,
    context_len,
    block_table,
    out,
    sums,
    state,
    sequences,
    table_stride,
    splits,
    fewest,
    most,
    q_token_stride,
    q_head_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: ``TOKENS`` tokens of a sequence × the ``GROUP`` query heads of a key-value head × one split.

    Serves sequences of ``fewest`` … ``most`` new tokens. ``SPLIT`` 0: the whole context. ``ONE_TILE``: a tile is a
    sequence. ``DIRECT``: there is one split, its result is the output; else ``sums`` [rows, H, splits, D] and ``state``
    [rows, H, splits, 2] (maximum, sum) receive it, at rows numbered by token or ``BY_SEQUENCE``.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    s = tile if ONE_TILE else sequence_of(tile, query_start, sequences, TOKENS)
    first = tl.load(query_start + s)
    count = tl.load(query_start + s + 1) - first
    if ONE_TILE:
        done = 0
    elif TOKENS > 1:
        done = (tile - first // TOKENS - s) * TOKENS
    else:
        done = tile - first
    length = tl.load(context_len + s)
    begin = split * SPLIT
    end = length - count + tl.minimum(done + TOKENS, count)
    if SPLIT > 0:
        end = tl.minimum(end, begin + SPLIT)
    if (done >= count) | (count < fewest) | (count > most) | (begin >= end):
        return

    row = tl.arange(0, ROWS)
    token = done + row // GROUP
    query_head = head * GROUP + row % GROUP
    position = length - count + token
    row_mask = (row < TOKENS * GROUP) & (token < count)
    dim = tl.arange(0, DIM_PADDED)
    dim_mask = dim < HEAD_DIM
    at = (first + token).to(tl.int64) * q_token_stride + query_head * q_head_stride
    b_q = tl.load(q + at[:, None] + dim[None, :], mask=row_mask[:, None] & dim_mask[None, :], other=0.0)
    factor = scale * 1.4426950408889634  # exp(x) = 2^(x log2 e)

    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    table = block_table + s.to(tl.int64) * table_stride
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        live = key < end
        block = tl.load(table + key // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        slot = ((block * KV_HEADS + head) * BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_DIM
        # Slots past the end hold anything, NaN too: 0 · NaN would reach the sum.
        mask = live[:, None] & dim_mask[None, :]
        b_k = tl.load(k_cache + slot[:, None] + dim[None, :], mask=mask, other=0.0)
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * factor
        scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
        new_max = tl.maximum(b_max, tl.max(scores, 1))
        safe = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that sees nothing of this split
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(b_max - safe)
        b_sum = b_sum * shrink + tl.sum(weights, 1)
        b_v = tl.load(v_cache + slot[:, None] + dim[None, :], mask=mask, other=0.0)
        b_out = b_out * shrink[:, None] + tl.dot(weights.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_max = new_max

    heads = KV_HEADS * GROUP
    mask = row_mask[:, None] & dim_mask[None, :]
    if DIRECT:
        to = ((first + token).to(tl.int64) * heads + query_head) * HEAD_DIM
        b_out = b_out / tl.where(row_mask, b_sum, 1.0)[:, None]
        tl.store(out + to[:, None] + dim[None, :], b_out.to(out.dtype.element_ty), mask=mask)
    else:
        place = s * TOKENS + token if BY_SEQUENCE else first + token
        cell = (place.to(tl.int64) * heads + query_head) * splits + split
        tl.store(sums + cell[:, None] * HEAD_DIM + dim[None, :], b_out, mask=mask)
        tl.store(state + cell * 2, b_max, mask=row_mask)
        tl.store(state + cell * 2 + 1, b_sum, mask=row_mask)


@triton.jit(do_not_specialize=["sequences", "splits", "most"])
def merge(
    sums,
    state,
    query_start,
    context_len,
    out,
    sequences,
    splits,
    most,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
):
    """One program a token and head: the splits up to its own position, in one reduction of fixed shape."""
    head = tl.program_id(1)
    if BY_SEQUENCE:
        place = tl.program_id(0)
        s = place // TOKENS
        token = place % TOKENS
        first = tl.load(query_start + s)
    else:
        place = tl.program_id(0)
        s = sequence_of(place, query_start, sequences, 1)
        first = tl.load(query_start + s)
        token = place - first
    count = tl.load(query_start + s + 1) - first
    if (token >= count) | (count > most):
        return
    position = tl.load(context_len + s) - count + token
    split = tl.arange(0, SPLITS_PADDED)
    used = split * SPLIT <= position
    dim = tl.arange(0, DIM_PADDED)
    dim_mask = dim < HEAD_DIM
    cell = (place.to(tl.int64) * HEADS + head) * splits + split
    b_max = tl.load(state + cell * 2, mask=used, other=float("-inf"))
    b_sum = tl.load(state + cell * 2 + 1, mask=used, other=0.0)
    weight = tl.exp2(b_max - tl.max(b_max, 0))
    b_out = tl.load(sums + cell[:, None] * HEAD_DIM + dim[None, :], mask=used[:, None] & dim_mask[None, :], other=0.0)
    total = tl.sum(b_sum * weight, 0)
    b_out = tl.sum(b_out * weight[:, None], 0) / total
    to = ((first + token).to(tl.int64) * HEADS + head) * HEAD_DIM
    tl.store(out + to + dim, b_out.to(out.dtype.element_ty), mask=dim_mask)


def split_length(table_width: int) -> int:
    """Positions of a split for a block table of that width: 256, doubled while there would be more than 64 splits."""
    length = SPLIT
    while length * MAX_SPLITS < table_width * BLOCK_SIZE.value:
        length *= 2
    return length


def padded_dim(head_dim: int) -> int:
    """A tile's width: a power of two, and enough for a tensor core."""
    return max(16, triton.next_power_of_2(head_dim))


def prefill_rows(dtype: torch.dtype) -> int:
    """Rows of a tile of a long piece: in float32 a product takes three, and 64 rows no longer fit the registers."""
    return 16 if dtype == torch.float32 else 64


def keys_per_step(head_dim: int, dtype: torch.dtype) -> int:
    """Keys of one step of the loop: 16 KiB of them, 16 to 64. They are a power of two and so divide a split."""
    return max(16, min(64, 16384 // (padded_dim(head_dim) * dtype.itemsize)))


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
    """Writes the new tokens' keys and values, then attends: see ``ensemble_decode.ops.paged_attention``.

    What the index tensors say is not checked: that would need the host to wait for the device.
    """
    check_attention(q, k, v, k_cache, v_cache, query_start, context_len, block_table)
    tokens, kv_heads, head_dim = k.shape
    if tokens > 0:
        write_cache[(tokens,)](
            k,
            v,
            k_cache,
            v_cache,
            query_start,
            context_len,
            block_table,
            context_len.shape[0],
            block_table.stride(0),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            HEADS_PADDED=triton.next_power_of_2(kv_heads),
            DIM_PADDED=padded_dim(head_dim),
            num_warps=1 if kv_heads * head_dim <= 1024 else 4,
        )
    return attention(q, k_cache, v_cache, query_start, context_len, block_table, scale)


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    block_table: Tensor,
    scale: float,
) -> Tensor:
    """Attention alone: the new keys and values are in the caches already. [T, H, D], contiguous."""
    tokens, heads, head_dim = q.shape
    kv_heads, sequences = v_cache.shape[1], context_len.shape[0]
    group = heads // kv_heads
    out = torch.empty(tokens, heads, head_dim, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    dim, keys = padded_dim(head_dim), keys_per_step(head_dim, q.dtype)
    few = max(1, _DECODE_ROWS // group)
    # A sequence with at most `few` new tokens is one decode tile. Where there are no more tokens than sequences, or
    # fewer than a tile has, nothing is left for the tiles of prefill; one sequence is either the one or the other.
    decode_only = tokens <= max(sequences, few)
    if decode_only or sequences > 1:
        length = split_length(block_table.shape[1])
        splits = max(1, triton.cdiv(block_table.shape[1] * BLOCK_SIZE.value, length))
        by_token = decode_only and tokens <= sequences
        by_sequence = not by_token and tokens > sequences * few
        rows = sequences * few if by_sequence else tokens
        most = _EVERY if by_token else few
        sums = state = out  # not used where there is one split
        if splits > 1:
            sums = torch.empty(rows, heads, splits, head_dim, dtype=torch.float32, device=q.device)
            state = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=q.device)
        attend[(tokens if by_token else sequences, kv_heads, splits)](
            q,
            k_cache,
            v_cache,
            query_start,
            context_len,
            block_table,
            out,
            sums,
            state,
            sequences,
            block_table.stride(0),
            splits,
            0,
            most,
            q.stride(0),
            q.stride(1),
            scale,
            KV_HEADS=kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            DIM_PADDED=dim,
            TOKENS=1 if by_token else few,
            ROWS=max(_DECODE_ROWS, triton.next_power_of_2(group)),
            KEYS=keys,
            SPLIT=length,
            ONE_TILE=not by_token,
            BY_SEQUENCE=by_sequence,
            DIRECT=splits == 1,
            PRECISION=dot_precision(),
            num_warps=8 if q.dtype == torch.float32 else 4,
            num_stages=2 if q.dtype == torch.float32 else 3,
        )
        if splits > 1:
            merge[(rows, heads)](
                sums,
                state,
                query_start,
                context_len,
                out,
                sequences,
                splits,
                most,
                HEADS=heads,
                HEAD_DIM=head_dim,
                DIM_PADDED=dim,
                TOKENS=few,
                SPLIT=length,
                SPLITS_PADDED=triton.next_power_of_2(splits),
                BY_SEQUENCE=by_sequence,
                num_warps=4,
            )
    if not decode_only:
        per_tile = max(1, prefill_rows(q.dtype) // group)
        attend[(tokens // per_tile + sequences if per_tile > 1 else tokens, kv_heads, 1)](
            q,
            k_cache,
            v_cache,
            query_start,
            context_len,
            block_table,
            out,
            out,
            out,
            sequences,
            block_table.stride(0),
            1,
            few + 1,
            _EVERY,
            q.stride(0),
            q.stride(1),
            scale,
            KV_HEADS=kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            DIM_PADDED=dim,
            TOKENS=per_tile,
            ROWS=max(prefill_rows(q.dtype), triton.next_power_of_2(group)),
            KEYS=keys,
            SPLIT=0,
            ONE_TILE=False,
            BY_SEQUENCE=False,
            DIRECT=True,
            PRECISION=dot_precision(),
            num_warps=8,
            num_stages=2,
        )
    return out


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    block_table: Tensor,
) -> None:
    """What the host can see without waiting for the device: shapes, dtypes and strides."""
    name = "paged_attention"
    tokens, heads, head_dim = q.shape
    kv_heads, sequences = k.shape[1], context_len.shape[0]
    if kv_heads == 0 or heads % kv_heads:
        raise RuntimeError(
            f"{name}: there are {heads} query heads, it must be a multiple of the {kv_heads} key and value heads"
        )
    if head_dim % 2 or not 0 < head_dim <= 512:
        raise RuntimeError(f"{name}: head_dim is {head_dim}, it must be even and at most 512")
    for label, x in (("k", k), ("v", v)):
        if x.shape != (tokens, kv_heads, head_dim):
            raise RuntimeError(f"{name}: {label} is {list(x.shape)}, it must be {[tokens, kv_heads, head_dim]}")
    for label, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.shape[1:] != (kv_heads, BLOCK_SIZE.value, head_dim) or not x.is_contiguous():
            raise RuntimeError(
                f"{name}: {label} is {list(x.shape)}, it must be contiguous [blocks, {kv_heads}, {BLOCK_SIZE.value}, {head_dim}]"
            )
    for label, x in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dtype != q.dtype:
            raise RuntimeError(f"{name}: {label} is {x.dtype}, it must be q's {q.dtype}")
    for label, x in (("q", q), ("k", k), ("v", v), ("block_table", block_table)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise RuntimeError(f"{name}: {label}'s last dimension must be contiguous")
    for label, x, shape in (
        ("query_start", query_start, (sequences + 1,)),
        ("context_len", context_len, (sequences,)),
        ("block_table", block_table, (sequences, block_table.shape[-1])),
    ):
        if x.dtype != torch.int32 or x.shape != shape:
            raise RuntimeError(f"{name}: {label} is {x.dtype} {list(x.shape)}, it must be torch.int32 {list(shape)}")
