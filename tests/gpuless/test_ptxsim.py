"""The PTX simulator: instructions against plain integers and exact floats, and every check against a bug it must find."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpuless.ptx_samples import CLUSTER_MAXIMUM, RING, straight
from tests.gpuless.ptxsim import Kernel, PtxError, launch
from tests.gpuless.ptxsim.values import bf16_to_f32, f32_to_bf16, fma

MASK = (1 << 32) - 1


def execute(body: str, rows: Iterable[tuple[int, ...]], outputs: int = 1) -> list[list[int]]:
    """Run ``body`` with a row of up to three 64-bit inputs for each lane."""
    data = np.zeros((32, 3), np.uint64)
    for lane, row in enumerate(rows):
        data[lane, : len(row)] = [x & (2**64 - 1) for x in row]
    out = np.zeros((32, outputs), np.uint64)
    launch(straight(body, outputs), (1,), [data, out])
    return [[int(x) for x in row] for row in out]


def bits(x: float) -> int:
    """The bits of a float32."""
    return int(np.float32(x).view(np.uint32))


def lanes(count: int = 32, seed: int = 0) -> list[tuple[int, ...]]:
    """Random and extreme 64-bit inputs."""
    rng = np.random.default_rng(seed)
    rows = [tuple(int(x) for x in rng.integers(0, 2**63, 3)) for _ in range(count - 3)]
    return [*rows, (0, 0, 0), (2**64 - 1, 2**64 - 1, 2**64 - 1), (1 << 31, 1 << 31, 31)]


def signed(x: int) -> int:
    """A 32-bit pattern as a signed number."""
    return (x & MASK) - ((x & MASK) >> 31 << 32)


INTEGER = "cvt.u32.u64 %r1, %a;\ncvt.u32.u64 %r2, %b;\ncvt.u32.u64 %r3, %c;\n{};\ncvt.u64.u32 %o0, %r4;"


def _permute(a: int, b: int, selector: int) -> int:
    pool = struct.pack("<II", a & MASK, b & MASK)
    octets = [pool[selector >> 4 * i & 7] for i in range(4)]
    return sum((255 * (o >> 7) if selector >> 4 * i & 8 else o) << 8 * i for i, o in enumerate(octets))


def _extract(a: int, b: int, c: int) -> int:
    start, length = b & 255, c & 255
    return (a & MASK) >> min(start, 63) & ((1 << length) - 1)


@pytest.mark.parametrize(
    ("instruction", "meaning"),
    [
        ("mad.lo.u32 %r4, %r1, %r2, %r3", lambda a, b, c: a * b + c),
        ("mul.hi.u32 %r4, %r1, %r2", lambda a, b, c: ((a & MASK) * (b & MASK)) >> 32),
        ("mul.hi.s32 %r4, %r1, %r2", lambda a, b, c: (signed(a) * signed(b)) >> 32),
        ("sub.s32 %r4, %r1, %r2", lambda a, b, c: a - b),
        ("shr.s32 %r4, %r1, %r3", lambda a, b, c: signed(a) >> min(c & MASK, 31)),
        ("shl.b32 %r4, %r1, %r3", lambda a, b, c: a << min(c & MASK, 32)),
        ("shf.r.wrap.b32 %r4, %r1, %r2, %r3", lambda a, b, c: ((b & MASK) << 32 | a & MASK) >> (c & 31)),
        ("shf.l.wrap.b32 %r4, %r1, %r2, %r3", lambda a, b, c: ((b & MASK) << 32 | a & MASK) << (c & 31) >> 32),
        ("prmt.b32 %r4, %r1, %r2, %r3", lambda a, b, c: _permute(a, b, c & MASK)),
        ("bfe.u32 %r4, %r1, %r2, %r3", _extract),
        ("lop3.b32 %r4, %r1, %r2, %r3, 0x96", lambda a, b, c: a ^ b ^ c),
        ("lop3.b32 %r4, %r1, %r2, %r3, 0xE8", lambda a, b, c: a & b | a & c | b & c),
        ("popc.b32 %r4, %r1", lambda a, b, c: (a & MASK).bit_count()),
        ("clz.b32 %r4, %r1", lambda a, b, c: 32 - (a & MASK).bit_length()),
        ("bfind.u32 %r4, %r1", lambda a, b, c: (a & MASK).bit_length() - 1),
        ("bfind.shiftamt.u32 %r4, %r1", lambda a, b, c: 32 - (a & MASK).bit_length() if a & MASK else -1),
        ("bfi.b32 %r4, %r1, %r2, 3, 9", lambda a, b, c: (b & ~(511 << 3)) | (a & 511) << 3),
        ("brev.b32 %r4, %r1", lambda a, b, c: int(f"{a & MASK:032b}"[::-1], 2)),
        ("min.s32 %r4, %r1, %r2", lambda a, b, c: min(signed(a), signed(b))),
        ("max.u32 %r4, %r1, %r2", lambda a, b, c: max(a & MASK, b & MASK)),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)
def test_integer_instructions(instruction: str, meaning: Callable[[int, int, int], int]) -> None:
    rows = lanes()
    for row, (got,) in zip(rows, execute(INTEGER.format(instruction), rows), strict=True):
        assert got == meaning(*row) & MASK, row


def test_wide_multiplications_and_signed_division() -> None:
    rows = lanes(seed=1)
    body = (
        "cvt.u32.u64 %r1, %a;\ncvt.u32.u64 %r2, %b;\nmad.wide.u32 %o0, %r1, %r2, %c;\nmul.wide.s32 %o1, %r1, %r2;\n"
        "or.b32 %r2, %r2, 1;\nrem.s32 %r3, %r1, %r2;\ndiv.s32 %r4, %r1, %r2;\ncvt.s64.s32 %o2, %r3;\n"
        "cvt.s64.s32 %o3, %r4;\nmul.hi.u64 %o4, %a, %b;"
    )
    for (a, b, c), (unsigned, product, rest, quotient, high) in zip(rows, execute(body, rows, 5), strict=True):
        assert unsigned == ((a & MASK) * (b & MASK) + c) % 2**64
        assert product == signed(a) * signed(b) % 2**64
        x, y = signed(a), signed(b | 1)
        if (x, y) != (-(2**31), -1):
            assert rest == int(math.fmod(x, y)) % 2**64
            assert quotient == int(Fraction(x, y)) % 2**64
        assert high == a * b >> 64


def test_fused_multiply_add_rounds_once() -> None:
    rng = np.random.default_rng(2)
    a, b, c = (rng.standard_normal(4000).astype(np.float32) for _ in range(3))
    # In a quarter the exact sum lies just below a tie of float32, and float64 rounds it onto the tie.
    tiny = rng.integers(1, 200, 1000).astype(np.float32) * np.float32(2**-23)
    a[:1000], b[:1000] = (1 + tiny) * np.float32(2**-12), (1 - tiny) * np.float32(2**-12)
    c[:1000] = 1 + (2 * rng.integers(0, 2**21, 1000) + 1).astype(np.float32) * np.float32(2**-23)
    twice = 0
    for x, y, z, got in zip(a, b, c, fma(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = np.float32(float(exact))
        around = (near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf)))
        best = min(abs(Fraction(float(v)) - exact) for v in around)
        assert abs(Fraction(float(got)) - exact) == best
        twice += np.float32(np.float64(x) * np.float64(y) + np.float64(z)) != got
    assert twice >= 500
    assert (
        fma(np.float32([1]), np.float32([np.inf]), np.float32([-np.inf])).view(np.uint32)[0] & 0x7F800000 == 0x7F800000
    )


def test_float_conversions() -> None:
    x = torch.cat(
        [torch.randn(2000) * 10.0**i for i in range(-3, 4)] + [torch.tensor([math.inf, -math.inf, 0.0, 1e-40])]
    )
    truth = x.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(f32_to_bf16(x.numpy()), truth)
    assert np.array_equal(bf16_to_f32(truth), x.to(torch.bfloat16).float().numpy())
    rows = [
        (bits(1.00390625), bits(-2.5)),
        (bits(math.inf), bits(65519.0)),
        (bits(3e9), bits(math.nan)),
        (bits(-3e9), bits(1e-8)),
    ]
    body = (
        "cvt.u32.u64 %r1, %a;\ncvt.u32.u64 %r2, %b;\ncvt.rn.bf16x2.f32 %r3, %r1, %r2;\ncvt.u64.u32 %o0, %r3;\n"
        "cvt.rn.f16x2.f32 %r4, %r1, %r2;\ncvt.u64.u32 %o1, %r4;\ncvt.rzi.s32.f32 %r5, %r1;\ncvt.u64.u32 %o2, %r5;\n"
        "mov.b32 {%h1, %h2}, %r3;\ncvt.f32.bf16 %f1, %h1;\nmov.b32 %r6, %f1;\ncvt.u64.u32 %o3, %r6;"
    )
    for (a, b), (brain, half, whole, back) in zip(rows, execute(body, rows, 4), strict=False):
        pair = torch.tensor([struct.unpack("<f", struct.pack("<I", v))[0] for v in (b, a)])
        numbers = pair.to(torch.bfloat16)
        assert (brain >> 16, brain & 0xFFFF) == tuple(
            0x7FFF if v.isnan() else int(v.view(torch.int16)) & 0xFFFF for v in (numbers[1], numbers[0])
        )
        if not pair.isnan().any():
            assert half == int(pair.to(torch.float16).view(torch.int32)) & MASK
            assert back == bits(float(numbers[0]))
        assert signed(whole) == max(-(2**31), min(2**31 - 1, int(pair[1]) if pair[1].isfinite() else 2**31 - 1))


def test_comparisons_with_nan() -> None:
    rows = [(bits(x), bits(y)) for x in (1.0, math.nan, -0.0) for y in (0.0, math.nan, 1.0)]
    kinds = ("lt", "ne", "neu", "geu", "eq", "num")
    body = "cvt.u32.u64 %r1, %a;\ncvt.u32.u64 %r2, %b;\n" + "\n".join(
        f"setp.{k}.f32 %p{i}, %r1, %r2;\nselp.b64 %o{i}, 1, 0, %p{i};" for i, k in enumerate(kinds)
    )
    for (a, b), got in zip(rows, execute(body, rows, len(kinds)), strict=False):
        x, y = (struct.unpack("<f", struct.pack("<I", v))[0] for v in (a, b))
        unordered = math.isnan(x) or math.isnan(y)
        assert got == [x < y, not unordered and x != y, unordered or x != y, unordered or x >= y, x == y, not unordered]


def test_warp_instructions() -> None:
    body = (
        "cvt.u32.u64 %r1, %a;\nshfl.sync.bfly.b32 %r2|%p1, %r1, 5, 31, -1;\nshfl.sync.up.b32 %r3|%p2, %r1, 3, 0, -1;\n"
        "shfl.sync.down.b32 %r4|%p3, %r1, 3, 31, -1;\nshfl.sync.idx.b32 %r5, %r1, 2, 0x181f, -1;\n"
        "redux.sync.add.s32 %r6, %r1, -1;\nredux.sync.max.u32 %r7, %r1, -1;\nsetp.gt.u32 %p4, %r1, 100;\n"
        "vote.sync.ballot.b32 %r8, %p4, -1;\nmatch.any.sync.b32 %r9, %r1, -1;\nelect.sync %r10|%p5, -1;\n"
        + "\n".join(f"cvt.u64.u32 %o{i}, %r{i + 2};" for i in range(9))
        + "\nselp.b64 %o9, 1, 0, %p2;\nselp.b64 %o10, 1, 0, %p5;"
    )
    values = [7 * i % 50 * 5 for i in range(32)]
    for i, got in enumerate(execute(body, [(v,) for v in values], 11)):
        up, down = (i - 3 if i >= 3 else i), (i + 3 if i + 3 < 32 else i)
        ballot = sum((v > 100) << j for j, v in enumerate(values))
        match = sum((v == values[i]) << j for j, v in enumerate(values))
        assert got[:4] == [values[i ^ 5], values[up], values[down], values[(i & 24) | 2]]
        assert got[4:] == [sum(values), max(values), ballot, match, 0, i >= 3, i == 0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("setp.eq.u32 %p1, %r0, 3;\n@%p1 bra $L;\nshfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;\n$L:\nmov.b64 %o0, 0;", "does not execute"),
        ("shfl.sync.bfly.b32 %r1, %r0, 1, 31, 1;\nmov.b64 %o0, 0;", "does not name"),
        ("cvt.u64.u32 %o0, %r7;", "which is not set"),
        ("ld.global.u32 %r1, [%rd0+4096];\nmov.b64 %o0, 0;", "out-of-bounds global load of 4 bytes"),
        ("ld.global.u32 %r1, [%rd0+2];\nmov.b64 %o0, 0;", "misaligned 4-byte global load"),
        ("ld.global.u64 %o0, [%at];", "bytes that nothing was stored to"),
        ("$L:\nbra $L;\nmov.b64 %o0, 0;", "no end after"),
        ("setp.eq.u32 %p1, %r0, 3;\n@%p1 bra $L;\nbar.sync 0;\n$L:\nmov.b64 %o0, 0;", "divergence"),
        ("setmaxnreg.inc.sync.aligned.u32 40;\nmov.b64 %o0, 0;", "not simulated"),
        ("add.cc.u32 %r1, %r0, %r0;\nmov.b64 %o0, 0;", "modifier .cc"),
        ("mov.b64 %o0, 0;\nst.global.u32 [%rd0], %r0;\nld.param.u64 %rd1, [in];\nst.global.u32 [%rd1], %r0;", "two threads store different"),
    ],
    ids=lambda x: "" if "\n" in x or ";" in x else x,
)  # fmt: skip
def test_what_one_warp_can_do_wrong(body: str, message: str) -> None:
    data, out = np.zeros((32, 3), np.uint64), np.zeros((32, 1), np.uint64)
    with pytest.raises(PtxError, match=message):
        launch(straight(body), (1,), [data, out], names=("in", "out"), scratch=("out",), steps=300)


# ── a cluster, by hand ──────────────────────────────────────────────────────────────────────────────────────────────
def ring(ptx: str = RING, **options: Any) -> list[int]:
    out = np.full(8, -1, np.int32)
    launch(ptx, (8,), [out], **options)
    return out.tolist()


def test_a_cluster_exchanges_through_distributed_shared_memory() -> None:
    for order in ("together", "random"):
        assert ring(order=order) == [61, 1, 21, 41] * 2
    assert Kernel(RING).cluster == (4, 1, 1)


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        ("    barrier.cluster.arrive.relaxed.aligned;\n    barrier.cluster.wait.aligned;\n", "", "may not have begun"),
        ("    barrier.cluster.arrive.release.aligned;\n    barrier.cluster.wait.acquire.aligned;\n", "", "race|nothing was stored"),
        ("arrive.release.aligned", "arrive.relaxed.aligned", "race"),
        ("    barrier.cluster.wait.acquire.aligned;\n", "", "race"),
        ("    barrier.cluster.arrive.release.aligned;\n", "", "without an arrival"),
        ("barrier.cluster.wait.aligned", "barrier.cluster.arrive.aligned", "arrive twice"),
        ("    mapa.shared::cluster.u32 %r5, %r4, %r3;", "    mov.u32 %r5, %r4;", None),
        ("st.shared::cluster", "st.shared", "shared::cta store with an address that mapa made"),
        ("    and.b32 %r3, %r3, 3;\n", "", "mapa to CTA rank 4"),
        ("box[8]", "box[4]", "out of bounds"),
    ],
)  # fmt: skip
def test_what_a_cluster_can_do_wrong(line: str, instead: str, message: str | None) -> None:
    assert line in RING
    changed = RING.replace(line, instead)
    if message is None:
        assert ring(changed) != ring()
        return
    with pytest.raises(PtxError, match=message):
        ring(changed)


# ── Triton's and nvcc's code ────────────────────────────────────────────────────────────────────────────────────────
def without(ptx: str, pattern: str) -> list[str]:
    """The PTX without its first, its second, … match."""
    return [ptx[: m.start()] + ptx[m.end() :] for m in re.finditer(pattern, ptx)]


BARRIERS = (
    r"\n\s*bar(?:rier)?\.sync[^\n]*",
    r"\n\s*barrier\.cluster\.arrive[^\n]*\n(?:\s*mov[^\n]*\n)?\s*barrier\.cluster\.wait[^\n]*",
)


def reported(ptx: str, run: Callable[[str], Any]) -> tuple[int, int, list[str]]:
    """(removed barriers that were reported or changed the result, all of them, messages) for ``run``."""
    want, messages = run(ptx), []
    variants = [v for pattern in BARRIERS for v in without(ptx, pattern)]
    for variant in variants:
        try:
            if run(variant) != want:
                messages.append("another result")
        except PtxError as error:
            messages.append(str(error))
    return len(messages), len(variants), messages


@pytest.fixture(scope="module")
def triton_samples() -> Any:
    pytest.importorskip("triton")
    from tests.gpuless import triton_samples

    return triton_samples


def compiled(kernel: Any, arch: int, types: dict[str, str], constants: dict[str, int], **options: Any) -> Any:
    from tests.gpuless.aot import compile_for

    pointers = tuple(n for n in types if n.endswith("_ptr") or n == "stride")
    return compile_for(kernel, arch, types, constants, pointers, enable_fp_fusion=False, **options)


@pytest.mark.parametrize(("arch", "ctas"), [(90, 8), (90, 16), (100, 8), (100, 16)])
def test_triton_over_a_cluster(arch: int, ctas: int, triton_samples: Any) -> None:
    types = {"z_ptr": "*bf16", "token_ptr": "*i32", "sum_ptr": "*fp32", "V": "i32", "stride": "i32"}
    built = compiled(triton_samples.over_a_cluster, arch, types, {"BLOCK": 8192}, num_ctas=ctas)
    rows, vocab, stride = 2, 8001, 8016
    z = torch.randn(rows, stride, generator=torch.Generator().manual_seed(arch)).bfloat16()

    def run(ptx: str, **options: Any) -> list[float]:
        token, total = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows)
        machine = launch(
            ptx, (rows * ctas,), [z, token, total, vocab, stride], names=("z", "token", "total"),
            shared_bytes=built.metadata.shared, scratch=("token", "total"), **options,
        )  # fmt: skip
        assert machine.memory.loaded["z"] == machine.memory.sectors["z"] == 2 * rows * stride
        return [*token.tolist(), *total.tolist()]

    got = run(built.asm["ptx"])
    x = z[:, :vocab].float()
    assert got[:rows] == x.argmax(1).tolist()
    torch.testing.assert_close(torch.tensor(got[rows:]), (x - x.amax(1, True)).exp().sum(1), rtol=1e-6, atol=0)
    assert run(built.asm["ptx"], order="random") == got
    assert "mapa" in built.asm["ptx"]
    if ctas == 8:
        found, all_of_them, messages = reported(built.asm["ptx"], run)
        print(f"\nsm_{arch}: {found} of {all_of_them} removed barriers reported")
        assert found >= all_of_them - 1
        assert any("may not have begun" in m for m in messages)
        assert any("may end before" in m for m in messages)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_triton_splits_meet_through_a_ticket(arch: int, triton_samples: Any) -> None:
    types = {
        "x_ptr": "*fp32",
        "part_ptr": "*fp32",
        "ticket_ptr": "*i32",
        "out_ptr": "*fp32",
        "V": "i32",
        "stride": "i32",
    }
    built = compiled(triton_samples.split_sum, arch, types, {"CHUNK": 1024, "BLOCK": 512, "SPLITS": 4})
    x, vocab = torch.randn(2, 3008), 3001

    def run(ptx: str, columns: int = vocab, **options: Any) -> list[float]:
        part, out = torch.zeros(2, 4), torch.zeros(2)
        tensors = [x, part, torch.zeros(2, dtype=torch.int32), out, columns, 3008]
        launch(
            ptx,
            (2, 4),
            tensors,
            names=("x", "part", "ticket", "out"),
            **{"shared_bytes": built.metadata.shared} | options,
        )
        return out.tolist()

    torch.testing.assert_close(torch.tensor(run(built.asm["ptx"])), x[:, :vocab].exp().sum(1))
    for seed in range(3):
        run(built.asm["ptx"], order="random", seed=seed, approximate=True)
    found, all_of_them, _ = reported(built.asm["ptx"], run)
    print(f"\nsm_{arch}: {found} of {all_of_them} removed barriers reported")
    assert found >= all_of_them - 1
    with pytest.raises(PtxError, match="out-of-bounds global load"):
        run(built.asm["ptx"], columns=4000)
    with pytest.raises(PtxError, match=r"shared-memory .* out of bounds"):
        run(built.asm["ptx"], shared_bytes=0)
    with pytest.raises(PtxError, match="two threads store different values"):  # lanes no longer agree on the sum
        run(built.asm["ptx"].replace("shfl.sync.bfly.b32", "shfl.sync.up.b32"))


def test_a_stride_that_breaks_its_promise_is_found(triton_samples: Any) -> None:
    built = compiled(
        triton_samples.aligned_sum, 90, {"x_ptr": "*fp32", "out_ptr": "*fp32", "stride": "i32"}, {"BLOCK": 1024}
    )
    out = torch.zeros(2)
    launch(built.asm["ptx"], (2,), [torch.ones(2, 1040), out, 1040], shared_bytes=built.metadata.shared)
    assert out.tolist() == [1024, 1024]
    with pytest.raises(PtxError, match="misaligned 16-byte global load"):
        launch(built.asm["ptx"], (2,), [torch.ones(2, 1039), out, 1039], shared_bytes=built.metadata.shared)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_triton_sums_sorts_counts_and_draws(arch: int, triton_samples: Any) -> None:
    size = 256
    x = torch.randn(size, generator=torch.Generator().manual_seed(1)).clamp(-3.9, 3.9)
    types = {"x_ptr": "*fp32", "sum_ptr": "*fp32", "sort_ptr": "*fp32", "count_ptr": "*i32", "word_ptr": "*i32"}
    built = compiled(triton_samples.many_operations, arch, types, {"N": size})
    sums, ordered, counts, words = torch.zeros(size), torch.zeros(size), torch.zeros(16).int(), torch.zeros(size).int()
    launch(built.asm["ptx"], (1,), [x, sums, ordered, counts, words], shared_bytes=built.metadata.shared)
    torch.testing.assert_close(sums, x.cumsum(0))
    assert torch.equal(ordered, x.sort().values)
    assert torch.equal(counts.long(), torch.bincount((x * 2 + 8).int().long(), minlength=16))
    from ensemble_decode.ops.reference import philox4x32

    token, zero = torch.arange(size), torch.zeros(size, dtype=torch.int64)
    truth = philox4x32((token, zero, zero, zero), (zero + 77, zero))[0]
    assert torch.equal(words.long() & MASK, truth)


def test_cuda_over_a_cluster(tmp_path: Path) -> None:
    import shutil
    import subprocess

    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    (tmp_path / "m.cu").write_text(CLUSTER_MAXIMUM)
    subprocess.run(
        ["nvcc", "-arch=sm_90", "-ptx", "m.cu", "-o", "m.ptx"], cwd=tmp_path, check=True, capture_output=True
    )
    ptx = (tmp_path / "m.ptx").read_text()
    z = torch.randn(2, 5001)

    def run(ptx: str) -> list[float]:
        out = torch.zeros(2)
        launch(ptx, (16,), [z, out, 5001], block=(128,), shared_bytes=4 * 640)
        return out.tolist()

    assert run(ptx) == z.amax(1).tolist()
    found, all_of_them, messages = reported(ptx, run)
    assert found == all_of_them == 3, messages
    mapa = re.search(r"mapa\.u64\s+(%\w+), (%\w+), %\w+;", ptx)
    assert mapa is not None
    assert run(re.sub(r"mapa\.u64\s+(%\w+), (%\w+), %\w+;", r"mov.u64 \1, \2;", ptx)) != run(ptx)
