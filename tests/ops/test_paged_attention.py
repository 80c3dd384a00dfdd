import random as python_random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ensemble_decode.ops import library, new_caches, paged_attention, reference_layers
from ensemble_decode.ops.paged_attention import BLOCK_SIZE

from .cpu import DTYPES, ROUNDING, needs_library, random, relative_error, threads, variant

__all__ = ["variant"]
HEADS = [(9, 3, 64), (4, 4, 20), (8, 1, 80), (2, 2, 256), (50, 1, 24), (3, 3, 16), (4, 2, 8)]  # H, Hkv, D
LENGTHS = (1, 17, 300, 600)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Sequences:
    """Whole sequences, and a cache full of NaN with a scattered block table to compute them in, step by step."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor

    @classmethod
    def make(cls, heads: tuple[int, int, int], dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS) -> "Sequences":
        h, hkv, d = heads
        used = [-(-n // BLOCK_SIZE) for n in lengths]
        blocks = torch.randperm(sum(used) + 2)[: sum(used)].int().split(used)
        table = torch.full((len(lengths), max(used) + 3), -1, dtype=torch.int32)  # with a stride and unused entries
        for row, own in zip(table, blocks, strict=True):
            row[: len(own)] = own
        k_cache, v_cache = (cache.fill_(float("nan")) for cache in new_caches(sum(used) + 2, hkv, d, dtype))
        q, k, v = ([random(n, x, d, dtype=dtype) for n in lengths] for x in (h, hkv, hkv))
        return cls(q, k, v, k_cache, v_cache, table)

    def step(self, starts: list[int], counts: list[int], op=paged_attention) -> list[Tensor]:
        """The outputs of the next ``counts[s]`` tokens of each sequence, from token ``starts[s]`` on."""
        new = [slice(a, a + n) for a, n in zip(starts, counts, strict=True)]
        q, k, v = (torch.cat([x[rows] for x, rows in zip(part, new, strict=True)]) for part in (self.q, self.k, self.v))
        query_start = ints(0, *torch.tensor(counts).cumsum(0).tolist())
        context_len = ints(*(rows.stop for rows in new))
        scale = q.shape[-1] ** -0.5
        out = op(q, k, v, self.k_cache, self.v_cache, query_start, context_len, self.block_table, scale)
        return list(out.split(counts))

    def whole(self, op=paged_attention) -> list[Tensor]:
        return self.step([0] * len(self.q), [len(x) for x in self.q], op)

    def exact(self, s: int) -> Tensor:
        group = self.q[s].shape[1] // self.k[s].shape[1]
        q, k, v = (x[s].double().transpose(0, 1) for x in (self.q, self.k, self.v))
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_equals_scaled_dot_product_attention(variant: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    sequences = Sequences.make(heads, dtype)
    for s, out in enumerate(sequences.whole()):
        assert relative_error(out, sequences.exact(s)) < ROUNDING[dtype]


def test_the_reference_equals_scaled_dot_product_attention() -> None:
    sequences = Sequences.make(HEADS[0], torch.float32, (1, 17, 40))
    first = sequences.step([0, 0, 0], [1, 10, 0], reference_layers.paged_attention)
    second = sequences.step([1, 10, 0], [0, 7, 40], reference_layers.paged_attention)
    for s in range(3):
        assert relative_error(torch.cat([first[s], second[s]]), sequences.exact(s)) < ROUNDING[torch.float32]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 20), (50, 1, 16)], ids=str)
def test_any_chunking_gives_the_same_bits(variant: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    """One prefill, ragged chunks beside other sequences, token by token: equal to the bit."""
    torch.manual_seed(1)
    sequences = Sequences.make(heads, dtype)
    whole = sequences.whole()
    chooser = python_random.Random(0)
    sequences.k_cache.fill_(float("nan"))
    sequences.v_cache.fill_(float("nan"))
    done, parts, step = [0] * len(LENGTHS), [[] for _ in LENGTHS], 0
    while done != list(LENGTHS):
        counts = [min(n - d, chooser.choice([0, 1, 7, 33, 100])) for n, d in zip(LENGTHS, done, strict=True)]
        with threads(1 + step % 2):
            for part, out in zip(parts, sequences.step(done, counts), strict=True):
                part.append(out)
        done = [d + n for d, n in zip(done, counts, strict=True)]
        step += 1
    for s, part in enumerate(parts):
        assert torch.equal(torch.cat(part), whole[s])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_alone_gives_the_bits_of_the_prefill(variant: str, dtype: torch.dtype) -> None:
    """Token by token over two split boundaries; with two threads a lone sequence is cut by splits of its keys."""
    sequences = Sequences.make((6, 2, 32), dtype, (530,))
    whole = sequences.whole()[0]
    for position in (*range(20), *range(240, 275), *range(505, 530)):
        for count in (1, 2):
            with threads(count):
                assert torch.equal(sequences.step([position], [1])[0][0], whole[position])


@needs_library
def test_a_shared_prefix_is_read_by_all(variant: str) -> None:
    """Two sequences whose first blocks are the same, the first of them written by neither."""
    sequences = Sequences.make((4, 2, 16), torch.float32, (40, 40))
    for part in (sequences.q, sequences.k, sequences.v):
        part[1][:32] = part[0][:32]
    alone = sequences.whole()
    sequences.block_table[1, :2] = sequences.block_table[0, :2]
    shared = sequences.step([32, 32], [8, 8])
    assert torch.equal(shared[0], alone[0][32:])
    assert torch.equal(shared[1], alone[1][32:])


@needs_library
def test_takes_views_of_a_merged_projection() -> None:
    """q, k and v as columns of one tensor, and heads before tokens as transformers lays them."""
    tokens, h, hkv, d = 20, 4, 2, 16
    q, k, v = random(tokens, (h + 2 * hkv) * d).split([h * d, hkv * d, hkv * d], dim=1)
    q, k, v = q.unflatten(1, (h, d)), k.unflatten(1, (hkv, d)), v.unflatten(1, (hkv, d))
    rest = (ints(0, tokens), ints(tokens), torch.arange(2, dtype=torch.int32).view(1, 2), 0.25)
    dense = paged_attention(q.contiguous(), k.contiguous(), v.contiguous(), *new_caches(2, hkv, d, q.dtype), *rest)
    assert torch.equal(paged_attention(q, k, v, *new_caches(2, hkv, d, q.dtype), *rest), dense)
    turned = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    assert torch.equal(paged_attention(*turned, *new_caches(2, hkv, d, q.dtype), *rest), dense)


@needs_library
def test_large_scores_do_not_overflow(variant: str) -> None:
    sequences = Sequences.make((2, 1, 16), torch.float32, (300,))
    sequences.q[0] *= 1000
    assert relative_error(sequences.whole()[0], sequences.exact(0)) < 1e-4


@needs_library
def test_says_what_does_not_fit() -> None:
    q, k = random(3, 4, 16), random(3, 2, 16)
    caches = new_caches(4, 2, 16, torch.float32)
    good = (ints(0, 3), ints(3), ints(1).view(1, 1), 1.0)
    with pytest.raises(RuntimeError, match=r"block_table\[0, 0\] is 4, it must be a block below 4"):
        paged_attention(q, k, k, *caches, *good[:2], ints(4).view(1, 1), 1.0)
    with pytest.raises(RuntimeError, match=r"context_len\[0\] is 17, it must lie between .* 3 new tokens and the 16"):
        paged_attention(q, k, k, *caches, good[0], ints(17), *good[2:])
    with pytest.raises(RuntimeError, match=r"context_len\[0\] is 2"):
        paged_attention(q, k, k, *caches, good[0], ints(2), *good[2:])
    with pytest.raises(RuntimeError, match="query_start must begin with 0 and end with the number of tokens, 3"):
        paged_attention(q, k, k, *caches, ints(0, 2), *good[1:])
    with pytest.raises(RuntimeError, match="4 query heads, it must be a multiple of the 3"):
        paged_attention(q, random(3, 3, 16), random(3, 3, 16), *caches, *good)
    with pytest.raises(RuntimeError, match="head_dim is 15, it must be even"):
        paged_attention(q[..., :15], k[..., :15], k[..., :15], *caches, *good)
    with pytest.raises(RuntimeError, match=r"v_cache is \[4, 2, 16, 16\]"):
        paged_attention(random(3, 4, 8), random(3, 2, 8), random(3, 2, 8), *caches, *good)


@needs_library
def test_is_a_well_behaved_operator() -> None:
    q, k = random(3, 4, 16), random(3, 2, 16)
    caches = new_caches(4, 2, 16, torch.float32)
    arguments = (q, k, k, *caches, ints(0, 1, 3), ints(1, 2), ints(1, 2).view(2, 1), 0.25)
    torch.library.opcheck(torch.ops.ensemble_decode.paged_attention, arguments)


def test_works_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "available", False)
    sequences = Sequences.make((4, 2, 16), torch.float32, (5, 20))
    for s, out in enumerate(sequences.whole()):
        assert relative_error(out, sequences.exact(s)) < ROUNDING[torch.float32]
