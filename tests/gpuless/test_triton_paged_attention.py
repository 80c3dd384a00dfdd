"""Paged attention in Triton: equal to the reference in every order of programs and after compilation, without a spill."""

from __future__ import annotations

import collections
import importlib.util
import os
import random as python_random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("greenlet", reason="needs greenlet")

from ensemble_decode.kernels import paged_attention as kernels
from ensemble_decode.ops import reference_layers
from tests.ops.cpu import DTYPES, ROUNDING, needs_library, relative_error
from tests.ops.test_paged_attention import Sequences

from . import triton_launch
from .aot import compile_call, loops, opcodes, resources, sass, uses_fp64
from .interp import SCHEDULES, KernelFault
from .ptxsim import Machine, PtxError
from .standin import Planned, interpreted, memory_starts_as_nan, planned, standing_in
from .test_ptxsim import without

#: H, Hkv, D: groups of 1 to 17 (more than a tile has rows), dimensions that are padded and that are not.
HEADS = [(4, 4, 40), (6, 2, 64), (8, 1, 80), (3, 1, 96), (2, 2, 128), (1, 1, 256), (17, 1, 24), (4, 2, 6)]
FULL = os.environ.get("ENSEMBLE_DECODE_FULL_GRID") == "1"
#: The weights are rounded to the values' dtype before the second product, as well as the output.
TOLERANCE = {torch.float32: ROUNDING[torch.float32], **{x: 2 * ROUNDING[x] for x in (torch.bfloat16, torch.float16)}}


def errors(sequences: Sequences, op: Any = kernels.paged_attention) -> list[float]:
    """Steps after a prefix that the reference computed: largest errors of each against the exact result.

    A mixed batch of long pieces and single tokens, pieces of a few tokens, then one token of each.
    """
    lengths = [len(x) for x in sequences.q]
    start = [max(0, n - 30) for n in lengths]
    sequences.step([0] * len(lengths), start, reference_layers.paged_attention)
    worst = []
    for ends in (
        [n - 4 if s % 2 else min(n - 4, n - 29) for s, n in enumerate(lengths)],
        [n - 1 for n in lengths],
        lengths,
    ):
        ends = [max(a, b) for a, b in zip(start, ends, strict=True)]
        out = sequences.step(start, [b - a for a, b in zip(start, ends, strict=True)], op)
        for s, (a, b, rows) in enumerate(zip(start, ends, out, strict=True)):
            if b > a:
                worst.append(relative_error(rows, sequences.exact(s)[a:b]))
        start = ends
    return worst


