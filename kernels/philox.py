"""Philox4x32-10 (Salmon et al., SC'11) and the Gumbel noise of the sampling contract, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4x32_10(c0, c1, c2, c3, k0, k1):
    """The four words of a counter and a key, all uint32 of one shape."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def gumbel_of_word(word):
    """g = −log(−log1p(−u)) of uint32 words, float32; −inf where u rounds to 1.

    Below a quarter, −log1p(−u) is u times a polynomial (relative error 4e-8): log(1 − u) would lose the small u, whose
    tokens win, and log1p is not in every target's library.
    """
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = 0.33995219228401813 * u + 0.14381851748831162
    series = series * u + 0.2578205146867278
    series = series * u + 0.3328547746974813
    series = series * u + 0.5000105607498737
    series = series * u + 0.9999999625414058
    return -tl.log(tl.where(u < 0.25, series * u, -tl.log(1.0 - u)))


@triton.jit
def gumbel_noise(seed, position, first, SIZE: tl.constexpr):
    """Noise of tokens ``first … first + SIZE − 1``, float32 [SIZE]; ``first`` and SIZE are multiples of 4.

    One call of Philox serves four neighbouring tokens, which the layout of 16-byte loads keeps in one thread.
    """
    quad = ((first >> 2) + tl.arange(0, SIZE // 4)).to(tl.uint32)
    zero = tl.zeros_like(quad)
    c1, k0, k1 = zero + position.to(tl.uint32), zero + seed.to(tl.uint32), zero + (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32_10(quad, c1, zero, zero, k0, k1)
    return gumbel_of_word(tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [SIZE]))
