"""The sampling operator in Triton: combine, softmax, filter and sample, in one launch or in two.

Both forms are "Gumbel, then verify". The argmax of s + g over all tokens is what sampling without filters returns. It is
also what sampling with filters returns, if the filters keep it; and whether they keep token j takes two numbers, the mass
and the count of tokens strictly above j. If they don't, all kept tokens lie above j, and the next candidate is the argmax
over those. So the candidates of a row form a staircase, up in score and down in key, and the first one kept is the answer.

Two launches, every device: the first reads the logits once, in chunks that depend on the vocabulary alone, and leaves of
each chunk its maximum, its sum of exponentials, and the first steps of its staircase. The second merges those in a fixed
order. Rows without filters, and rows whose candidate is certainly kept, end there, with nothing read again. For the others
each program weighs its chunk above every candidate of the row; the program that arrives last adds up and chooses. If none
of the candidates was kept, which needs a staircase longer than was written down, that program goes on alone.

One launch, sm_90 and later: a cluster of thread blocks holds a row's scores in registers and runs the same loop on them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .combine import ACROSS, INSIDE, WHOLE_ROW, combined_at, logits_arguments
from .launch import Launch
from .philox import gumbel_noise

LARGEST = tl.constexpr(3.4028234663852886e38)
NONE = tl.constexpr(float("-inf"))

#: Fields of a chunk's partial results, one float32 each (counts and ids are below 2²⁴, and exact).
MAX, SUM, TARGET_MAX, TARGET_SUM, BAD, MORE, COUNT, LIST = (tl.constexpr(i) for i in range(8))
#: (steps of a chunk's staircase that are written down, candidates of a row that one sweep weighs). Where the filters look
#: at the target, what they look at and the keys have less to do with each other, and the staircases are longer.
STAIRCASE = {False: (4, 8), True: (16, 16)}


# ── parts of both forms ─────────────────────────────────────────────────────────────────────────────────────────────
@triton.jit
def _divide(x, heat):
    """x / heat rounded to nearest, as IEEE division: a product with the reciprocal and two corrections (Markstein 1990).

    ``div.rn`` gives the same bits, but calls a subroutine for rare operands, and registers spill around the call.
    """
    inverse = tl.math.div_rn(1.0, heat)
    quotient = x * inverse
    once = tl.fma(tl.fma(-quotient, heat, x), inverse, quotient)
    twice = tl.fma(tl.fma(-once, heat, x), inverse, once)
    return tl.where(tl.abs(quotient) <= LARGEST, twice, quotient)  # an infinite quotient has no remainder


@triton.jit
def _heated(s, t, heat):
    """Both over T; division is exact in every back end, and slow."""
    if heat != 1.0:
        s = _divide(s, heat)
        t = _divide(t, heat)
    return s, t


@triton.jit
def _scores(logits, first, vocab, heat, PAIRS: tl.constexpr, HAS_ANTI: tl.constexpr, BLOCK: tl.constexpr):
    """(s, t = z / T) of tokens ``first … first + BLOCK − 1`` of a row, −inf past its end."""
    at = first + tl.arange(0, BLOCK)
    if first + BLOCK <= vocab:
        t, s = combined_at(logits, at, vocab, PAIRS, HAS_ANTI, INSIDE)
    else:
        t, s = combined_at(logits, at, vocab, PAIRS, HAS_ANTI, ACROSS)
    return _heated(s, t, heat)


@triton.jit
def _scores_of_whole_row(logits, vocab, heat, PAIRS: tl.constexpr, HAS_ANTI: tl.constexpr, BLOCK: tl.constexpr):
    """The same for a block that a row does not fill."""
    t, s = combined_at(logits, tl.arange(0, BLOCK), vocab, PAIRS, HAS_ANTI, WHOLE_ROW)
    return _heated(s, t, heat)


@triton.jit
def _exp_sum(x, maximum):
    """Σ exp(x − maximum); 0 where the maximum is −inf."""
    return tl.sum(tl.exp(x - tl.where(maximum == NONE, 0.0, maximum)), 0)


@triton.jit
def _keys(s, filter_score, seed, position, first, greedy, BLOCK: tl.constexpr):
    """s + g, or s where greedy; −inf where z is masked, and only there."""
    if greedy:
        keys = s
    else:
        keys = s + gumbel_noise(seed, position, first, BLOCK)
    return tl.where(filter_score > NONE, tl.maximum(keys, -LARGEST), NONE)


@triton.jit
def _store_result(
    outputs,
    row,
    chosen,
    logits,
    heat,
    maximum,
    total,
    target_maximum,
    target_total,
    PAIRS: tl.constexpr,
    HAS_ANTI: tl.constexpr,
    IS_COMBINED: tl.constexpr,
):
    """Writes a row's results; ``chosen`` is −1 where it has none."""
    token, logprob, target_logprob = outputs
    tl.store(token + row, chosen.to(tl.int64))
    own = float("nan")
    of_target = float("nan")
    if chosen >= 0:
        z, combined = combined_at(logits, chosen, chosen + 1, PAIRS, HAS_ANTI, INSIDE)
        own = _divide(combined, heat) - maximum - tl.log(total)
        if PAIRS == 0:
            of_target = own
        else:
            of_target = _divide(z, heat) - target_maximum - tl.log(target_total)
        if IS_COMBINED:
            of_target = float("nan")
    tl.store(logprob + row, own)
    tl.store(target_logprob + row, of_target)


