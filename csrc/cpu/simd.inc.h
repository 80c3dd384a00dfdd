// Sixteen floats as one value, on every level of instruction set. Included by layers_*.cpp, which define SIMD_LEVEL.
//
// V16 is one register with AVX-512, two with AVX2, four elsewhere; the kernels are written once, in V16, and choose
// their register tile by kRegisters.

#if SIMD_LEVEL == 4
struct V16 {
  __m512 a;
};
constexpr int kRegisters = 32, kRegistersPerV16 = 1;
static inline V16 set1(float x) { return {_mm512_set1_ps(x)}; }
static inline V16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, V16 v) { _mm512_storeu_ps(p, v.a); }
static inline V16 operator+(V16 x, V16 y) { return {_mm512_add_ps(x.a, y.a)}; }
static inline V16 operator-(V16 x, V16 y) { return {_mm512_sub_ps(x.a, y.a)}; }
static inline V16 operator*(V16 x, V16 y) { return {_mm512_mul_ps(x.a, y.a)}; }
static inline V16 operator/(V16 x, V16 y) { return {_mm512_div_ps(x.a, y.a)}; }
static inline V16 fma(V16 x, V16 y, V16 z) { return {_mm512_fmadd_ps(x.a, y.a, z.a)}; }
// The second operand where either is NaN.
static inline V16 max(V16 x, V16 y) { return {_mm512_max_ps(x.a, y.a)}; }
static inline V16 min(V16 x, V16 y) { return {_mm512_min_ps(x.a, y.a)}; }
static inline V16 round_to_integer(V16 x) { return {_mm512_roundscale_ps(x.a, 8)}; }
static inline V16 load(const bfloat16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
static inline V16 load(const float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline V16 load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
static inline void store(bfloat16* p, V16 v) {
  __m256bh h = _mm512_cvtneps_pbh(v.a);
  __builtin_memcpy(p, &h, 32);
}
static inline void store(float16* p, V16 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v.a, 0));
}
// x * 2^n for integral n in [-252, 254].
static inline V16 scale_by_power_of_2(V16 x, V16 n) { return {_mm512_scalef_ps(x.a, n.a)}; }
// x * 2^n, where `n` is the lowest bits of t; neither x nor the result may be subnormal.
static inline V16 add_to_exponent(V16 x, V16 t) {
  __m512i n = _mm512_slli_epi32(_mm512_castps_si512(t.a), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x.a), n))};
}
// Lanes below n keep their value, the others become `fill`.
static inline V16 keep_below(V16 x, int n, V16 fill) {
  __mmask16 m = n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
  return {_mm512_mask_mov_ps(fill.a, m, x.a)};
}
// Bit i: lane i of x is at most that of y (false where either is NaN).
static inline unsigned mask_le(V16 x, V16 y) { return _mm512_cmp_ps_mask(x.a, y.a, _CMP_LE_OQ); }
// Lane by lane x > y ? a : b.
static inline V16 where_greater(V16 x, V16 y, V16 a, V16 b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.a, y.a, _CMP_GT_OQ), b.a, a.a)};
}
// The lanes of x whose bit is set, in their order; sixteen numbers are written at most.
static inline void store_chosen(float* p, V16 x, unsigned mask) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), x.a));
}
// first + i for each bit i that is set, in their order; sixteen numbers are written at most.
static inline void store_ids(int32_t* p, int32_t first, unsigned mask) {
  __m512i ids = _mm512_add_epi32(_mm512_set1_epi32(first),
                                 _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), ids));
}
// Lanes of x, but -inf where z is.
static inline V16 masked_by(V16 x, V16 z) {
  return {_mm512_mask_mov_ps(x.a, _mm512_cmp_ps_mask(z.a, _mm512_set1_ps(-__builtin_inff()), _CMP_EQ_OQ), z.a)};
}
static inline V16 finite_or_zero(V16 x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(x.a), _mm512_set1_ps(3.402823466e38f), _CMP_LE_OQ), x.a)};
}

