"""The PTX simulator's matrices of a warp and its copies that are under way, each with bugs that it must find."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpuless.ptx_samples import PRODUCT, ROWS, straight
from tests.gpuless.ptxsim import PtxError, launch
from tests.gpuless.ptxsim.values import f32_to_tf32


def with_rows(body: str, outputs: int, scratch: tuple[str, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """(the lanes' rows of 8 elements of 16 bits, what ``body`` put into %o0 …) of a warp that begins with ``ROWS``."""
    data = np.random.default_rng(0).integers(0, 2**64, (32, 3), np.uint64)
    out = np.zeros((32, outputs), np.uint64)
    launch(straight(ROWS + body, outputs), (1,), [data, out], names=("in", "out"), scratch=scratch)
    return np.ascontiguousarray(data[:, :2]).view(np.uint16), out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_a_lane_gets_two_neighbours_of_each_matrix(pieces: int, transposed: bool) -> None:
    names = ", ".join(f"%r{4 + i}" for i in range(pieces))
    suffix = ".trans" if transposed else ""
    body = f"ldmatrix.sync.aligned.m8n8.x{pieces}{suffix}.shared.b16 {{{names}}}, [%r1];\n"
    rows, out = with_rows(body + "".join(f"cvt.u64.u32 %o{i}, %r{4 + i};\n" for i in range(pieces)), pieces)
    for i in range(pieces):
        matrix = rows[8 * i : 8 * i + 8].T if transposed else rows[8 * i : 8 * i + 8]
        for lane in range(32):
            low, high = matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert out[lane, i] == int(low) | int(high) << 16


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_a_stored_matrix_is_the_loaded_one(pieces: int, transposed: bool) -> None:
    names = ", ".join(f"%r{4 + i}" for i in range(pieces))
    body = (
        f"ldmatrix.sync.aligned.m8n8.x{pieces}.shared.b16 {{{names}}}, [%r1];\n"
        f"stmatrix.sync.aligned.m8n8.x{pieces}{'.trans' * transposed}.shared.b16 [%r1], {{{names}}};\n"
        "bar.warp.sync -1;\nld.shared.v2.b64 {%o0, %o1}, [%r1];\n"
    )
    rows, out = with_rows(body, 2)
    want = rows.reshape(4, 8, 8).copy()
    if transposed:
        want[:pieces] = want[:pieces].transpose(0, 2, 1)
    assert np.array_equal(out.view(np.uint16), want.reshape(32, 8))


LOAD = "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r4, %r5}, [%r1];\nmov.b64 %o0, 0;"
STORE = "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r1], {%r0, %r0};\nmov.b64 %o0, 0;"


@pytest.mark.parametrize(
    ("body", "old", "new", "message"),
    [
        (LOAD, "[%r1]", "[%r1+8]", "misaligned 16-byte shared-memory load"),
        (LOAD, "[%r1]", "[%r1+400]", "shared-memory load out of bounds"),
        (LOAD, "ldmatrix", "setp.lt.u32 %p1, %r0, 31;\n@%p1 ldmatrix", "31 threads of 1 warps execute it"),
        (LOAD, "x2", "x4", "of 2 registers: not simulated"),
        (STORE, "[%r1]", "[%r1+8]", "misaligned 16-byte shared-memory store"),
        (STORE, "[%r1]", "[%r1+400]", "shared-memory store out of bounds"),
        (STORE, "stmatrix", "setp.lt.u32 %p1, %r0, 16;\n@%p1 stmatrix", "16 threads of 1 warps execute it"),
        (STORE, "{%r0, %r0}", "{%r0, %r9}", "%r9, which is not set"),
        (STORE, "stmatrix", "mov.u32 %r1, 0;\nstmatrix", "two threads store different values"),
    ],
)  # fmt: skip
def test_what_a_matrix_in_shared_memory_can_do_wrong(body: str, old: str, new: str, message: str) -> None:
    with_rows(body, 1)
    assert old in body
    with pytest.raises(PtxError, match=re.escape(message)):
        with_rows(body.replace(old, new, 1), 1)


def test_a_matrix_that_nobody_wrote_is_not_read() -> None:
    body = ROWS.replace("st.shared", "setp.ne.u32 %p1, %r0, 15;\n@%p1 st.shared") + LOAD
    data, out = np.zeros((32, 3), np.uint64), np.zeros((32, 1), np.uint64)
    with pytest.raises(PtxError, match="nothing was stored to"):
        launch(straight(body), (1,), [data, out])
    launch(straight(body.replace("%r0, 15", "%r0, 16")), (1,), [data, out])  # whose address is not looked at


# ── products ────────────────────────────────────────────────────────────────────────────────────────────────────────
def rounded(values: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 numbers of matrices [rows, 32 bytes] in that format, the same as bytes)."""
    if kind == "tf32":
        bits = torch.from_numpy(f32_to_tf32(values[:, :8].numpy()).view(np.int32))
        return bits.view(torch.float32), bits.view(torch.uint8)
    narrow = values.to(torch.bfloat16 if kind == "bf16" else torch.float16)
    return narrow.float(), narrow.view(torch.uint8)


def product(ptx: str = PRODUCT, kind: str = "bf16", **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the kernel returns, its two warps' results [2, 16, 8], and A and B that it was given."""
    values = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    numbers, data = rounded(values, kind)
    out = torch.empty(2, 16, 8)
    tensors = [data[:16].clone(), data[16:].clone(), out]
    launch(ptx, (1,), tensors, names=("a", "b", "out"), scratch=("out",), **options)
    return out, numbers[:16], numbers[16:]


@pytest.mark.parametrize(("kind", "k"), [("bf16", 16), ("f16", 16), ("tf32", 8), ("bf16", 8), ("tf32", 4)])
def test_products_of_matrices(kind: str, k: int) -> None:
    """Bit for bit the exact sum, rounded once; with ``approximate``, near it and the same in both warps."""
    ptx = PRODUCT.replace("k16.row.col.f32.bf16.bf16", f"k{k}.row.col.f32.{kind}.{kind}")
    if k < (8 if kind == "tf32" else 16):
        ptx = ptx.replace("%r12, %r13}, {%r14, %r15}", "}, {%r14}").replace("%r11, }", "%r11}")
    out, a, b = product(ptx, kind)
    exact = a[:, :k].double() @ b[:, :k].double().T + 1
    assert torch.equal(out, exact.float().expand(2, 16, 8))
    near = product(ptx, kind, approximate=True)[0]
    magnitude = a[:, :k].double().abs() @ b[:, :k].double().abs().T + 1
    assert ((near - exact).abs() <= 2**-20 * magnitude).all()
    assert not torch.equal(near, out)
    assert torch.equal(near[0], near[1])


def test_bits_that_tf32_does_not_have_are_cut_off() -> None:
    ptx = PRODUCT.replace("k16.row.col.f32.bf16.bf16", "k8.row.col.f32.tf32.tf32")
    wide = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    narrow = (wide.view(torch.int32) & ~0x1FFF).view(torch.float32)
    results = []
    for values in (wide, narrow):
        results.append(torch.empty(2, 16, 8))
        launch(ptx, (1,), [values[:16].clone(), values[16:].clone(), results[-1]])
    assert torch.equal(*results)


def test_conversion_to_tf32_rounds_ties_away_from_zero() -> None:
    bits = np.array([0x3F800FFF, 0x3F801000, 0xBF801000, 0x3F803000, 0x7F800000, 0x7F7FFFFF, 0], np.uint32)
    body = "cvt.u32.u64 %r1, %a;\nmov.b32 %f1, %r1;\ncvt.rna.tf32.f32 %r2, %f1;\ncvt.u64.u32 %o0, %r2;"
    data, out = np.zeros((32, 3), np.uint64), np.zeros((32, 1), np.uint64)
    data[: bits.size, 0] = bits
    launch(straight(body), (1,), [data, out])
    want = [0x3F800000, 0x3F802000, 0xBF802000, 0x3F804000, 0x7F800000, 0x7F800000, 0]
    assert out[: bits.size, 0].tolist() == want
    assert np.isnan(f32_to_tf32(np.float32([np.nan])).view(np.float32)).all()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    mma.", "    setp.lt.u32 %p1, %r1, 50;\n    @%p1 mma.", "50 threads of 2 warps execute it"),
        ("{%f1, %f1, %f1, %f1}", "{%f1, %f1, %f1, %f6}", "%f6, which is not set"),
        ("{%r14, %r15}, {%f1", "{%r14}, {%f1", "not simulated"),
        ("k16.row.col.f32.bf16.bf16", "k32.row.col.s32.s8.s8", "not simulated"),
    ],
)
def test_what_a_product_can_do_wrong(old: str, new: str, message: str) -> None:
    assert old in PRODUCT
    with pytest.raises(PtxError, match=re.escape(message)):
        product(PRODUCT.replace(old, new))