@needs_library
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [(heads, dtype) for heads in HEADS for dtype in (DTYPES if heads in HEADS[:3] else DTYPES[:1])],
    ids=str,
)
def test_equals_scaled_dot_product_attention(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Through the dispatcher, a cache and a workspace full of NaN, tables with unused entries out of bounds."""
    torch.manual_seed(0)
    with standing_in() as seen:
        worst = errors(Sequences.make(heads, dtype, (5, 40, 20, 70)), torch.ops.ensemble_decode.paged_attention)
    assert all(x < TOLERANCE[dtype] for x in worst)
    assert seen["write_cache"] == 3
    assert seen["attend"] >= 3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_order_of_programs(schedule: str) -> None:
    """No program reads what another one of the same launch writes."""
    with interpreted(schedule=schedule, races=True), memory_starts_as_nan():
        worst = errors(Sequences.make((4, 2, 16), torch.float32, (5, 40, 263, 34)))
    assert all(x < ROUNDING[torch.float32] for x in worst)


def test_a_decoding_sequence_does_not_see_its_batch() -> None:
    """Alone, beside others, beside a prefill, under wider tables: the same bits, over a split boundary too."""
    torch.manual_seed(1)
    sequences = Sequences.make((6, 2, 32), torch.bfloat16, (258, 30, 300))
    sequences.whole(reference_layers.paged_attention)
    with interpreted(), memory_starts_as_nan():
        for position in (255, 256):
            alone = sequences.step([position, 0, 0], [1, 0, 0], kernels.paged_attention)[0]
            beside = sequences.step([position, 20, 299], [1, 1, 1], kernels.paged_attention)[0]
            mixed = sequences.step([position, 18, 298], [1, 12, 2], kernels.paged_attention)[0]
            table = sequences.block_table
            sequences.block_table = torch.cat([table, table.new_full((3, 40), -1)], dim=1)
            wider = sequences.step([position, 20, 299], [1, 1, 1], kernels.paged_attention)[0]
            sequences.block_table = table
            for other in (beside, mixed, wider):
                assert torch.equal(other, alone)


def test_chunks_of_a_prefill_do_not_change_its_bits() -> None:
    """Pieces longer than a tile of decoding: wherever a prompt is cut, and whatever lies beside it."""
    torch.manual_seed(2)
    sequences = Sequences.make((6, 2, 32), torch.bfloat16, (130, 60))
    chooser = python_random.Random(0)
    with interpreted(), memory_starts_as_nan():
        whole = sequences.whole(kernels.paged_attention)[0]
        done = 0
        while done < 130:
            count = min(130 - done, chooser.randrange(6, 60))
            if 0 < 130 - done - count < 6:
                count = 130 - done
            out = sequences.step([done, 0], [count, chooser.choice([0, 7, 60])], kernels.paged_attention)[0]
            assert torch.equal(out, whole[done : done + count])
            done += count


def test_keys_and_values_are_read_once_for_all_heads_of_a_group() -> None:
    """A decode step of contexts 300 and 40, 4 query heads a key head: bytes as the algorithm claims them."""
    sequences = Sequences.make((8, 2, 64), torch.bfloat16, (300, 40))
    sequences.whole(reference_layers.paged_attention)
    with interpreted() as seen:
        sequences.step([299, 39], [1, 1], kernels.paged_attention)
    assert seen["attend.k_cache"] == seen["attend.v_cache"] == (300 + 40) * 2 * 64 * 2
    splits = 2 + 1  # 300 tokens are two, 40 are one
    assert seen["attend.q"] == splits * 8 * 64 * 2
    assert seen["merge.sums"] == splits * 8 * 64 * 4


def test_an_empty_batch_and_what_does_not_fit() -> None:
    q, k = torch.zeros(0, 4, 16), torch.zeros(0, 2, 16)
    cache = torch.zeros(2, 2, 16, 16)
    none = torch.zeros(0, dtype=torch.int32)
    rest = (torch.zeros(1, dtype=torch.int32), none, none.view(0, 1), 1.0)
    with interpreted() as seen:
        assert kernels.paged_attention(q, k, k, cache, cache.clone(), *rest).shape == (0, 4, 16)
    assert not seen
    with pytest.raises(RuntimeError, match="head_dim is 15, it must be even"):
        kernels.paged_attention(q[..., :15], k[..., :15], k[..., :15], cache, cache, *rest)
    with pytest.raises(RuntimeError, match="4 query heads, it must be a multiple of the 3"):
        kernels.paged_attention(q, torch.zeros(0, 3, 16), torch.zeros(0, 3, 16), cache, cache, *rest)
    with pytest.raises(RuntimeError, match=r"context_len is torch.int64 \[0\], it must be torch.int32"):
        kernels.paged_attention(q, k, k, cache, cache, rest[0], none.long(), *rest[2:])


BUGS = {
    "a slot past the end is read": ("live = key < end", "live = key < end + 1"),
    "a token does not see itself": ("key[None, :] <= position[:, None]", "key[None, :] < position[:, None]"),
    "a token sees the next one": ("key[None, :] <= position[:, None]", "key[None, :] <= position[:, None] + 1"),
    "splits are added without their weights": ("b_sum * weight, 0)", "b_sum, 0)"),
    "the last split is left out": ("used = split * SPLIT <= position", "used = (split + 1) * SPLIT <= position + 1"),
    "tiles of two sequences collide": ("tile = tile // TOKENS + s", "tile = tile // TOKENS"),
    "a head reads its neighbour's cache": (
        "(block * KV_HEADS + head) * BLOCK_SIZE + key",
        "(block * KV_HEADS) * BLOCK_SIZE + key",
    ),
    "the maximum is not carried": ("shrink = tl.exp2(b_max - safe)", "shrink = tl.exp2(safe - safe)"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, tmp_path: Path) -> None:
    source, (right, wrong) = Path(kernels.__file__).read_text(), BUGS[bug]
    assert right in source
    (tmp_path / "planted.py").write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("planted", tmp_path / "planted.py")
    assert spec is not None
    assert spec.loader is not None
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    torch.manual_seed(0)
    with interpreted(), memory_starts_as_nan():
        try:
            worst = errors(Sequences.make((4, 2, 16), torch.float32, (5, 263, 34)), planted.paged_attention)
        except KernelFault:
            return
    assert any(not x < ROUNDING[torch.float32] for x in worst)  # NaN counts


# ── compiled, and executed ──────────────────────────────────────────────────────────────────────────────────────────
def on_the_simulator(arch: int, seen: list[Machine] | None = None, **options: Any) -> Callable[..., torch.Tensor]:
    """The operator, every launch of it compiled for ``sm_<arch>`` and its PTX executed; adds the machines to ``seen``."""

    def op(*arguments: Any) -> torch.Tensor:
        with planned() as launches, memory_starts_as_nan():
            out = kernels.paged_attention(*arguments)
        machines = triton_launch.run_all(launches, arch, ("out", "sums", "state"), **options)
        if seen is not None:
            seen.extend(machines)
        return out

    return op


def decoding(heads: tuple[int, int, int], dtype: torch.dtype, *contexts: int) -> Sequences:
    """Sequences whose last token alone is not in the cache yet."""
    torch.manual_seed(0)
    sequences = Sequences.make(heads, dtype, contexts)
    sequences.step([0] * len(contexts), [n - 1 for n in contexts], reference_layers.paged_attention)
    return sequences


def decoded(sequences: Sequences, op: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    return sequences.step([len(x) - 1 for x in sequences.q], [1] * len(sequences.q), op)


@pytest.mark.parametrize(
    ("arch", "heads", "dtype"),
    [
        (80, (9, 3, 64), torch.bfloat16),
        (80, (6, 2, 32), torch.float16),
        (80, (4, 1, 80), torch.float32),
        (90, (8, 2, 64), torch.bfloat16),
        (90, (4, 1, 80), torch.float32),
        (100, (8, 2, 64), torch.bfloat16),
    ],
    ids=str,
)
def test_compiled_code_decodes_as_the_reference(arch: int, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Contexts of two splits and of one; in turns by chance, with the errors that a GPU's units may make; bytes."""
    sequences = decoding(heads, dtype, 300, 40)
    machines: list[Machine] = []
    for op in (on_the_simulator(arch, machines), on_the_simulator(arch, order="random", approximate=True)):
        for s, out in enumerate(decoded(sequences, op)):
            assert relative_error(out, sequences.exact(s)[-1:]) < TOLERANCE[dtype]
    write, attend, merge = machines
    assert (
        attend.memory.loaded["k_cache"] == attend.memory.loaded["v_cache"] == 340 * heads[1] * heads[2] * dtype.itemsize
    )
    assert any(name.startswith("mma") for name in attend.instructions)
    assert not any(name.startswith("mma") for name in write.instructions | merge.instructions)


@pytest.mark.parametrize(
    ("arch", "heads", "dtype"),
    [
        (80, (4, 2, 16), torch.bfloat16),
        (90, (4, 2, 16), torch.float32),
        (90, (4, 2, 16), torch.float16),
        (90, (9, 3, 64), torch.bfloat16),
        (90, (2, 1, 128), torch.bfloat16),
        (100, (4, 2, 16), torch.bfloat16),
        (100, (9, 3, 64), torch.bfloat16),
        (100, (2, 1, 128), torch.float16),
    ],
    ids=str,
)
def test_compiled_code_takes_mixed_batches(arch: int, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Pieces of prompts beside single tokens. In 16 bits sm_90 multiplies those by ``wgmma``, sm_100 by ``tcgen05``."""
    torch.manual_seed(0)
    machines: list[Machine] = []
    worst = errors(Sequences.make(heads, dtype, (5, 40, 20, 70)), on_the_simulator(arch, machines))
    assert all(x < TOLERANCE[dtype] for x in worst)
    used = {name.split(".")[0] for machine in machines for name in machine.instructions}
    asynchronous = {90: {"wgmma"}, 100: {"tcgen05"}}.get(arch, set()) if dtype.itemsize == 2 else set()
    assert used & {"wgmma", "tcgen05"} == asynchronous


@pytest.mark.parametrize("arch", [80, 90])
def test_a_barrier_or_a_wait_that_the_compiled_code_lacks_is_found(arch: int) -> None:
    """Left out one at a time: a race, a copy that nobody has waited for, or another result.

    But for the first, which keeps apart the steps of the search for a token's sequence: with up to 128 there is one.
    """
    sequences = decoding((4, 1, 64), torch.bfloat16, 150)  # one split, and so the last launch is attend
    texts: list[str] = []

    def note(text: str) -> str:
        texts.append(text)
        return text

    (want,) = decoded(sequences, on_the_simulator(arch, edit=note))
    changed = without(texts[-1], r"\n\s*(?:bar\.sync|cp\.async\.wait_group)[^\n]*")
    assert len(changed) >= 12
    for text in changed[1:]:
        try:
            (got,) = decoded(sequences, on_the_simulator(arch, edit=lambda _, text=text: text, only=[1]))
        except PtxError:
            continue
        assert not torch.equal(got, want)


#: Barriers, waits and fences of the compiled prefill that others repeat, by architecture.
#: sm_90: the barrier of the search; two between a product and copies to the other buffer, which the barrier at the loop's head
#: keeps from the products before it; the second product's proxy fence, whose operand came with the first one's.
#: sm_100: the same in the loop and in its first step, which stands before it; either barrier beside a proxy fence; waits for
#: tensor memory that the same warp's next one covers; the wait for a product that was begun before one already waited for.
REPEATED = {
    90: {"bar.sync": 3, "fence.proxy.async": 1},
    100: {"bar.sync": 13, "fence.proxy.async": 2, "tcgen05.wait::ld": 2, "tcgen05.wait::st": 2, "mbarrier.try_wait": 1},
}


@pytest.mark.parametrize("arch", [90, 100])
def test_what_the_compiled_prefill_lacks_is_found(arch: int) -> None:
    """Left out one at a time (some of them, in the full grid all): barriers, waits, commits and fences of products."""
    torch.manual_seed(0)
    counts = [40, 33]
    sequences = Sequences.make((3, 1, 64), torch.bfloat16, (150, 100))  # an odd and an even number of steps
    start = [len(x) - n for x, n in zip(sequences.q, counts, strict=True)]
    sequences.step([0, 0], start, reference_layers.paged_attention)
    texts: list[str] = []

    def note(text: str) -> str:
        texts.append(text)
        return text

    def prefilled(edit: Callable[[str], str]) -> torch.Tensor:
        op = on_the_simulator(arch, edit=edit, only=[len(texts) - 1], steps=400)
        return torch.cat(sequences.step(start, counts, op))

    want = torch.cat(sequences.step(start, counts, on_the_simulator(arch, edit=note)))
    pattern = (
        r"\n\s*(?:@%p\d+ )?(bar\.sync|cp\.async\.wait_group|fence\.proxy\.async|wgmma\.(?:fence|commit_group|wait_group)|"
        r"tcgen05\.(?:commit|wait::ld|wait::st))[^\n]*|\n\{[^}]*(mbarrier\.try_wait)[^}]*\}"
    )
    names = [found[1] or found[2] for found in re.finditer(pattern, texts[-1])]
    cases = list(zip(names, without(texts[-1], pattern), strict=True))
    assert len(cases) >= {90: 18, 100: 53}[arch]
    unseen: collections.Counter[str] = collections.Counter()
    for name, text in cases if FULL else cases[:: {90: 3, 100: 6}[arch]]:
        try:
            unseen[name] += torch.equal(prefilled(lambda _, text=text: text), want)
        except PtxError:
            continue
    repeated = collections.Counter(REPEATED[arch])
    assert unseen == repeated if FULL else unseen <= repeated


# ── what is launched, and what the compiler makes of it ─────────────────────────────────────────────────────────────
def launches(heads: tuple[int, int, int], dtype: torch.dtype, counts: list[int], width: int = 64) -> dict[str, Planned]:
    """What the host launches for sequences of ``counts`` new tokens, on tensors that hold nothing."""
    h, hkv, d = heads
    tokens, sequences = sum(counts), len(counts)
    with planned() as found, torch.device("meta"):
        qkv = torch.empty(tokens, (h + 2 * hkv) * d, dtype=dtype).split([h * d, hkv * d, hkv * d], dim=1)
        q, k, v = (x.unflatten(1, (-1, d)) for x in qkv)
        caches = [torch.empty(100, hkv, 16, d, dtype=dtype) for _ in range(2)]
        index = [torch.empty(n, dtype=torch.int32) for n in (sequences + 1, sequences)]
        table = torch.empty(sequences, width, dtype=torch.int32)
        kernels.paged_attention(q, k, v, *caches, *index, table, 0.1)
    return {f"{x.name}{x.arguments['ROWS'] if x.name == 'attend' else ''}": x for x in found}


def compiled(launch: Planned, arch: int | str) -> Any:
    arguments = dict(launch.arguments)
    if arch == "gfx942" and "PRECISION" in arguments:
        arguments["PRECISION"] = "ieee"  # what dot_precision says there
    return compile_call(launch.kernel, arch, arguments, **launch.options)


def hot_loads(text: str) -> list[str]:
    """The loads of 16 bytes and fewer in loops with matrix products, those of table entries (4 bytes) left out."""
    bodies = [body for body in loops(text) if any("MMA" in x and "HFMA2" not in x for x in body)]
    assert bodies
    listing = "\n".join(f"/*0000*/ {x};" for body in bodies for x in body)
    return [x for x in opcodes(listing) if x.startswith(("LDG.", "LDGSTS")) and x not in ("LDG.E", "LDGSTS.E")]


@pytest.mark.parametrize(
    ("arch", "heads", "dtype", "registers"),
    [
        (80, (32, 8, 128), torch.bfloat16, {"attend16": 128, "attend64": 192}),
        (90, (32, 8, 128), torch.bfloat16, {"attend16": 128, "attend64": 192}),
        (100, (32, 8, 128), torch.bfloat16, {"attend16": 128, "attend64": 192}),
        (80, (9, 3, 64), torch.float16, {"attend16": 128, "attend64": 176}),  # spills at four warps
        (90, (32, 32, 80), torch.float32, {"attend16": 255}),
        (80, (8, 1, 256), torch.float32, {"attend16": 255}),
    ],
    ids=str,
)
def test_compiles_without_spills_and_with_wide_loads(
    arch: int, heads: tuple[int, int, int], dtype: torch.dtype, registers: dict[str, int]
) -> None:
    found = launches(heads, dtype, [1, 200, 1])
    assert {x for x in found if x.startswith("attend")} == set(registers)
    for name, launch in found.items():
        kernel = compiled(launch, arch)
        used, text = resources(kernel), sass(kernel)
        assert used.spill_bytes == used.stack_bytes == 0
        assert not uses_fp64(text)
        if name in registers:
            assert used.registers <= registers[name]
            assert used.shared_bytes <= 96 * 1024
            assert set(hot_loads(text)) == {"LDGSTS.E.BYPASS.128"}


def test_compiles_for_amd() -> None:
    for launch in launches((32, 8, 128), torch.bfloat16, [1, 200, 1]).values():
        kernel = compiled(launch, "gfx942")
        used = resources(kernel)
        assert used.spill_bytes == used.stack_bytes == 0
        assert used.shared_bytes <= 64 * 1024
        if launch.name == "attend":
            assert "global_load_dwordx4" in kernel.asm["amdgcn"] or "buffer_load_dwordx4" in kernel.asm["amdgcn"]


def test_scalar_products_in_float32_spill() -> None:
    """Negative control, and the reason for ``dot_precision``: the plain form of the same tile."""
    launch = launches((32, 8, 128), torch.float32, [1, 1])["attend16"]
    arguments = {**launch.arguments, "PRECISION": "ieee"}
    kernel = compile_call(launch.kernel, 90, arguments, num_warps=4, num_stages=3)
    assert resources(kernel).spill_bytes > 0


def test_an_odd_head_dimension_loses_the_width() -> None:
    """Negative control of :func:`hot_loads`: 20 elements are no multiple of 16 bytes."""
    launch = launches((4, 4, 20), torch.bfloat16, [1, 1])["attend16"]
    assert "LDGSTS.E.BYPASS.128" not in hot_loads(sass(compiled(launch, 90)))


def test_launches_follow_from_shapes() -> None:
    """One token a sequence: no prefill. Short tables: no splits, no merge. Mixed: both kinds of tile."""
    step = launches((32, 8, 128), torch.bfloat16, [1] * 8)
    assert list(step) == ["write_cache", "attend16", "merge"]
    assert step["attend16"].grid == (8, 8, 4)  # a token, a key head, 64 blocks as 4 splits of 256 positions
    assert step["merge"].grid == (8, 32)
    assert list(launches((32, 8, 128), torch.bfloat16, [1] * 8, width=16)) == ["write_cache", "attend16"]
    mixed = launches((32, 8, 128), torch.bfloat16, [1, 1, 200])
    assert list(mixed) == ["write_cache", "attend16", "merge", "attend64"]
    assert mixed["attend64"].grid == (202 // 16 + 3, 8, 1)
    assert list(launches((32, 8, 128), torch.bfloat16, [200])) == ["write_cache", "attend64"]


@pytest.mark.parametrize("width", [1, 16, 17, 1024, 1025, 8192])
def test_the_workspace_is_bounded(width: int) -> None:
    length = kernels.split_length(width)
    assert length >= 256
    assert length & (length - 1) == 0
    assert width * 16 <= length * kernels.MAX_SPLITS
    assert length == 256 or width * 16 > length // 2 * kernels.MAX_SPLITS


def test_the_reference_agrees_with_the_cache_layout() -> None:
    """What the kernel writes, the reference reads: the same cache through both."""
    sequences = Sequences.make((4, 2, 16), torch.float32, (40, 9))
    with interpreted():
        sequences.step([0, 0], [30, 9], kernels.paged_attention)
    out = sequences.step([30, 9], [10, 0], reference_layers.paged_attention)[0]
    assert relative_error(out, sequences.exact(0)[30:]) < ROUNDING[torch.float32]