#elif SIMD_LEVEL == 3
struct V16 {
  __m256 a, b;
};
constexpr int kRegisters = 16, kRegistersPerV16 = 2;
static inline V16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline V16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, V16 v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
static inline V16 operator+(V16 x, V16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline V16 operator-(V16 x, V16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline V16 operator*(V16 x, V16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline V16 operator/(V16 x, V16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline V16 fma(V16 x, V16 y, V16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
// The second operand where either is NaN.
static inline V16 max(V16 x, V16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline V16 min(V16 x, V16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline V16 round_to_integer(V16 x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
static inline __m256 widen(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline V16 load(const bfloat16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {widen(_mm_loadu_si128(q)), widen(_mm_loadu_si128(q + 1))};
}
static inline V16 load(const float16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
static inline V16 load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))))};
}
static inline __m128i narrow(__m256 x) {  // to nearest even; a NaN stays one
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
static inline void store(bfloat16* p, V16 v) {
  __m128i* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, narrow(v.a));
  _mm_storeu_si128(q + 1, narrow(v.b));
}
static inline void store(float16* p, V16 v) {
  __m128i* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(v.a, 0));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(v.b, 0));
}
static inline __m256 scale8(__m256 x, __m256 n) {
  // In two halves, so that each factor is a normal number.
  __m256i all = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(all, 1), rest = _mm256_sub_epi32(all, half);
  __m256i bias = _mm256_set1_epi32(127);
  x = _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}
// x * 2^n for integral n in [-252, 254].
static inline V16 scale_by_power_of_2(V16 x, V16 n) { return {scale8(x.a, n.a), scale8(x.b, n.b)}; }
static inline __m256 add_to_exponent(__m256 x, __m256 t) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
// x * 2^n, where `n` is the lowest bits of t; neither x nor the result may be subnormal.
static inline V16 add_to_exponent(V16 x, V16 t) { return {add_to_exponent(x.a, t.a), add_to_exponent(x.b, t.b)}; }
// Lanes below n keep their value, the others become `fill`.
static inline V16 keep_below(V16 x, int n, V16 fill) {
  __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256 lo = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
  __m256 hi = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane));
  return {_mm256_blendv_ps(fill.a, x.a, lo), _mm256_blendv_ps(fill.b, x.b, hi)};
}
// Bit i: lane i of x is at most that of y (false where either is NaN).
static inline unsigned mask_le(V16 x, V16 y) {
  unsigned lo = static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_LE_OQ)));
  unsigned hi = static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_LE_OQ)));
  return lo | hi << 8;
}
// Lane by lane x > y ? a : b.
static inline V16 where_greater(V16 x, V16 y, V16 a, V16 b) {
  return {_mm256_blendv_ps(b.a, a.a, _mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ)),
          _mm256_blendv_ps(b.b, a.b, _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ))};
}
// Where the chosen of eight lanes lie, a byte each.
struct Chosen {
  uint64_t lanes[256];
  constexpr Chosen() : lanes() {
    for (unsigned mask = 0; mask < 256; mask++)
      for (unsigned i = 0, count = 0; i < 8; i++)
        if (mask >> i & 1) lanes[mask] |= static_cast<uint64_t>(i) << (8 * count++);
  }
};
static constexpr Chosen kChosen;
static inline __m256i chosen_lanes(unsigned mask) {
  return _mm256_cvtepu8_epi32(_mm_loadu_si64(&kChosen.lanes[mask]));
}
// The lanes of x whose bit is set, in their order; sixteen numbers are written at most.
static inline void store_chosen(float* p, V16 x, unsigned mask) {
  unsigned low = mask & 255;
  _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(x.a, chosen_lanes(low)));
  _mm256_storeu_ps(p + __builtin_popcount(low), _mm256_permutevar8x32_ps(x.b, chosen_lanes(mask >> 8)));
}
// first + i for each bit i that is set, in their order; sixteen numbers are written at most.
static inline void store_ids(int32_t* p, int32_t first, unsigned mask) {
  unsigned low = mask & 255;
  __m256i lo = _mm256_add_epi32(chosen_lanes(low), _mm256_set1_epi32(first));
  __m256i hi = _mm256_add_epi32(chosen_lanes(mask >> 8), _mm256_set1_epi32(first + 8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + __builtin_popcount(low)), hi);
}
static inline __m256 finite_or_zero(__m256 x) {
  __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
  return _mm256_and_ps(x, _mm256_cmp_ps(magnitude, _mm256_set1_ps(3.402823466e38f), _CMP_LE_OQ));
}
// Lanes of x, but -inf where z is.
static inline V16 masked_by(V16 x, V16 z) {
  __m256 none = _mm256_set1_ps(-__builtin_inff());
  return {_mm256_blendv_ps(x.a, z.a, _mm256_cmp_ps(z.a, none, _CMP_EQ_OQ)),
          _mm256_blendv_ps(x.b, z.b, _mm256_cmp_ps(z.b, none, _CMP_EQ_OQ))};
}
static inline V16 finite_or_zero(V16 x) { return {finite_or_zero(x.a), finite_or_zero(x.b)}; }

