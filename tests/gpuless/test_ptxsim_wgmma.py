"""The PTX simulator's products of a warpgroup, from every layout in shared memory, each with bugs that it must find."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.gpuless.ptx_samples import WARPGROUPS
from tests.gpuless.ptxsim import PtxError, launch

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
PRODUCT = re.search(r"wgmma\.mma_async[^\n]*", WARPGROUPS)[0]
#: Descriptor's swizzle field by the chunks of 16 bytes in a line.
SWIZZLE = {1: 0, 8: 1, 4: 2, 2: 3}


Layout = tuple[int, bool]  # chunks of 16 bytes in a line; is a line a column


def put(image: torch.Tensor, matrix: torch.Tensor, at: int, layout: Layout, strides: tuple[int, int]) -> None:
    """Lay a matrix [rows, k] out in 16-bit elements as the manual draws it.

    Of every 8 lines, which follow one another, each has its chunks in another order.
    """
    (width, transposed), (down, across) = layout, strides
    for i, line in enumerate(matrix.T if transposed else matrix):
        for j, chunk in enumerate(line.split(8)):
            place = j % width ^ i % 8 // (8 // width)
            start = (at + i // 8 * down + j // width * across + (i % 8 * width + place) * 16) // 2
            image[start : start + 8] = chunk


def descriptor(at: int, layout: Layout, strides: tuple[int, int]) -> int:
    """Without a swizzle the leading offset goes from a chunk to the next along k; else only columns in memory have one."""
    (width, transposed), (down, across) = layout, strides
    leading, stride = (down, across) if width == 1 and transposed else (across, down)
    return at >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLE[width] << 62


def fragments(a: torch.Tensor) -> torch.Tensor:
    """A [64, 16] as the threads of a warpgroup hold it: [128, 4 registers of 2]."""
    result = a.new_empty(128, 4, 2)
    for thread in range(128):
        for i in range(4):
            row, column = 16 * (thread // 32) + thread % 32 // 4 + i % 2 * 8, thread % 4 * 2 + i // 2 * 8
            result[thread, i] = a[row, column : column + 2]
    return result


def matrices(out: torch.Tensor) -> torch.Tensor:
    """[2, 64, 16] from the accumulators [2, 128, 8]."""
    result = out.new_empty(2, 64, 16)
    for thread in range(128):
        for i in range(8):
            row = 16 * (thread // 32) + thread % 32 // 4 + i // 2 % 2 * 8
            result[:, row, i // 4 * 8 + thread % 4 * 2 + i % 2] = out[:, thread, i]
    return result


def product(ptx: str = WARPGROUPS, kind: str = "bf16", layout: Layout = (2, False), **options: Any) -> Any:
    """(results of both warpgroups [2, 64, 16], A [64, 16], B [16 columns, 16]).

    Both lie in shared memory in that layout, A at 8 KB, B on both sides of 4 KB, up to where ordinary stores fill it. Their k
    is the last 16 of a line: descriptors may begin inside one.
    """
    width, transposed = layout
    generator = torch.Generator().manual_seed(0)
    depth = 16 if transposed else max(16, 8 * width)
    a, b = (torch.randn(rows, depth, generator=generator).to(DTYPES[kind]) for rows in (64, 16))
    image = torch.zeros(8192, dtype=DTYPES[kind])
    skipped = (depth - 16) * 2
    descriptors = []
    for matrix, at in ((a, 8192), (b, 4096 - 128 * width)):
        chunks = (len(matrix) if transposed else depth) // 8
        strides = (128 * width * -(-chunks // width), 128 * width)
        put(image, matrix, at, layout, strides)
        descriptors.append(descriptor(at + skipped, layout, strides))
    out = torch.empty(2, 128, 8)
    a, b = a[:, -16:], b[:, -16:]
    tensors = [image, fragments(a), out]
    launch(ptx, (1,), [*tensors, *descriptors], names=("image", "a", "out"), scratch=("out",), **options)
    return matrices(out), a.float(), b.float()


def from_memory(ptx: str, transposed: bool) -> str:
    """A from shared memory as well, and both of them transposed."""
    return ptx.replace("{%r4, %r5, %r6, %r7}, %rd5, 1, 1, 1, 0", f"%rd4, %rd5, 1, 1, 1, {transposed:d}, {transposed:d}")


@pytest.mark.parametrize("source", ["registers", "memory"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", SWIZZLE)
def test_products_from_every_layout(width: int, transposed: bool, source: str) -> None:
    """Bit for bit the exact sum, rounded once; with ``approximate``, near it and the same in both warpgroups."""
    ptx = WARPGROUPS.replace("1, 1, 1, 0;", f"1, 1, 1, {transposed:d};")
    ptx = from_memory(WARPGROUPS, transposed) if source == "memory" else ptx
    for kind in DTYPES:
        typed = ptx.replace("bf16", kind)
        out, a, b = product(typed, kind, (width, transposed))
        exact = a.double() @ b.double().T + 1
        assert torch.equal(out, exact.float().expand(2, 64, 16))
    near = product(typed, kind, (width, transposed), approximate=True)[0]
    assert ((near - exact).abs() <= 2**-20 * (a.double().abs() @ b.double().abs().T + 1)).all()
    assert not torch.equal(near, out)
    assert torch.equal(near[0], near[1])


@pytest.mark.parametrize(
    ("options", "want"),
    [("1, 1, -1, 0", (-1, 1)), ("1, -1, -1, 0", (1, 1)), ("0, 1, 1, 0", (1, 0)), ("%p2, 1, 1, 0", (1, 1))],
)
def test_signs_and_what_is_not_added(options: str, want: tuple[int, int]) -> None:
    sign, added = want
    ptx = WARPGROUPS.replace("1, 1, 1, 0;", f"{options};").replace("%p2, %r1, 255", "%p2, %r1, 999")
    if not added:  # whose registers nobody has to set
        ptx = re.sub(r"    mov\.f32 %f\d[^\n]*\n", "", ptx)
    out, a, b = product(ptx)
    assert torch.equal(out, (sign * (a.double() @ b.double().T) + added).float().expand(2, 64, 16))


PROXY, BARRIER, FENCE = "    fence.proxy.async.shared::cta;\n", "    bar.sync 0;\n", "    wgmma.fence.sync.aligned;\n"
COMMIT, WAIT = "    wgmma.commit_group.sync.aligned;\n", "    wgmma.wait_group.sync.aligned 0;\n"
COPIED = "    cp.async.wait_all;\n"
STORE = "    st.shared.v2.u64 [%r2], {%rd6, %rd7};\n"
OTHER_SHAPE = "    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, {%r4, %r5, %r6, %r7}, %rd5, 1, 1, 1, 0;\n"


def test_a_proxy_fence_of_the_writers_or_of_the_readers_will_do() -> None:
    want = product()[0]
    assert torch.equal(product(WARPGROUPS.replace(BARRIER + PROXY, PROXY + BARRIER))[0], want)
    assert torch.equal(product(order="random")[0], want)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # the proxy, and other warps
        (PROXY, "", "no fence.proxy.async between"),
        (BARRIER + PROXY, PROXY + STORE + BARRIER, "no fence.proxy.async between"),
        (COPIED + BARRIER + PROXY, PROXY + COPIED + BARRIER, "no fence.proxy.async between"),
        (PROXY, PROXY.replace("    ", "    @%p2 "), "no fence.proxy.async between"),
        (PROXY, PROXY + "    @%p1 st.shared.u32 [%r2], %r1;\n" + BARRIER, "no fence.proxy.async between"),
        (PROXY, PROXY.replace("shared::cta", "global"), "not simulated"),
        (BARRIER, "", "race: a product of a word that another warp wrote"),
        (BARRIER + PROXY, PROXY, "race: a product of a word that another warp wrote"),
        (COPIED, "", "load where a cp.async is under way"),
        # registers
        (FENCE, "", "%f1 was used since the last wgmma.fence"),
        (FENCE, FENCE + "    mov.f32 %f3, %f1;\n", "%f1 was used since the last wgmma.fence"),
        (FENCE, FENCE + "    add.u32 %r5, %r4, 1;\n", "%r4 was used since the last wgmma.fence"),
        (COMMIT, OTHER_SHAPE + COMMIT, "%f1 was used since the last wgmma.fence, or by a wgmma of another shape"),
        (COMMIT, FENCE + OTHER_SHAPE + COMMIT, "by a wgmma of another shape"),
        (COMMIT, "", "access to %f1, which a wgmma may still use"),
        (WAIT, "", "access to %f1, which a wgmma may still use"),
        ("wait_group.sync.aligned 0", "wait_group.sync.aligned 1", "access to %f1, which a wgmma may still use"),
        (COMMIT + WAIT, WAIT + COMMIT, "access to %f1, which a wgmma may still use"),
        (COMMIT, COMMIT + "    mov.f32 %f7, 0f00000000;\n", "access to %f7, which a wgmma may still use"),
        (WAIT, "    mov.u32 %r7, 0;\n" + WAIT, "access to %r7, which a wgmma may still use"),
        (WAIT, "    @%p1 mov.u32 %r8, %r6;\n" + WAIT, "access to %r6, which a wgmma may still use"),
        # shared memory under its reads
        (COMMIT, COMMIT + "    @%p1 st.shared.u32 [%r2], %r1;\n", "store where a wgmma may still read"),
        (WAIT, BARRIER + "    @%p1 st.shared.u32 [%r2], %r1;\n" + WAIT, "store where a wgmma may still read"),
        (COMMIT, COMMIT + "    @%p1 cp.async.ca.shared.global [%r2], [%rd1], 4;\n", "store where a wgmma may still read"),
        (WAIT, WAIT + "    @%p1 st.shared.u32 [%r2], %r1;\n", "race: store to a word that another warp read"),
        # descriptors
        ("[right];\n", "[right];\n    add.u64 %rd5, %rd5, 800;\n", "product out of bounds"),
        ("[right];\n", "[right];\n    or.b64 %rd5, %rd5, 0x2000000000000;\n", "a base offset or an unknown bit"),
        ("    st.shared", "    @%p2 st.shared", "nothing was stored to"),
        (PROXY, PROXY + "    @%p1 add.u64 %rd5, %rd5, 2;\n", "different matrix descriptors"),
        # who executes it
        (PRODUCT, "setp.lt.u32 %p1, %r1, 224;\n    @%p1 " + PRODUCT, "224 threads execute it, it needs all four warps"),
        (PRODUCT, "setp.ge.u32 %p1, %r1, 64;\n    @%p1 " + PRODUCT, "192 threads execute it, it needs all four warps"),
        (PRODUCT, "and.b32 %r8, %r1, 64;\n    setp.eq.u32 %p1, %r8, 64;\n    @%p1 " + PRODUCT, "128 threads execute it"),
        (FENCE, FENCE.replace("    ", "    @%p2 "), "needs whole warps"),
        (COMMIT, COMMIT.replace("    ", "    @%p2 "), "needs whole warps"),
        (WAIT, WAIT.replace("    ", "    @%p2 "), "needs whole warps"),
        ("%rd5, 1, 1, 1, 0", "%rd5, %p2, 1, 1, 0", "disagree on whether to add"),
        # what is not there
        ("k16.f32.bf16.bf16", "k8.f32.tf32.tf32", "not simulated"),
        ("m64n16", "m64n8", "not simulated"),
        ("    mov.f32 %f4, 0f3F800000;\n", "", "%f4, which is not set"),
    ],
)  # fmt: skip
def test_what_a_warpgroup_can_do_wrong(old: str, new: str, message: str) -> None:
    assert old in WARPGROUPS
    with pytest.raises(PtxError, match=re.escape(message)):
        product(WARPGROUPS.replace(old, new, 1))


def test_products_are_waited_for_in_groups() -> None:
    """``wait_group 1`` ends the first of two groups, the memory it reads included."""
    second = re.sub(r"%f(\d)", lambda m: f"%f{int(m[1]) + 10}", PRODUCT).replace("%rd5", "%rd4")
    ptx = WARPGROUPS.replace(".reg .f32 %f<10>", ".reg .f32 %f<20>")
    ptx = ptx.replace(FENCE, "".join(f"    mov.f32 %f{i}, 0f00000000;\n" for i in range(11, 19)) + FENCE)
    ptx = ptx.replace(COMMIT, f"{COMMIT}    {second}\n{COMMIT}")
    want = product()[0]
    assert torch.equal(product(ptx)[0], want)
    ptx = ptx.replace("aligned 0;", "aligned 1;")
    overwrite = BARRIER + "    @%p1 st.shared.u32 [%r2+{}], %r1;\n"
    assert torch.equal(product(ptx.replace("    ret;", overwrite.format(0) + "    ret;"))[0], want)
    for body, message in (
        ("    mov.f32 %f1, %f18;\n", "access to %f18, which a wgmma may still use"),
        (overwrite.format(4112), "store where a wgmma may still read"),
    ):
        with pytest.raises(PtxError, match=re.escape(message)):
            product(ptx.replace("    ret;", body + "    ret;"))
