// The uniform numbers behind the noise of the sampling contract, u = (word + 0.5) * 2^-32, of many tokens at once.

#if SIMD_LEVEL >= 3
#if SIMD_LEVEL == 4
using Words = __m512i;  // one word of sixteen quads of tokens
constexpr int kQuads = 16;
// Element 4 L + k is quad 4 k + L: after the transposition in 128-bit lanes below, register k is quads 4 k to 4 k + 3.
static inline Words quads_to_transpose() {
  return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}
static inline Words words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
static inline Words load_words(const int32_t* p) { return _mm512_loadu_si512(p); }
static inline Words plus(Words x, Words y) { return _mm512_add_epi32(x, y); }
static inline Words exclusive_or(Words x, Words y) { return _mm512_xor_si512(x, y); }
static inline Words quarter(Words x) { return _mm512_srli_epi32(x, 2); }
// Both halves of the products of 32 bits.
static inline void multiply_wide(Words x, uint32_t factor, Words& high, Words& low) {
  Words f = _mm512_set1_epi64(factor);
  Words even = _mm512_mul_epu32(x, f), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), f);
  high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
  low = _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
}
// a where the bit of ids is 0, b where it is 1.
static inline Words by_bit(Words ids, uint32_t bit, Words a, Words b) {
  return _mm512_mask_mov_epi32(a, _mm512_test_epi32_mask(ids, words(bit)), b);
}
static inline void store_uniform(float* u, Words x) {
  V16 f = {_mm512_cvtepu32_ps(x)};
  store(u, (f + set1(0.5f)) * set1(0x1p-32f));
}
#define UNPACK(half, width) _mm512_unpack##half##_epi##width
#else
using Words = __m256i;  // one word of eight quads of tokens
constexpr int kQuads = 8;
// Element 4 L + k is quad 2 k + L: after the transposition in 128-bit lanes below, register k is quads 2 k and 2 k + 1.
static inline Words quads_to_transpose() { return _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7); }
static inline Words words(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
static inline Words load_words(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
static inline Words plus(Words x, Words y) { return _mm256_add_epi32(x, y); }
static inline Words exclusive_or(Words x, Words y) { return _mm256_xor_si256(x, y); }
static inline Words quarter(Words x) { return _mm256_srli_epi32(x, 2); }
// Both halves of the products of 32 bits.
static inline void multiply_wide(Words x, uint32_t factor, Words& high, Words& low) {
  Words f = _mm256_set1_epi64x(factor);
  Words even = _mm256_mul_epu32(x, f), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), f);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
// a where the bit of ids is 0, b where it is 1.
static inline Words by_bit(Words ids, uint32_t bit, Words a, Words b) {
  Words chosen = _mm256_cmpeq_epi32(_mm256_and_si256(ids, words(bit)), words(bit));
  return _mm256_blendv_epi8(a, b, chosen);
}
static inline void store_uniform(float* u, Words x) {
  // Unsigned to float by exact halves: only their sum is rounded.
  __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(x, 16));
  __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(x, words(0xffff)));
  __m256 f = _mm256_fmadd_ps(high, _mm256_set1_ps(65536.0f), low);
  _mm256_storeu_ps(u, _mm256_mul_ps(_mm256_add_ps(f, _mm256_set1_ps(0.5f)), _mm256_set1_ps(0x1p-32f)));
}
#define UNPACK(half, width) _mm256_unpack##half##_epi##width
#endif

// The four words of each quad, w[0] being the quads at the beginning: noise_words of philox.h.
static inline void noise_words_of(Words* w, NoiseKey key) {
  w[1] = words(key.position);
  w[2] = w[3] = words(0);
  uint32_t k0 = key.k0, k1 = key.k1;
  for (int round = 0; round < 10; round++) {
    Words high0, low0, high1, low1;
    multiply_wide(w[0], 0xD2511F53u, high0, low0);
    multiply_wide(w[2], 0xCD9E8D57u, high1, low1);
    w[0] = exclusive_or(exclusive_or(high1, w[1]), words(k0));
    w[2] = exclusive_or(exclusive_or(high0, w[3]), words(k1));
    w[1] = low1;
    w[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// u of n tokens. Ids are read, and numbers written, up to the next multiple of sixteen.
static inline void noise_of(const int32_t* ids, int64_t n, NoiseKey key, float* u) {
  for (int64_t i = 0; i < n; i += kQuads) {
    Words id = load_words(ids + i), w[4] = {quarter(id)};
    noise_words_of(w, key);
    store_uniform(u + i, by_bit(id, 2, by_bit(id, 1, w[0], w[1]), by_bit(id, 1, w[2], w[3])));
  }
}

// u of `count` tokens from a multiple of 4 on; both are multiples of 64.
static inline void noise_of_block(int64_t first, int64_t count, NoiseKey key, float* u) {
  for (int64_t i = 0; i < count; i += 4 * kQuads) {
    Words w[4] = {plus(quads_to_transpose(), words(static_cast<uint32_t>((first + i) >> 2)))};
    noise_words_of(w, key);
    Words a = UNPACK(lo, 32)(w[0], w[1]), b = UNPACK(hi, 32)(w[0], w[1]);
    Words c = UNPACK(lo, 32)(w[2], w[3]), d = UNPACK(hi, 32)(w[2], w[3]);
    store_uniform(u + i, UNPACK(lo, 64)(a, c));
    store_uniform(u + i + kQuads, UNPACK(hi, 64)(a, c));
    store_uniform(u + i + 2 * kQuads, UNPACK(lo, 64)(b, d));
    store_uniform(u + i + 3 * kQuads, UNPACK(hi, 64)(b, d));
  }
}
#undef UNPACK

#else
static inline void noise_of(const int32_t* ids, int64_t n, NoiseKey key, float* u) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t id = static_cast<uint32_t>(ids[i]);
    PhiloxWords w = noise_words(id >> 2, key);
    uint32_t even = id & 2 ? w.word[2] : w.word[0], odd = id & 2 ? w.word[3] : w.word[1];
    u[i] = uniform(id & 1 ? odd : even);
  }
}
static inline void noise_of_block(int64_t first, int64_t count, NoiseKey key, float* u) {
  for (int64_t i = 0; i < count; i += 4) {
    PhiloxWords w = noise_words(static_cast<uint32_t>((first + i) >> 2), key);
    for (int j = 0; j < 4; j++) u[i + j] = uniform(w.word[j]);
  }
}
#endif