@triton.jit
def _least(maximum, total, k, p, least_ratio, vocab):
    """No token whose filter score is below this is kept: min-p's bound, and one for top-p that needs no threshold.

    All tokens with e^(f − m) ≤ (1 − p) Z / V together weigh at most (1 − p) Z, so none of them is in the nucleus.
    """
    least = maximum * 0.0 - LARGEST
    if least_ratio > 0.0:
        least = maximum + tl.log(least_ratio)
    if (p < 1.0) & (k == 0):
        floor = maximum + tl.log((1.0 - p) * total / vocab * 0.9999) - 1e-4
        least = tl.maximum(least, tl.minimum(floor, maximum))
    return least


# ── two launches: the first ─────────────────────────────────────────────────────────────────────────────────────────
@triton.jit
def partials_kernel(
    target,
    expert,
    anti,
    alpha,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    workspace,
    ticket,
    target_stride,
    expert_stride,
    expert_pair_stride,
    anti_stride,
    anti_pair_stride,
    alpha_stride,
    vocab,
    PAIRS: tl.constexpr,
    HAS_ANTI: tl.constexpr,
    BY_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Program (row, chunk): one read of the chunk, and what the second launch needs to know of it."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    first = chunk * BLOCK
    heat = tl.load(temperature + row)
    k = tl.load(top_k + row)
    greedy = heat == 0.0
    heat = tl.where(greedy, 1.0, heat)
    logits = (
        target + row * target_stride,
        expert + row * expert_stride,
        anti + row * anti_stride,
        expert_pair_stride,
        anti_pair_stride,
        alpha + row * alpha_stride,
    )
    s, t = _scores(logits, first, vocab, heat, PAIRS, HAS_ANTI, BLOCK)
    out = workspace + row * FIELDS * LANES + chunk
    maximum = tl.max(s, 0)
    tl.store(out + MAX * LANES, maximum)
    tl.store(out + SUM * LANES, _exp_sum(s, maximum))
    tl.store(out + BAD * LANES, tl.max(tl.where(s <= LARGEST, 0.0, 1.0), 0))
    filter_score = s
    highest = maximum
    if PAIRS > 0:
        target_maximum = tl.max(t, 0)
        tl.store(out + TARGET_MAX * LANES, target_maximum)
        tl.store(out + TARGET_SUM * LANES, _exp_sum(t, target_maximum))
        if BY_TARGET:
            filter_score = t
            highest = target_maximum
    plain = (tl.load(top_p + row) >= 1.0) & (tl.load(min_p + row) <= 0.0) & ((k <= 0) | (k >= vocab))
    if not BY_TARGET:
        plain = plain | greedy
    steps = tl.where(plain, 1, STEPS)
    keys = _keys(s, filter_score, tl.load(seed + row), tl.load(position + row), first, greedy, BLOCK)
    local = tl.arange(0, BLOCK)
    count = 0
    floor = NONE
    while (count < steps) & (floor < highest):
        key, index = tl.max(
            tl.where(filter_score > floor, keys, NONE), 0, return_indices=True, return_indices_tie_break_left=True
        )
        floor = tl.max(tl.where(local == index, filter_score, NONE), 0)
        entry = out + (LIST + 3 * count) * LANES
        tl.store(entry, floor)
        tl.store(entry + LANES, key)
        tl.store(entry + 2 * LANES, (first + index).to(tl.float32))
        count += 1
    tl.store(out + COUNT * LANES, count * 1.0)
    tl.store(out + MORE * LANES, tl.where(floor < highest, floor, float("inf")))
    if chunk == 0:
        tl.store(ticket + row, 0)


# ── two launches: the second ────────────────────────────────────────────────────────────────────────────────────────
@triton.jit
def _ordered_bits(x):
    """float32 as uint32 in the same order."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)


@triton.jit
def _byte_of_kth(histogram, k):
    """(byte in which the k-th largest lies, how many lie in higher bytes), from counts per byte."""
    byte = tl.arange(0, 256)
    from_top = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram
    found = tl.max(tl.where(from_top >= k, byte, 0), 0)
    return found, tl.sum(tl.where(byte > found, histogram, 0), 0)


@triton.jit
def _mass_of_top_k(
    logits,
    vocab,
    heat,
    k,
    maximum,
    PAIRS: tl.constexpr,
    HAS_ANTI: tl.constexpr,
    BY_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ exp(f − maximum) over the k largest and what ties with the k-th: four counts of bytes, and a sum."""
    prefix = tl.zeros([1], tl.uint32)
    known = tl.zeros([1], tl.uint32)
    next_shift = tl.full([1], 24, tl.int32)
    for _ in range(4):
        shift = next_shift.to(tl.uint32)
        next_shift -= 8
        histogram = tl.zeros([256], tl.int32)
        for first in range(0, vocab, BLOCK):
            s, t = _scores(logits, first, vocab, heat, PAIRS, HAS_ANTI, BLOCK)
            bits = _ordered_bits(t if BY_TARGET else s)
            histogram += tl.histogram(((bits >> shift) & 255).to(tl.int32), 256, mask=(bits & known) == prefix)
        byte, above = _byte_of_kth(histogram, k)
        k -= above
        prefix |= byte.to(tl.uint32) << shift
        known |= tl.full([1], 255, tl.uint32) << shift
    mass = 0.0
    for first in range(0, vocab, BLOCK):
        s, t = _scores(logits, first, vocab, heat, PAIRS, HAS_ANTI, BLOCK)
        f = t if BY_TARGET else s
        mass += tl.sum(tl.where(_ordered_bits(f) >= prefix, tl.exp(f - maximum), 0.0), 0)
    return mass


@triton.jit
def resolve_kernel(
    target,
    expert,
    anti,
    alpha,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    workspace,
    ticket,
    token,
    logprob,
    target_logprob,
    target_stride,
    expert_stride,
    expert_pair_stride,
    anti_stride,
    anti_pair_stride,
    alpha_stride,
    vocab,
    PAIRS: tl.constexpr,
    HAS_ANTI: tl.constexpr,
    BY_TARGET: tl.constexpr,
    IS_COMBINED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Program (row, chunk): merges the row's partial results, weighs the chunk above the candidates if that is needed."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    heat = tl.load(temperature + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    ratio = tl.load(min_p + row)
    greedy = heat == 0.0
    heat = tl.where(greedy, 1.0, heat)
    k = tl.where((k <= 0) | (k >= vocab), 0, k)
    unfiltered = (p >= 1.0) & (k == 0)
    if (chunk == 0) | (not (unfiltered & (ratio <= 0.0))):
        logits = (
            target + row * target_stride,
            expert + row * expert_stride,
            anti + row * anti_stride,
            expert_pair_stride,
            anti_pair_stride,
            alpha + row * alpha_stride,
        )
        base = workspace + row * FIELDS * LANES

        # The chunks' results, in the order of the chunks.
        lane = tl.arange(0, LANES)
        used = lane < CHUNKS
        chunk_max = tl.load(base + MAX * LANES + lane, mask=used, other=NONE)
        chunk_sum = tl.load(base + SUM * LANES + lane, mask=used, other=0.0)
        maximum = tl.max(chunk_max, 0)
        valid = (tl.max(tl.load(base + BAD * LANES + lane, mask=used, other=0.0), 0) == 0.0) & (maximum > NONE)
        valid = valid & (ratio <= 1.0)  # above 1 min-p keeps no token
        total = tl.sum(chunk_sum * tl.exp(chunk_max - tl.where(valid, maximum, 0.0)), 0)
        target_maximum, target_total = maximum, total
        f_max, f_total, f_field = maximum, total, MAX
        if PAIRS > 0:
            chunk_max = tl.load(base + TARGET_MAX * LANES + lane, mask=used, other=NONE)
            chunk_sum = tl.load(base + TARGET_SUM * LANES + lane, mask=used, other=0.0)
            target_maximum = tl.max(chunk_max, 0)
            target_total = tl.sum(chunk_sum * tl.exp(chunk_max - tl.where(valid, target_maximum, 0.0)), 0)
            if BY_TARGET:
                f_max, f_total, f_field = target_maximum, target_total, TARGET_MAX

        # The row's staircase, from those of the chunks. Where a chunk's list ends early, no search may start above it.
        entry = tl.arange(0, STEPS * LANES)
        step, at = entry // LANES, entry % LANES
        listed = (at < CHUNKS) & (step < tl.load(base + COUNT * LANES + at, mask=at < CHUNKS, other=0.0).to(tl.int32))
        place = base + (LIST + 3 * step) * LANES + at
        list_f = tl.load(place, mask=listed, other=NONE)
        list_key = tl.load(place + LANES, mask=listed, other=NONE)
        list_id = tl.load(place + 2 * LANES, mask=listed, other=-1.0)
        limit = tl.min(tl.load(base + MORE * LANES + lane, mask=used, other=float("inf")), 0)
        least = _least(f_max, f_total, k, p, ratio, vocab)
        number = tl.arange(0, CANDIDATES)
        threshold = tl.full([CANDIDATES], float("inf"), tl.float32)
        candidate = tl.full([CANDIDATES], -1, tl.int32)
        found = 0
        sure = 0
        floor = NONE
        looking = valid & (least <= limit)
        while looking:
            eligible = (list_f > floor) & (list_f >= least)
            key = tl.max(tl.where(eligible, list_key, NONE), 0)
            token_id = tl.min(tl.where(eligible & (list_key == key), list_id, float("inf")), 0)
            floor = tl.max(tl.where(list_id == token_id, list_f, NONE), 0)
            threshold = tl.where(number == found, floor, threshold)
            candidate = tl.where(number == found, token_id.to(tl.int32), candidate)
            found += 1
            heavy = (k == 0) & (tl.exp(floor - f_max) > (1.0 - p) * f_total * 1.0001)
            sure = (unfiltered | heavy | (floor >= f_max)).to(tl.int32)
            looking = (sure == 0) & (found < CANDIDATES) & (floor < limit)

        chosen = tl.where(valid, tl.sum(tl.where(number == 0, candidate, 0), 0), -1)
        done = (chunk == 0).to(tl.int32)
        if valid & ((sure == 0) | (found > 1)):
            # The mass and the count above each candidate, in this chunk.
            weighed = found - sure
            above = base + (LIST + 3 * STEPS) * LANES
            if tl.load(base + f_field * LANES + chunk) > tl.min(threshold, 0):
                s, t = _scores(logits, chunk * BLOCK, vocab, heat, PAIRS, HAS_ANTI, BLOCK)
                f = t if BY_TARGET else s
                weight = tl.exp(f - f_max)
                for i in range(weighed):
                    bound = tl.min(tl.where(number == i, threshold, float("inf")), 0)
                    tl.store(above + i * LANES + chunk, tl.sum(tl.where(f > bound, weight, 0.0), 0))
                    tl.store(above + (CANDIDATES + i) * LANES + chunk, tl.sum(tl.where(f > bound, 1.0, 0.0), 0))
            else:
                for i in range(weighed):
                    tl.store(above + i * LANES + chunk, 0.0)
                    tl.store(above + (CANDIDATES + i) * LANES + chunk, 0.0)
            tl.debug_barrier()
            done = (tl.atomic_add(ticket + row, 1, sem="acq_rel", scope="gpu") == CHUNKS - 1).to(tl.int32)
            if done == 1:
                tl.debug_barrier()
                if (k > 0) & (p < 1.0):
                    f_total = _mass_of_top_k(
                        logits,
                        vocab,
                        heat,
                        k,
                        f_max,
                        PAIRS,
                        HAS_ANTI,
                        BY_TARGET,
                        BLOCK,
                    )
                nucleus = tl.where(p < 1.0, p * f_total, float("inf"))
                most = tl.where(k > 0, k.to(tl.float32), float("inf"))
                chosen = -1
                i = 0
                while (i < weighed) & (chosen < 0):
                    mass = tl.sum(tl.load(above + i * LANES + lane, mask=used, other=0.0, volatile=True), 0)
                    count = tl.sum(
                        tl.load(above + (CANDIDATES + i) * LANES + lane, mask=used, other=0.0, volatile=True), 0
                    )
                    if (mass < nucleus) & (count < most):
                        chosen = tl.max(tl.where(number == i, candidate, -1), 0)
                    i += 1
                if (chosen < 0) & (sure == 1):
                    chosen = tl.max(tl.where(number == found - 1, candidate, -1), 0)
                # The staircase is longer than the lists: further rounds, each of which checks a candidate and finds the next.
                next_id = -1
                while chosen < 0:
                    mass = 0.0
                    count = 0.0
                    best_key = NONE
                    best_id = -1
                    best_f = NONE
                    for first in range(0, vocab, BLOCK):
                        s, t = _scores(logits, first, vocab, heat, PAIRS, HAS_ANTI, BLOCK)
                        f = t if BY_TARGET else s
                        mass += tl.sum(tl.where(f > floor, tl.exp(f - f_max), 0.0), 0)
                        count += tl.sum(tl.where(f > floor, 1.0, 0.0), 0)
                        keys = _keys(s, f, tl.load(seed + row), tl.load(position + row), first, greedy, BLOCK)
                        key, index = tl.max(
                            tl.where((f > floor) & (f >= least), keys, NONE),
                            0,
                            return_indices=True,
                            return_indices_tie_break_left=True,
                        )
                        if key > best_key:
                            best_key = key
                            best_id = first + index
                            best_f = tl.max(tl.where(tl.arange(0, BLOCK) == index, f, NONE), 0)
                    if (next_id >= 0) & (mass < nucleus) & (count < most):
                        chosen = next_id
                    elif best_f >= f_max:
                        chosen = best_id
                    else:
                        next_id = best_id
                        floor = best_f
        if done == 1:
            _store_result(
                (token, logprob, target_logprob),
                row,
                chosen,
                logits,
                heat,
                maximum,
                total,
                target_maximum,
                target_total,
                PAIRS,
                HAS_ANTI,
                IS_COMBINED,
            )


# ── one launch ──────────────────────────────────────────────────────────────────────────────────────────────────────
@triton.jit
def whole_row_kernel(
    target,
    expert,
    anti,
    alpha,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    token,
    logprob,
    target_logprob,
    target_stride,
    expert_stride,
    expert_pair_stride,
    anti_stride,
    anti_pair_stride,
    alpha_stride,
    vocab,
    PAIRS: tl.constexpr,
    HAS_ANTI: tl.constexpr,
    BY_TARGET: tl.constexpr,
    IS_COMBINED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row): a cluster holds the row's scores in registers; noise and exponentials are computed again each round."""
    row = tl.program_id(0).to(tl.int64)
    logits = (
        target + row * target_stride,
        expert + row * expert_stride,
        anti + row * anti_stride,
        expert_pair_stride,
        anti_pair_stride,
        alpha + row * alpha_stride,
    )
    heat = tl.load(temperature + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    greedy = heat == 0.0
    heat = tl.where(greedy, 1.0, heat)
    k = tl.where((k <= 0) | (k >= vocab), 0, k)
    s, t = _scores_of_whole_row(logits, vocab, heat, PAIRS, HAS_ANTI, BLOCK)
    maximum = tl.max(s, 0)
    bad = tl.max(tl.where(s <= LARGEST, 0.0, 1.0), 0)
    ratio = tl.load(min_p + row)
    valid = (bad == 0.0) & (maximum > NONE) & (ratio <= 1.0)  # above 1 min-p keeps no token
    total = _exp_sum(s, maximum)
    target_maximum, target_total = maximum, total
    f = s
    f_max, f_total = maximum, total
    if PAIRS > 0:
        target_maximum = tl.max(t, 0)
        target_total = _exp_sum(t, target_maximum)
        if BY_TARGET:
            f = t
            f_max, f_total = target_maximum, target_total
    least = _least(f_max, f_total, k, p, ratio, vocab)
    unfiltered = (p >= 1.0) & (k == 0)
    if (k > 0) & (p < 1.0):
        # The k-th largest, bit by bit; then the mass from it on.
        bits = _ordered_bits(f)
        kth = tl.full([1], 0, tl.uint32)
        bit = tl.full([1], 0x80000000, tl.uint32)
        for _ in range(32):
            trial = kth | bit
            bit = bit >> 1
            kth = tl.where(tl.sum(tl.where(bits >= trial, 1, 0), 0) >= k, trial, kth)
        f_total = tl.sum(tl.where(_ordered_bits(f) >= kth, tl.exp(f - f_max), 0.0), 0)
    nucleus = tl.where(p < 1.0, p * f_total, float("inf"))
    most = tl.where(k > 0, k.to(tl.float32), float("inf"))
    chosen = -1
    floor = NONE
    looking = valid
    while looking:
        keys = _keys(s, f, tl.load(seed + row), tl.load(position + row), 0, greedy, BLOCK)
        _, index = tl.max(
            tl.where((f > floor) & (f >= least), keys, NONE), 0, return_indices=True, return_indices_tie_break_left=True
        )
        floor = tl.max(tl.where(tl.arange(0, BLOCK) == index, f, NONE), 0)
        kept = unfiltered | (floor >= f_max)
        if not kept:
            mass = tl.sum(tl.where(f > floor, tl.exp(f - f_max), 0.0), 0)
            count = tl.sum(tl.where(f > floor, 1.0, 0.0), 0)
            kept = (mass < nucleus) & (count < most)
        if kept:
            chosen = index
        looking = chosen < 0
    _store_result(
        (token, logprob, target_logprob),
        row,
        chosen,
        logits,
        heat,
        maximum,
        total,
        target_maximum,
        target_total,
        PAIRS,
        HAS_ANTI,
        IS_COMBINED,
    )


# ── the host's side ─────────────────────────────────────────────────────────────────────────────────────────────────
def one_launch_fits(capability: tuple[int, int] | None, vocab: int) -> bool:
    """Whether a device holds a row of ``vocab`` scores in the registers of one cluster, and this Triton compiles that.

    Data-centre Hopper and Blackwell form clusters of 16; consumer Blackwell (12.x) stops at 8, half as many tokens. Triton
    before 3.8 fails on the kernel ("TritonGPUPlanCTAPass").
    """
    triton_version = tuple(int(x) for x in triton.__version__.split(".")[:2])
    if capability is None or capability < (9, 0) or triton_version < (3, 8):
        return False
    return vocab <= (131072 if capability[0] in (9, 10) else 65536)


def plan(
    target: Tensor,
    expert: Tensor | None,
    anti_expert: Tensor | None,
    alpha: Tensor | None,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    nucleus_target: bool,
    target_is_combined: bool,
    *,
    capability: tuple[int, int] | None,
    one_launch: bool | None = None,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """The launches that sample one token a row, and the tensors they write: (token, logprob, target_logprob).

    Shapes and types as in ``ops.ensemble_sample``, not checked here; a row whose min_p is above 1 has token −1, as in CUDA
    C++. Nothing is read of any tensor: the launches depend on shapes, strides and types alone, so they can be captured in a
    CUDA graph. The grid depends on the vocabulary and the number of rows, the order of every sum on the vocabulary and the
    type only.

    Parameters
    ----------
    capability : (int, int) or None
        Of an NVIDIA device; None for AMD's.
    one_launch : bool, optional
        Which form; by default, one launch where it fits (:func:`one_launch_fits`).
    """
    rows, vocab = target.shape
    token = torch.empty(rows, dtype=torch.int64, device=target.device)
    logprob, target_logprob = (torch.empty(rows, dtype=torch.float32, device=target.device) for _ in range(2))
    results = {"token": token, "logprob": logprob, "target_logprob": target_logprob}
    inputs: dict[str, Any] = logits_arguments(target, expert, anti_expert, alpha)
    inputs |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    inputs |= {"seed": seed, "position": position}
    inputs["BY_TARGET"] = nucleus_target and inputs["PAIRS"] > 0  # without a pair the two distributions are one
    outputs = (token, logprob, target_logprob)
    if rows == 0:
        return [], outputs
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if one_launch_fits(capability, vocab) if one_launch is None else one_launch:
        block = max(1024, triton.next_power_of_2(vocab))
        options |= {"num_warps": min(16, block // 512), "num_ctas": max(1, block // 8192)}
        arguments = inputs | results | {"IS_COMBINED": target_is_combined, "BLOCK": block}
        return [Launch(whole_row_kernel, (rows,), arguments, options)], outputs
    block = 1024 if vocab <= 131072 else 2048
    chunks = triton.cdiv(vocab, block)
    steps, candidates = STAIRCASE[inputs["BY_TARGET"]]
    sizes = {"BLOCK": block, "LANES": triton.next_power_of_2(chunks), "STEPS": steps}
    sizes["FIELDS"] = LIST.value + 3 * steps + 2 * candidates
    inputs["workspace"] = torch.empty(rows, sizes["FIELDS"], sizes["LANES"], dtype=torch.float32, device=target.device)
    inputs["ticket"] = torch.empty(rows, dtype=torch.int32, device=target.device)
    # Eight tokens a thread: one 16-byte load of a 16-bit type. In the second kernel four of float32, whose pairs would spill.
    warp_size = 32 if capability else 64
    options["num_warps"] = block // 8 // warp_size
    resolve_options = options | {"num_warps": block * target.element_size() // 16 // warp_size}
    # Left alone, ptxas keeps the second kernel to fewer registers than that, and spills.
    resolve_options |= {"maxnreg": 128} if capability else {}
    more = {"IS_COMBINED": target_is_combined, "CHUNKS": chunks, "CANDIDATES": candidates}
    return [
        Launch(partials_kernel, (rows, chunks), inputs | sizes, options),
        Launch(resolve_kernel, (rows, chunks), inputs | results | sizes | more, resolve_options),
    ], outputs