# ── copies under way ────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    cp.async.wait_group 0;\n", "", "load where a cp.async is under way"),
        ("wait_group 0", "wait_group 1", "load where a cp.async is under way"),
        ("    cp.async.commit_group;\n", "", "load where a cp.async is under way"),
        ("    bar.sync 0;\n", "", "race: load of a word that another warp wrote"),
        ("    cp.async.wait_group 0;\n    bar.sync 0;\n", "    bar.sync 0;\n    cp.async.wait_group 0;\n", "race: load of a word that another warp wrote"),
        ("    cp.async.commit_group;\n", "    @%p2 st.shared.u32 [%r4], %r1;\n    cp.async.commit_group;\n", "store where a cp.async is under way"),
        ("    ret;", "    @%p2 cp.async.cg.shared.global [%r4+-512], [%rd6+-512], 0x10;\n    ret;", "race: store to a word that another warp read"),
        ("[%r4], [%rd5]", "[%r2], [%rd5]", "two threads"),
        ("[%r4], [%rd5]", "[%r4+4], [%rd5]", "misaligned 16-byte shared-memory store"),
        ("%r5, 16;", "%r5, 16;\n    add.s64 %rd5, %rd5, 4;\n    setp.lt.u32 %p1, %r1, 31;", "misaligned 16-byte global load"),
        ("[%r4], [%rd5]", "[%r4+512], [%rd5]", "shared-memory store out of bounds"),
        ("[%r4], [%rd5]", "[%r4], [%rd5+16]", "out-of-bounds global load of 16 bytes"),
        ("mov.u32 %r5, 16", "mov.u32 %r5, 12", "a part of 16 bytes: not simulated"),
        ("0x10, %r5", "0x8, %r5", "not simulated"),
        ("cp.async.cg", "cp.async.bulk", "not simulated"),
    ],
)  # fmt: skip
def test_what_a_copy_can_do_wrong(old: str, new: str, message: str) -> None:
    assert old in PRODUCT
    with pytest.raises(PtxError, match=message):
        product(PRODUCT.replace(old, new))


