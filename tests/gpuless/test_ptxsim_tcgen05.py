"""The PTX simulator's products in tensor memory, with mbarriers, each with bugs that it must find."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.gpuless.ptx_samples import tensor_core
from tests.gpuless.ptxsim import PtxError, launch
from tests.gpuless.test_ptxsim_wgmma import DTYPES, SWIZZLE, Layout, descriptor, put

CORE = tensor_core()


def product(ptx: str = CORE, kind: str = "bf16", layout: Layout = (2, False), rows: int = 64, flags: int = 0) -> Any:
    """(the accumulators [rows, 16], A [rows, 16], B [16 columns, 16]), A and B in shared memory as for a warpgroup.

    ``flags`` are added to the instruction descriptor.
    """
    width, transposed = layout
    generator = torch.Generator().manual_seed(0)
    depth = 16 if transposed else max(16, 8 * width)
    a, b = (torch.randn(n, depth, generator=generator).to(DTYPES[kind]) for n in (rows, 16))
    image = torch.zeros(8192 + rows * 64, dtype=DTYPES[kind])
    descriptors = []
    for matrix, at in ((a, 8192 if rows == 64 else 0), (b, 4096 - 128 * width if rows == 64 else 14336)):
        chunks = (len(matrix) if transposed else depth) // 8
        strides = (128 * width * -(-chunks // width), 128 * width)
        put(image, matrix, at, layout, strides)
        fields = descriptor(at + (depth - 16) * 2, layout, strides) & (1 << 62) - 1
        descriptors.append(fields | 1 << 46 | {1: 0, 8: 2, 4: 4, 2: 6}[width] << 61)
    a, b = a[:, -16:].contiguous(), b[:, -16:]
    # a thread's words of A: 4 of a row and, 16 lanes on, the 4 others of the same, or all 8
    words = a.view(4, 16, 2, 8).transpose(1, 2).contiguous() if rows == 64 else a
    shape = 1 << 4 | (0x480 if kind == "bf16" else 0) | flags | 2 << 17 | rows // 16 << 24
    out = torch.empty(128, rows // 8)
    launch(
        ptx, (1,), [image, words, out, *descriptors, shape], names=("image", "a", "out"), scratch=("out",), steps=300
    )
    results = out.view(4, 2, 16, 8).transpose(1, 2).reshape(64, 16) if rows == 64 else out
    return results, a.float(), b.float()


def from_memory(ptx: str) -> str:
    return ptx.replace("[%r8], %rd5", "%rd4, %rd5")


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", SWIZZLE)
def test_products_from_every_layout(width: int, transposed: bool, rows: int) -> None:
    """Bit for bit the exact sum, rounded once; A from tensor memory and, where 16 KB hold it, from shared memory."""
    for kind in DTYPES:
        flags = transposed << 16
        sources = [(tensor_core(rows), flags)]
        if rows == 64 or width < 8:
            sources.append((from_memory(tensor_core(rows)), flags | transposed << 15))
        for ptx, flags in sources:
            out, a, b = product(ptx, kind, (width, transposed), rows, flags)
            assert torch.equal(out, (a.double() @ b.double().T + 1).float())


@pytest.mark.parametrize(
    ("flags", "predicate", "want"), [(1 << 13, -1, (-1, 1)), (3 << 13, -1, (1, 1)), (0, 0, (1, 0))]
)
def test_signs_and_what_is_not_added(flags: int, predicate: int, want: tuple[int, int]) -> None:
    ptx = CORE.replace("mov.pred %p6, -1", f"mov.pred %p6, {predicate}")
    if not predicate:  # which nobody has to have stored
        ptx = re.sub(r"    tcgen05\.st\S+\.x8\.b32[^\n]*\n", "", ptx)
    out, a, b = product(ptx, flags=flags)
    assert torch.equal(out, (want[0] * (a.double() @ b.double().T) + want[1]).float())


STORED, LOADED = "    tcgen05.wait::st.sync.aligned;\n", "    tcgen05.wait::ld.sync.aligned;\n"
PROXY, BARRIER = "    fence.proxy.async.shared::cta;\n", "    bar.sync 0;\n"
WAIT = CORE[CORE.index("    {\n    .reg .pred complete") : CORE.index("    tcgen05.ld")]
ALLOCATE = CORE[CORE.index("    @%p1 tcgen05.alloc") : CORE.index("    @%p1 tcgen05.relinquish")]
FREE = CORE[CORE.index("    @%p1 tcgen05.dealloc") : CORE.index("    ret;")]
COMMIT = re.search(r"    @%p4 tcgen05\.commit[^\n]*\n", CORE)[0]
LOAD = re.search(r"    tcgen05\.ld[^\n]*\n", CORE)[0]
ONES = re.search(r"    tcgen05\.st\S+\.x8\.b32[^\n]*\n", CORE)[0]
BEGIN = "    bar.sync 0;\n    @!%p1 bra"
END = "    bar.sync 0;\n    @%p3 mbarrier.inval"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # tensor memory: who may touch it when
        (STORED, "", "load of tensor memory where a tcgen05.st is under way"),
        (BEGIN, "    @!%p1 bra", "tensor-memory race: load of a word that another warp wrote"),
        (WAIT, "", "tensor-memory race: load of a word that another warp wrote"),
        (LOAD, ONES + LOAD, "load of tensor memory where a tcgen05.st is under way"),
        (WAIT, ONES + WAIT, "tensor-memory race: store to a word that another warp wrote"),
        (LOADED, "", "store to tensor memory where a tcgen05.ld or tcgen05.st is under way"),
        (END, "    @%p3 mbarrier.inval", "race: store to a word that another warp read"),
        (ONES, "", "load of tensor memory that nothing was stored to"),
        # its allocation
        (FREE, "", "ends without tcgen05.dealloc"),
        (FREE, FREE + FREE, "which were not allocated so"),
        (FREE, FREE.replace("32;", "64;"), "which were not allocated so"),
        (ALLOCATE, ALLOCATE.replace("32;", "48;"), "must be a power of two"),
        (ALLOCATE, ALLOCATE.replace("32;", "16;"), "must be a power of two"),
        ("    @%p3 mbarrier.init", ALLOCATE + "    @%p3 mbarrier.init", "after relinquish_alloc_permit"),
        (ALLOCATE, ALLOCATE.replace("32;", "512;") + ALLOCATE, "it would wait"),
        ("add.u32 %r8, %r5, 16", "add.u32 %r8, %r5, 32", "not allocated"),
        ("ld.shared.u32 %r5, [%r3];", "mov.u32 %r5, 0;", "not allocated"),
        (BARRIER, "", "race: load of a word that another warp wrote"),
        # lanes
        ("shl.b32 %r6, %r6, 21", "shl.b32 %r6, %r6, 20", "out of the warp's reach"),
        ("add.u32 %r7, %r5, %r6;", "add.u32 %r7, %r5, %r6;\n    add.u32 %r7, %r7, 0x80000;", "out of the warp's reach or misaligned"),
        ("add.u32 %r8, %r5, 16", "add.u32 %r8, %r5, 0x80010", "64 rows of tensor memory at lane 8: misaligned"),
        (LOAD, "    @%p2 add.u32 %r7, %r7, 1;\n" + LOAD, "the lanes of a warp have different operands"),
        (LOAD, LOAD.replace("    ", "    @!%p2 "), "needs whole warps"),
        # shared memory
        (PROXY, "", "no fence.proxy.async between"),
        (PROXY + BEGIN, BARRIER + "    @%p2 st.shared.u32 [%r2+2048], %r1;\n" + BEGIN, "no fence.proxy.async between"),
        ("    cp.async.wait_all;\n", "", "load where a cp.async is under way"),
        (WAIT, "    @%p2 st.shared.u32 [%r2+2048], %r1;\n" + WAIT, "race: store to a word that another warp read"),
        (WAIT, BARRIER + "    @%p2 st.shared.u32 [%r2+2048], %r1;\n" + WAIT, "race: store to a word that another warp read"),
        ("[right];\n", "[right];\n    add.u64 %rd5, %rd5, 2048;\n", "product out of bounds"),
        ("[right];\n", "[right];\n    or.b64 %rd5, %rd5, 0x2000000000000;\n", "a base offset or an unknown bit"),
        ("[right];\n", "[right];\n    xor.b64 %rd5, %rd5, 0x400000000000;\n", "a base offset or an unknown bit"),
        ("    st.shared.v2.u64 [%r2+2048]", "    @!%p2 st.shared.v2.u64 [%r2+2048]", "nothing was stored to"),
        # the mbarrier
        (COMMIT, "", "no end after"),
        (".b64 [%r4], 1;", ".b64 [%r4], 2;", "no end after"),
        ("mov.u32 %r11, 0;", "mov.u32 %r11, 1;", "no end after"),
        ("    @%p3 mbarrier.init.shared::cta.b64 [%r4], 1;\n", "", "not initialised"),
        ("    @%p3 mbarrier.init", "    @%p1 mbarrier.init", "mbarrier.init of a live mbarrier"),
        (COMMIT, COMMIT + "    @%p3 st.shared.u32 [%r4], %r1;\n", "store of an mbarrier, which is not invalidated"),
        (COMMIT, COMMIT + "    ld.shared.u32 %r1, [%r4+4];\n", "load of an mbarrier, which is not invalidated"),
        (COMMIT, COMMIT + "    @%p3 mbarrier.inval.shared::cta.b64 [%r4];\n", "race: store to a word that another warp read"),
        (FREE, FREE + "    @%p3 ld.shared.u32 %r1, [%r4];\n", "nothing was stored to"),
        ("try_wait.parity", "arrive", "not simulated"),
        # who executes it
        ("elect.sync %r12|%p4, -1;", "setp.lt.u32 %p4, %r1, 2;", "2 threads of 1 CTAs execute it"),
        (COMMIT, COMMIT.replace("    @%p4", "    setp.eq.u32 %p4, %r1, 1;\n    @%p4"), "by two threads of a CTA"),
        # what is not there
        ("[shape];\n", "[shape];\n    or.b32 %r9, %r9, 4;\n", "instruction descriptor 0x4040494: not simulated"),
        ("[shape];\n", "[shape];\n    xor.b32 %r9, %r9, 16;\n", "not simulated"),
        ("[shape];\n", "[shape];\n    or.b32 %r9, %r9, 0x8000;\n", "cannot be transposed"),
        ("kind::f16", "kind::tf32", "not simulated"),
        ("16x32bx2.x8", "16x64b.x8", "not simulated"),
        ("    mov.b32 %o4, 0f3F800000;\n", "", "%o4, which is not set"),
    ],
)  # fmt: skip
def test_what_a_product_in_tensor_memory_can_do_wrong(old: str, new: str, message: str) -> None:
    assert old in CORE
    with pytest.raises(PtxError, match=re.escape(message)):
        product(CORE.replace(old, new, 1))


def test_labels_of_nested_scopes_are_their_own() -> None:
    """The wait, twice: compilers write its label once in each block of assembler."""
    want = product()[0]
    assert torch.equal(product(CORE.replace(WAIT, WAIT + WAIT))[0], want)
