// The AVX-512 instructions that csrc/cpu uses, computed with AVX2: so that layers_v4.cpp runs on machines without them.
//
// test_avx512.py includes it in layers_v4.cpp. Types are the compiler's own, which are vectors of 64 bytes on any target; what
// an instruction does is Intel's description of it, lane by lane. Only the names below exist: another one does not compile.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#pragma GCC diagnostic ignored "-Wpsabi"

namespace avx512 {

using F = float __attribute__((vector_size(64)));
using I = int32_t __attribute__((vector_size(64)));
using U = uint32_t __attribute__((vector_size(64)));
using L = uint64_t __attribute__((vector_size(64)));
using Mask = uint16_t;
using Half = uint16_t __attribute__((vector_size(32)));
using Brain = uint16_t __attribute__((vector_size(64)));
struct HalfBrain {  // __m256bh
  uint16_t lanes[16];
};

#define EACH(type, expression)                    \
  type r;                                         \
  for (int i = 0; i < 16; i++) r[i] = expression; \
  return r
#define EACH_BIT(condition)                                                     \
  Mask m = 0;                                                                   \
  for (int i = 0; i < 16; i++) m |= static_cast<Mask>((condition ? 1 : 0) << i); \
  return m

// ── moving ──────────────────────────────────────────────────────────────────────────────────────────────────────────
template <typename To, typename From>
static inline To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  std::memcpy(&r, &x, sizeof(r));
  return r;
}
template <typename To>
static inline To load(const void* p) {
  To r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
template <typename T>
static inline void store(void* p, T x) {
  std::memcpy(p, &x, sizeof(x));
}
static inline F set1(float x) { EACH(F, x); }
static inline I set1(int x) { EACH(I, x); }
static inline I set1(long long x) {
  L r;
  for (int i = 0; i < 8; i++) r[i] = static_cast<uint64_t>(x);
  return bits_of<I>(r);
}
template <typename T>
static inline T choose(T otherwise, Mask m, T x) {
  EACH(T, (m >> i & 1 ? x[i] : otherwise[i]));
}
template <typename T>
static inline T compress(Mask m, T x) {
  T r = {};
  for (int i = 0, n = 0; i < 16; i++)
    if (m >> i & 1) r[n++] = x[i];
  return r;
}
static inline __m256 half(F x, int which) { return load<__m256>(reinterpret_cast<const char*>(&x) + 32 * which); }
// Within each 128 bits: elements of `Of` from the low (0) or high (1) half of both, in turns.
template <typename Of>
static inline I unpack(I x, I y, int high) {
  constexpr int kCount = 16 / sizeof(Of), kHalf = kCount / 2;
  Of a[64 / sizeof(Of)], b[64 / sizeof(Of)], r[64 / sizeof(Of)];
  std::memcpy(a, &x, 64);
  std::memcpy(b, &y, 64);
  for (int lane = 0; lane < 4; lane++)
    for (int i = 0; i < kHalf; i++) {
      r[lane * kCount + 2 * i] = a[lane * kCount + high * kHalf + i];
      r[lane * kCount + 2 * i + 1] = b[lane * kCount + high * kHalf + i];
    }
  return load<I>(r);
}

// ── arithmetic ──────────────────────────────────────────────────────────────────────────────────────────────────────
static inline F fma(F x, F y, F z) { EACH(F, __builtin_fmaf(x[i], y[i], z[i])); }
static inline F max(F x, F y) { EACH(F, (x[i] > y[i] ? x[i] : y[i])); }
static inline F min(F x, F y) { EACH(F, (x[i] < y[i] ? x[i] : y[i])); }
static inline F abs(F x) { return bits_of<F>(bits_of<U>(x) & 0x7fffffffu); }
// To the nearest integer, of two the even one: the only rounding that is asked for.
static inline F round(F x, int how) {
  if (how != 8) __builtin_trap();
  EACH(F, __builtin_rintf(x[i]));
}
// x 2^floor(n), rounded once: a double holds the product exactly. NaN where n is.
static inline F scale(F x, F n) {
  F r;
  for (int i = 0; i < 16; i++) {
    if (n[i] != n[i]) {
      r[i] = n[i];
      continue;
    }
    int64_t exponent = static_cast<int64_t>(__builtin_floorf(n[i])) + 1023;
    if (exponent < 1 || exponent > 2046) __builtin_trap();
    double power = bits_of<double>(exponent << 52);
    r[i] = static_cast<float>(static_cast<double>(x[i]) * power);
  }
  return r;
}
static inline I multiply_even(I x, I y) {
  L a = bits_of<L>(x) & 0xffffffffu, b = bits_of<L>(y) & 0xffffffffu;
  return bits_of<I>(a * b);
}

// ── comparisons ─────────────────────────────────────────────────────────────────────────────────────────────────────
static inline Mask compare(F x, F y, int how) {
  switch (how) {
    case _CMP_LE_OQ: { EACH_BIT(x[i] <= y[i]); }
    case _CMP_GT_OQ: { EACH_BIT(x[i] > y[i]); }
    case _CMP_EQ_OQ: { EACH_BIT(x[i] == y[i]); }
    default: __builtin_trap();
  }
}
static inline Mask test(I x, I y) { EACH_BIT((x[i] & y[i]) != 0); }

// ── conversions ─────────────────────────────────────────────────────────────────────────────────────────────────────
static inline I widen_u16(__m256i x) {
  Half h = bits_of<Half>(x);
  EACH(I, h[i]);
}
static inline I widen_i8(__m128i x) {
  int8_t lanes[16];
  std::memcpy(lanes, &x, 16);
  EACH(I, lanes[i]);
}
static inline F float_of(I x) { EACH(F, static_cast<float>(x[i])); }
static inline F float_of_unsigned(I x) { EACH(F, static_cast<float>(static_cast<uint32_t>(x[i]))); }
static inline F float_of_half(__m256i x) {
  __m256 r[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
  return load<F>(r);
}
static inline __m256i half_of_float(F x, int how) {
  if (how != 0) __builtin_trap();
  __m128i r[2] = {_mm256_cvtps_ph(half(x, 0), 0), _mm256_cvtps_ph(half(x, 1), 0)};
  return load<__m256i>(r);
}

// ── bfloat16: subnormals count as zero, going in and coming out ─────────────────────────────────────────────────────
static inline float flushed(float x) {
  uint32_t bits = bits_of<uint32_t>(x);
  return (bits & 0x7f800000u) == 0 ? bits_of<float>(bits & 0x80000000u) : x;
}
static inline HalfBrain brain_of_float(F x) {
  HalfBrain r;
  for (int i = 0; i < 16; i++) {
    uint32_t bits = bits_of<uint32_t>(flushed(x[i]));
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    r.lanes[i] = static_cast<uint16_t>(nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  return r;
}
// Each lane adds the product of its upper numbers, then that of its lower ones. A product of two is exact in float32.
static inline F dot(F sum, Brain pairs_x, Brain pairs_y) {
  U x = bits_of<U>(pairs_x), y = bits_of<U>(pairs_y);
  F r;
  for (int i = 0; i < 16; i++) {
    float upper = flushed(bits_of<float>(x[i] & 0xffff0000u)) * flushed(bits_of<float>(y[i] & 0xffff0000u));
    float lower = flushed(bits_of<float>(x[i] << 16)) * flushed(bits_of<float>(y[i] << 16));
    r[i] = flushed(flushed(flushed(sum[i]) + flushed(upper)) + flushed(lower));
  }
  return r;
}
#undef EACH
#undef EACH_BIT

}  // namespace avx512

#define __m512 avx512::F
#define __m512i avx512::I
#define __m512bh avx512::Brain
#define __m256bh avx512::HalfBrain
#define __mmask16 avx512::Mask
#define _mm512_set1_ps(x) avx512::set1(static_cast<float>(x))
#define _mm512_set1_epi32(x) avx512::set1(static_cast<int>(x))
#define _mm512_set1_epi64(x) avx512::set1(static_cast<long long>(x))
#undef _mm512_setr_epi32  // a macro in the compiler's header
#define _mm512_setr_epi32(...) (avx512::I{__VA_ARGS__})
#define _mm512_loadu_ps avx512::load<avx512::F>
#define _mm512_loadu_si512 avx512::load<avx512::I>
#define _mm512_storeu_ps avx512::store<avx512::F>
#define _mm512_storeu_si512 avx512::store<avx512::I>
#define _mm512_castps_si512 avx512::bits_of<avx512::I>
#define _mm512_castsi512_ps avx512::bits_of<avx512::F>
#define _mm512_castps512_ps256(x) avx512::half(x, 0)
#define _mm512_extractf32x8_ps avx512::half
#define _mm512_add_ps(x, y) ((x) + (y))
#define _mm512_sub_ps(x, y) ((x) - (y))
#define _mm512_mul_ps(x, y) ((x) * (y))
#define _mm512_div_ps(x, y) ((x) / (y))
#define _mm512_fmadd_ps avx512::fma
#define _mm512_max_ps avx512::max
#define _mm512_min_ps avx512::min
#define _mm512_abs_ps avx512::abs
#define _mm512_roundscale_ps avx512::round
#define _mm512_scalef_ps avx512::scale
#define _mm512_add_epi32(x, y) avx512::bits_of<avx512::I>(avx512::bits_of<avx512::U>(x) + avx512::bits_of<avx512::U>(y))
#define _mm512_xor_si512(x, y) ((x) ^ (y))
#define _mm512_or_si512(x, y) ((x) | (y))
#define _mm512_slli_epi32(x, n) avx512::bits_of<avx512::I>(avx512::bits_of<avx512::U>(x) << (n))
#define _mm512_srli_epi32(x, n) avx512::bits_of<avx512::I>(avx512::bits_of<avx512::U>(x) >> (n))
#define _mm512_slli_epi64(x, n) avx512::bits_of<avx512::I>(avx512::bits_of<avx512::L>(x) << (n))
#define _mm512_srli_epi64(x, n) avx512::bits_of<avx512::I>(avx512::bits_of<avx512::L>(x) >> (n))
#define _mm512_mul_epu32 avx512::multiply_even
#define _mm512_unpacklo_epi32(x, y) avx512::unpack<uint32_t>(x, y, 0)
#define _mm512_unpackhi_epi32(x, y) avx512::unpack<uint32_t>(x, y, 1)
#define _mm512_unpacklo_epi64(x, y) avx512::unpack<uint64_t>(x, y, 0)
#define _mm512_unpackhi_epi64(x, y) avx512::unpack<uint64_t>(x, y, 1)
#define _mm512_mask_mov_ps avx512::choose<avx512::F>
#define _mm512_mask_mov_epi32 avx512::choose<avx512::I>
#define _mm512_maskz_mov_ps(m, x) avx512::choose<avx512::F>(avx512::F{}, m, x)
#define _mm512_mask_blend_ps(m, x, y) avx512::choose<avx512::F>(x, m, y)
#define _mm512_maskz_compress_ps avx512::compress<avx512::F>
#define _mm512_maskz_compress_epi32 avx512::compress<avx512::I>
#define _mm512_cmp_ps_mask avx512::compare
#define _mm512_test_epi32_mask avx512::test
#define _mm512_cvtepu16_epi32 avx512::widen_u16
#define _mm512_cvtepi8_epi32 avx512::widen_i8
#define _mm512_cvtepi32_ps avx512::float_of
#define _mm512_cvtepu32_ps avx512::float_of_unsigned
#define _mm512_cvtph_ps avx512::float_of_half
#define _mm512_cvtps_ph avx512::half_of_float
#define _mm512_cvtneps_pbh avx512::brain_of_float
#define _mm512_dpbf16_ps avx512::dot