def test_copies_are_waited_for_in_groups() -> None:
    """Of two groups, ``wait_group 1`` ends the first; ``wait_all`` also what was not committed; what isn't read is 0."""
    copies = (
        "ld.param.u64 %rd1, [in];\nmad.wide.u32 %rd1, %r0, 24, %rd1;\nmov.u32 %r3, 0;\n.shared .align 16 .b8 two[512];\n"
        "mov.u32 %r4, two;\nshl.b32 %r2, %r0, 3;\nadd.u32 %r4, %r4, %r2;\n"
        "cp.async.ca.shared.global [%r4], [%rd1], 8;\ncp.async.commit_group;\n"
        "cp.async.ca.shared.global [%r4+256], [%rd1+8], 8, %r3;\ncp.async.commit_group;\n"
    )
    data = np.random.default_rng(0).integers(0, 2**64, (32, 3), np.uint64)
    out = np.zeros((32, 2), np.uint64)

    def run(body: str) -> None:
        launch(straight(copies + body, 2), (1,), [data, out])

    both = "ld.shared.u64 %o0, [%r4];\nld.shared.u64 %o1, [%r4+256];"
    for wait in ("cp.async.wait_group 0;\n", "cp.async.wait_all;\n"):
        run(wait + both)
        assert np.array_equal(out[:, 0], data[:, 0])
        assert not out[:, 1].any()
    run("cp.async.wait_group 1;\nld.shared.u64 %o0, [%r4];\nmov.b64 %o1, 0;")
    with pytest.raises(PtxError, match="has not waited for it"):
        run("cp.async.wait_group 1;\n" + both)
    more = "cp.async.ca.shared.global [%r4+256], [%rd1], 4;\n"
    with pytest.raises(PtxError, match=r"store where a cp\.async is under way"):
        run(more + both)
    with pytest.raises(PtxError, match=r"load where a cp\.async is under way"):
        run(f"cp.async.wait_group 0;\n{more}cp.async.wait_group 0;\n{both}")
    run(f"cp.async.wait_group 0;\n{more}cp.async.wait_all;\n{both}")
    assert np.array_equal(out[:, 1], data[:, 0] & np.uint64(2**32 - 1))