#else  // any machine: plain loops that the compiler vectorises for its baseline
struct V16 {
  float f[16];
};
constexpr int kRegisters = 16, kRegistersPerV16 = 4;
#define EACH_LANE(expression)                          \
  V16 r;                                               \
  for (int i = 0; i < 16; i++) r.f[i] = (expression);  \
  return r
static inline V16 set1(float x) { EACH_LANE(x); }
static inline V16 load(const float* p) { EACH_LANE(p[i]); }
static inline void store(float* p, V16 v) {
  for (int i = 0; i < 16; i++) p[i] = v.f[i];
}
static inline V16 operator+(V16 x, V16 y) { EACH_LANE(x.f[i] + y.f[i]); }
static inline V16 operator-(V16 x, V16 y) { EACH_LANE(x.f[i] - y.f[i]); }
static inline V16 operator*(V16 x, V16 y) { EACH_LANE(x.f[i] * y.f[i]); }
static inline V16 operator/(V16 x, V16 y) { EACH_LANE(x.f[i] / y.f[i]); }
static inline V16 fma(V16 x, V16 y, V16 z) { EACH_LANE(x.f[i] * y.f[i] + z.f[i]); }
// The second operand where either is NaN.
static inline V16 max(V16 x, V16 y) { EACH_LANE(x.f[i] > y.f[i] ? x.f[i] : y.f[i]); }
static inline V16 min(V16 x, V16 y) { EACH_LANE(x.f[i] < y.f[i] ? x.f[i] : y.f[i]); }
static inline V16 round_to_integer(V16 x) { EACH_LANE(__builtin_rintf(x.f[i])); }
static inline float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
static inline uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
static inline float widen(float16 h) {
  uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16, rest = static_cast<uint32_t>(h.bits & 0x7fff) << 13;
  uint32_t magnitude = rest >= 0x0f800000 ? rest | 0x7f800000 : to_bits(from_bits(rest) * 0x1p112f);
  return from_bits(sign | magnitude);
}
static inline float16 narrow(float x) {  // to nearest even, by an addition that shifts the bits to drop out of the sum
  uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 0x38800000) {
    uint32_t shifted = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
    return {static_cast<uint16_t>(sign | shifted)};
  }
  uint32_t odd = (magnitude >> 13) & 1;
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13))};
}
static inline V16 load(const bfloat16* p) { EACH_LANE(from_bits(static_cast<uint32_t>(p[i].bits) << 16)); }
static inline V16 load(const float16* p) { EACH_LANE(widen(p[i])); }
static inline V16 load(const int8_t* p) { EACH_LANE(static_cast<float>(p[i])); }
static inline void store(bfloat16* p, V16 v) {
  for (int i = 0; i < 16; i++) {
    uint32_t bits = to_bits(v.f[i]), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    p[i].bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}
static inline void store(float16* p, V16 v) {
  for (int i = 0; i < 16; i++) p[i] = narrow(v.f[i]);
}
static inline float power_of_2(int n) { return from_bits(static_cast<uint32_t>(n + 127) << 23); }
// x * 2^n for integral n in [-252, 254], in two halves, so that each factor is a normal number.
static inline V16 scale_by_power_of_2(V16 x, V16 n) {
  V16 r;
  for (int i = 0; i < 16; i++) {
    int all = static_cast<int>(n.f[i]), half = all >> 1;
    r.f[i] = x.f[i] * power_of_2(half) * power_of_2(all - half);
  }
  return r;
}
// x * 2^n, where `n` is the lowest bits of t; neither x nor the result may be subnormal.
static inline V16 add_to_exponent(V16 x, V16 t) { EACH_LANE(from_bits(to_bits(x.f[i]) + (to_bits(t.f[i]) << 23))); }
// Lanes below n keep their value, the others become `fill`.
static inline V16 keep_below(V16 x, int n, V16 fill) { EACH_LANE(i < n ? x.f[i] : fill.f[i]); }
// Bit i: lane i of x is at most that of y (false where either is NaN).
static inline unsigned mask_le(V16 x, V16 y) {
  unsigned mask = 0;
  for (int i = 0; i < 16; i++) mask |= static_cast<unsigned>(x.f[i] <= y.f[i]) << i;
  return mask;
}
// The lanes of x whose bit is set, in their order.
static inline void store_chosen(float* p, V16 x, unsigned mask) {
  for (; mask; mask &= mask - 1) *p++ = x.f[__builtin_ctz(mask)];
}
// first + i for each bit i that is set, in their order.
static inline void store_ids(int32_t* p, int32_t first, unsigned mask) {
  for (; mask; mask &= mask - 1) *p++ = first + __builtin_ctz(mask);
}
// Lanes of x, but -inf where z is.
static inline V16 masked_by(V16 x, V16 z) { EACH_LANE(z.f[i] == -__builtin_inff() ? z.f[i] : x.f[i]); }
// Lane by lane x > y ? a : b.
static inline V16 where_greater(V16 x, V16 y, V16 a, V16 b) { EACH_LANE(x.f[i] > y.f[i] ? a.f[i] : b.f[i]); }
static inline V16 finite_or_zero(V16 x) { EACH_LANE(ensemble_decode::finite_or_zero(x.f[i])); }
#undef EACH_LANE
#endif

static inline V16 zero() { return set1(0.0f); }

// Fewer than sixteen elements; the lanes beyond are zero.
template <typename T>
static inline V16 load_n(const T* p, int64_t n) {
  if (n >= 16) return load(p);
  T lanes[16];
  __builtin_memset(lanes, 0, sizeof(lanes));
  __builtin_memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}
template <typename T>
static inline void store_n(T* p, V16 v, int64_t n) {
  if (n >= 16) return store(p, v);
  T lanes[16];
  store(lanes, v);
  __builtin_memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

// Reductions go by one tree on every level: lane i with i + 8, then i + 4, i + 2, i + 1.
#if SIMD_LEVEL == 0
static inline float sum(V16 v) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; i++) v.f[i] += v.f[i + width];
  return v.f[0];
}
static inline float largest(V16 v) {
  for (int i = 1; i < 16; i++) v.f[0] = v.f[0] > v.f[i] ? v.f[0] : v.f[i];
  return v.f[0];
}
#else
static inline __m256 low_half(V16 v) {
#if SIMD_LEVEL == 4
  return _mm512_castps512_ps256(v.a);
#else
  return v.a;
#endif
}
static inline __m256 high_half(V16 v) {
#if SIMD_LEVEL == 4
  return _mm512_extractf32x8_ps(v.a, 1);
#else
  return v.b;
#endif
}
static inline float sum(V16 v) {
  __m256 eight = _mm256_add_ps(low_half(v), high_half(v));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline float largest(V16 v) {
  __m256 eight = _mm256_max_ps(low_half(v), high_half(v));
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#endif

// e^x to 2 ulp: e^x = 2^n e^r, |r| <= ln(2) / 2, with the polynomial of Cephes' expf. Underflows to 0 below -104,
// overflows to infinity, NaN stays NaN.
static inline V16 exp(V16 x) {
  V16 bounded = min(set1(89.0f), max(set1(-104.0f), x));  // operands in this order let a NaN through
  V16 n = round_to_integer(bounded * set1(1.44269504088896341f));
  V16 r = fma(n, set1(-0.693359375f), bounded);
  r = fma(n, set1(2.12194440e-4f), r);
  V16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return scale_by_power_of_2(fma(p, r * r, r) + set1(1.0f), n);
}

// 2^x for x <= 0 to 2e-7, by a polynomial of degree 5 that was fitted for the smallest relative error and is 1 at 0;
// below 2^-126 it is about 2^-126, which is nothing in a sum of weights whose largest is 1. Half as many instructions
// as exp: adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits, whence it is added to the exponent.
static inline V16 power_of_2_at_most_1(V16 x) {
  V16 bounded = max(x, set1(-126.0f));
  V16 shifted = bounded + set1(0x1.8p23f), f = bounded - (shifted - set1(0x1.8p23f));
  V16 p = set1(1.326472731307149e-3f);
  p = fma(p, f, set1(9.671512991189957e-3f));
  p = fma(p, f, set1(5.550733581185341e-2f));
  p = fma(p, f, set1(2.402224242687225e-1f));
  p = fma(p, f, set1(6.931470036506653e-1f));
  return add_to_exponent(fma(p, f, set1(1.0f)), shifted);
}

// How the products of linears and attention scores go. A step takes kPer consecutive k of sixteen columns, in kParts
// multiply-adds: `weights(p, part)` and `broadcast(x, part)` are their operands, `Input` is how x is stored. The next
// sixteen columns lie kVector elements further on.
template <typename T>
struct Step;

template <>
struct Step<float> {
  static constexpr int kPer = 1, kParts = 1, kVector = 16;
  using Input = float;
  static inline V16 weights(const float* p, int) { return load(p); }
  static inline V16 broadcast(const Input* x, int) { return set1(*x); }
  static inline V16 multiply_add(V16 w, V16 x, V16 acc) { return fma(w, x, acc); }
};

template <>
struct Step<float16> {
  static constexpr int kPer = 1, kParts = 1, kVector = 16;
  using Input = float;
  static inline V16 weights(const float16* p, int) { return load(p); }
  static inline V16 broadcast(const Input* x, int) { return set1(*x); }
  static inline V16 multiply_add(V16 w, V16 x, V16 acc) { return fma(w, x, acc); }
};

template <>
struct Step<bfloat16> {
#if SIMD_LEVEL == 4
  static constexpr int kPer = 2, kParts = 1, kVector = 32;
  using Input = bfloat16;
  static inline __m512bh weights(const bfloat16* p, int) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(reinterpret_cast<const void*>(p)));
  }
  static inline __m512bh broadcast(const Input* x, int) {
    int pair;
    __builtin_memcpy(&pair, x, 4);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }
  static inline V16 multiply_add(__m512bh w, __m512bh x, V16 acc) { return {_mm512_dpbf16_ps(acc.a, w, x)}; }
#else
  static constexpr int kPer = 2, kParts = 2, kVector = 32;
  using Input = float;
  // The even k, then the odd ones.
  static inline V16 weights(const bfloat16* p, int part) {
#if SIMD_LEVEL == 3
    // Each part loads for itself, and shifts where it could mask: a register more, and accumulators would go to memory.
    if (part == 1) asm volatile("" : "+r"(p));
    const __m256i* q = reinterpret_cast<const __m256i*>(p);
    __m256i lo = _mm256_loadu_si256(q), hi = _mm256_loadu_si256(q + 1);
    if (part == 1) lo = _mm256_srli_epi32(lo, 16), hi = _mm256_srli_epi32(hi, 16);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
#else
    V16 w;
    for (int i = 0; i < 16; i++) w.f[i] = from_bits(static_cast<uint32_t>(p[2 * i + part].bits) << 16);
    return w;
#endif
  }
  static inline V16 broadcast(const Input* x, int part) { return set1(x[part]); }
  static inline V16 multiply_add(V16 w, V16 x, V16 acc) { return fma(w, x, acc); }
#endif
};

