"""Small kernels, right and wrong, that the tools of this folder are tested with."""

from __future__ import annotations

import triton
import triton.language as tl

from ensemble_decode.kernels.philox import gumbel_noise, gumbel_of_word, philox4x32_10


@triton.jit
def copy_reads_past_the_end(x, out, N: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i), mask=i < N)


@triton.jit
def copy_writes_past_the_end(x, out, N: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < N))


@triton.jit
def offset_in_int32(x, out, stride):
    row = tl.program_id(0) + 16383
    tl.store(out, tl.load(x + (row * stride) % 4))


@triton.jit
def offset_in_int64(x, out, stride):
    row = (tl.program_id(0) + 16383).to(tl.int64)
    tl.store(out, tl.load(x + (row * stride) % 4))


@triton.jit
def asserts_negative(x, out):
    tl.device_assert(tl.load(x) < 0, "boom")


@triton.jit
def stores_twice(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, i)


@triton.jit
def reads_misaligned(x, out):
    pair = (x.to(tl.pointer_type(tl.int8)) + 2).to(tl.pointer_type(tl.float32))
    tl.store(out, tl.load(pair))


@triton.jit
def to_bfloat16(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


@triton.jit
def waits_for_all(flag, out, PROGRAMS: tl.constexpr):
    """Needs every program on the device at once: one after the other it never ends."""
    program = tl.program_id(0)
    tl.atomic_add(flag, 1, sem="release", scope="gpu")
    while tl.atomic_add(flag, 0, sem="acquire", scope="gpu") < PROGRAMS:
        pass
    tl.store(out + program, program)


@triton.jit
def split_sum(x, partial, ticket, out, SEMANTICS: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr):
    """Sums by splits; the program that arrives last adds them up. Right with SEMANTICS acq_rel, a race with relaxed."""
    program = tl.program_id(0)
    tl.store(partial + program, tl.sum(tl.load(x + program * CHUNK + tl.arange(0, CHUNK)), 0))
    if tl.atomic_add(ticket, 1, sem=SEMANTICS, scope="gpu") == SPLITS - 1:
        tl.store(out, tl.sum(tl.load(partial + tl.arange(0, SPLITS), volatile=True), 0))
        tl.store(ticket, 0)


@triton.jit
def scaled_sum(x, y, out, alpha, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Σ (x + α y): whole blocks without a mask, or every load with one, which costs the vector width where n is odd."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        at = start + columns
        if MASKED:
            total += tl.load(x + at, mask=at < n, other=0.0) + alpha * tl.load(y + at, mask=at < n, other=0.0)
        else:
            total += tl.load(x + at) + alpha * tl.load(y + at)
    tl.store(out, tl.sum(total, 0))


@triton.jit
def many_values(x, out, BLOCK: tl.constexpr):
    """Keeps a block in registers over two reductions: a large block on one warp spills."""
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    shifted = value - tl.max(value, 0)
    tl.store(out + i, shifted / tl.sum(shifted, 0))


@triton.jit
def doubles(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, (tl.load(x + i).to(tl.float64) * 1.1).to(tl.float32))


@triton.jit
def philox_words(counter_and_key, out):
    c0 = tl.load(counter_and_key).to(tl.uint32)
    c1 = tl.load(counter_and_key + 1).to(tl.uint32)
    c2 = tl.load(counter_and_key + 2).to(tl.uint32)
    c3 = tl.load(counter_and_key + 3).to(tl.uint32)
    k0 = tl.load(counter_and_key + 4).to(tl.uint32)
    k1 = tl.load(counter_and_key + 5).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32_10(c0, c1, c2, c3, k0, k1)
    tl.store(out, w0.to(tl.int64))
    tl.store(out + 1, w1.to(tl.int64))
    tl.store(out + 2, w2.to(tl.int64))
    tl.store(out + 3, w3.to(tl.int64))


@triton.jit
def noise_of_a_row(out, seed, position, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), gumbel_noise(seed, position, 0, BLOCK))


@triton.jit
def noise_of_words(words, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, gumbel_of_word(tl.load(words + i).to(tl.uint32)))


@triton.jit
def noise_of_quads(out, seed, position, ROWS: tl.constexpr):
    """Rows of four tokens, each with a seed and a position of its own."""
    row = tl.arange(0, ROWS)
    noise = gumbel_noise(tl.load(seed + row), tl.load(position + row), 0, 4 * ROWS)
    tl.store(out + tl.arange(0, 4 * ROWS), noise)
