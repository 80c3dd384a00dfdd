// Philox4x32-10 (Salmon et al., SC'11) and the Gumbel noise of the sampling contract. Shared by every back end.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ED_HOST_DEVICE __host__ __device__
#else
#define ED_HOST_DEVICE
#endif

namespace ensemble_decode {

struct PhiloxWords {
  uint32_t word[4];
};

// counter = (c0, c1, c2, c3), key = (k0, k1).
ED_HOST_DEVICE static inline PhiloxWords philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                                                       uint32_t k1) {
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; round++) {
    uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// What a row's noise depends on besides the token.
struct NoiseKey {
  uint32_t k0, k1, position;
};
ED_HOST_DEVICE static inline NoiseKey noise_key(int64_t seed, int64_t position) {
  uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), static_cast<uint32_t>(position)};
}

// The four words of tokens 4 * quad … 4 * quad + 3 (stream 0).
ED_HOST_DEVICE static inline PhiloxWords noise_words(uint32_t quad, NoiseKey key) {
  return philox4x32_10(quad, key.position, 0, 0, key.k0, key.k1);
}

// u in (0, 1), float32.
ED_HOST_DEVICE static inline float uniform(uint32_t word) { return (static_cast<float>(word) + 0.5f) * 0x1p-32f; }

}  // namespace ensemble_decode