// Weights of one byte beside inputs of T: two rows of 32 columns are a step. They are widened in registers, exactly.
template <typename T>
struct Int8 {
  int8_t value;
};

template <typename T>
struct Step<Int8<T>> {
  static constexpr int kPer = 2, kParts = 2, kVector = 16;
  using Input = typename Step<T>::Input;
  static inline V16 weights(const Int8<T>* p, int part) { return load(&p[part * kGroupColumns].value); }
  static inline V16 broadcast(const Input* x, int part) { return set1(x[part]); }
  static inline V16 multiply_add(V16 w, V16 x, V16 acc) { return fma(w, x, acc); }
};

#if SIMD_LEVEL == 4
template <>
struct Step<Int8<bfloat16>> : Step<bfloat16> {
  static constexpr int kVector = 16;
  static inline __m512bh weights(const Int8<bfloat16>* p, int) {
    // Small integers: their last sixteen bits as floats are zero.
    __m512i even = _mm512_castps_si512(load(&p->value).a), odd = _mm512_castps_si512(load(&p[kGroupColumns].value).a);
    return reinterpret_cast<__m512bh>(_mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
  }
};
#endif

template <typename T>
using Input = typename Step<T>::Input;

// out[r][16 c + lane] = sum over steps, in their order, of w[c][step][lane] * x[r][step], from zero. On the way it asks
// for what lies at ahead[c], ahead[c] + ahead_stride, ...: a prefetch for each load, of what comes next, into the first
// cache or (Near = 2) the second.
template <typename T, int Rows, int Columns, int Near = 3>
static inline void dot_tile(const T* const* w, int64_t step_stride, const T* const* ahead, int64_t ahead_stride,
                            const Input<T>* x, int64_t x_stride, int64_t steps, float* out, int64_t out_stride) {
  using S = Step<T>;
  V16 acc[Rows][Columns];
  for (int r = 0; r < Rows; r++)
    for (int c = 0; c < Columns; c++) acc[r][c] = zero();
  const T* weights[Columns];
  const T* hints[Columns];
  for (int c = 0; c < Columns; c++) {
    weights[c] = w[c];
    hints[c] = ahead[c];
  }
  // A pointer for each third row: x86 addresses the two that follow by base + stride and base + 2 * stride.
  const Input<T>* bases[(Rows + 2) / 3];
  for (int i = 0; i < (Rows + 2) / 3; i++) bases[i] = x + 3 * i * x_stride;
#pragma GCC unroll 2
  for (int64_t s = 0; s < steps; s++) {
#pragma GCC unroll 8
    for (int c = 0; c < Columns; c++) {
      __builtin_prefetch(hints[c], 0, Near);
      hints[c] += ahead_stride;
    }
#pragma GCC unroll 2
    for (int part = 0; part < S::kParts; part++) {
#if SIMD_LEVEL == 3
      // Sixteen registers: one column's weights at a time beside the accumulators, and the inputs read again for the next.
#pragma GCC unroll 8
      for (int c = 0; c < Columns; c++) {
        auto lanes = S::weights(weights[c], part);
        if (Rows > 1 && c > 0) asm volatile("" : "+r"(bases[0]));
#pragma GCC unroll 16
        for (int r = 0; r < Rows; r++)
          acc[r][c] = S::multiply_add(lanes, S::broadcast(bases[r / 3] + (r % 3) * x_stride, part), acc[r][c]);
      }
#else
      decltype(S::weights(w[0], 0)) lanes[Columns];
#pragma GCC unroll 8
      for (int c = 0; c < Columns; c++) lanes[c] = S::weights(weights[c], part);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; r++) {
        auto b = S::broadcast(bases[r / 3] + (r % 3) * x_stride, part);
#pragma GCC unroll 8
        for (int c = 0; c < Columns; c++) acc[r][c] = S::multiply_add(lanes[c], b, acc[r][c]);
      }
#endif
    }
#pragma GCC unroll 8
    for (int c = 0; c < Columns; c++) weights[c] += step_stride;
#pragma GCC unroll 8
    for (int i = 0; i < (Rows + 2) / 3; i++) bases[i] += S::kPer;
  }
  for (int r = 0; r < Rows; r++)
    for (int c = 0; c < Columns; c++) store(out + r * out_stride + 16 * c, acc[r][c]);
}
