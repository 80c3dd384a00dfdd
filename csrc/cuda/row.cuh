// One visit of a row's logits: 16-byte loads whatever the row's alignment, scores, and running sums of exponentials.
#pragma once

#include <cstdint>

#include "../cpu/layers.h"
#include "../score.h"
#include "team.cuh"

namespace ensemble_decode {
namespace cuda {

constexpr int kMostPairs = 64;
constexpr float kLargest = 3.402823466e38f;
#define ED_NONE (-__builtin_inff())

__device__ inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
__device__ inline uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bfloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float widen(float16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  return as_float(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : as_bits(as_float(rest) * 0x1p112f)));
#endif
}

// Tokens in 16 bytes.
template <typename T>
constexpr int kPerLoad = 16 / static_cast<int>(sizeof(T));

__device__ inline void unpack(uint4 v, float (&x)[4], float) {
  x[0] = as_float(v.x), x[1] = as_float(v.y), x[2] = as_float(v.z), x[3] = as_float(v.w);
}
template <typename T>
__device__ inline void unpack(uint4 v, float (&x)[8], T) {
  uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = widen(T{static_cast<uint16_t>(words[i])});
    x[2 * i + 1] = widen(T{static_cast<uint16_t>(words[i] >> 16)});
  }
}

// The 16 bytes that begin `bytes` (even, below 16) into `low`, `high`.
__device__ inline uint4 shifted(uint4 low, uint4 high, unsigned bytes) {
  if (bytes & 8) low = {low.z, low.w, high.x, high.y}, high = {high.z, high.w, 0, 0};
  if (bytes & 4) low = {low.y, low.z, low.w, high.x}, high.x = high.y;
  unsigned bits = 8 * (bytes & 3);
  return {__funnelshift_r(low.x, low.y, bits), __funnelshift_r(low.y, low.z, bits),
          __funnelshift_r(low.z, low.w, bits), __funnelshift_r(low.w, high.x, bits)};
}

__device__ inline uint32_t bits_of(float x) { return as_bits(x); }
__device__ inline uint32_t bits_of(bfloat16 x) { return x.bits; }
__device__ inline uint32_t bits_of(float16 x) { return x.bits; }

// -inf.
__device__ inline uint32_t mask_of(float) { return 0xff800000u; }
__device__ inline uint32_t mask_of(bfloat16) { return 0xff80u; }
__device__ inline uint32_t mask_of(float16) { return 0xfc00u; }

// Tokens at … at + kPerLoad - 1 of a row, `at` a multiple of kPerLoad; those past the vocabulary have the bits `past_end`. A row that does not begin
// on 16 bytes (an odd vocabulary, say) is read by the two aligned loads that hold the tokens: the second is what a
// neighbour reads first, so it comes from the first-level cache. Nothing outside the row is ever read.
template <typename T>
__device__ inline uint4 load_tokens(const T* row, int at, int vocab, uint32_t past_end) {
  constexpr int n = kPerLoad<T>;
  unsigned past = static_cast<unsigned>(reinterpret_cast<uintptr_t>(row) & 15);
  int shift = static_cast<int>(past / sizeof(T));
  if (past == 0 && at + n <= vocab) return __ldg(reinterpret_cast<const uint4*>(row + at));
  if (past != 0 && at >= shift && at - shift + 2 * n <= vocab) {
    const uint4* both = reinterpret_cast<const uint4*>(row + (at - shift));
    return shifted(__ldg(both), __ldg(both + 1), past);
  }
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < n; i++)
    words[i * 4 / n] |= (at + i < vocab ? bits_of(row[at + i]) : past_end) << (8 * sizeof(T) * i % 32);
  return {words[0], words[1], words[2], words[3]};
}

// 2^x, and 0 where that is below 2^-126: exp2f spends three instructions on such results, and no weight so small counts.
__device__ inline float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return exp2f(x);
#endif
}

// e^d for d <= 0. The arithmetic that follows is explicit: every thread must come to the same bits.
__device__ inline float weight_of(float d) { return power_of_two(__fmul_rn(d, 1.44269504088896341f)); }

// The largest x, and the sum of exp(x - max). A NaN or +inf among the x makes the sum NaN, for good.
struct Softmax {
  float max, sum;
};
__device__ inline Softmax empty_softmax() { return {ED_NONE, 0.0f}; }

// sum, taken from its maximum to a larger one.
__device__ inline float rescaled(Softmax x, float max) {
  return x.max > ED_NONE ? __fmul_rn(x.sum, weight_of(__fsub_rn(x.max, max))) : x.sum;
}

__device__ inline Softmax merged(Softmax a, Softmax b) {
  float max = fmaxf(a.max, b.max);
  return {max, __fadd_rn(rescaled(a, max), rescaled(b, max))};
}

template <int N>
__device__ inline void add(Softmax& total, const float (&x)[N]) {
  float max = total.max;
#pragma unroll
  for (int i = 0; i < N; i++) max = fmaxf(max, x[i]);
  float sum = rescaled(total, max), origin = max > ED_NONE ? max : 0.0f;
#pragma unroll
  for (int i = 0; i < N; i++) sum = __fadd_rn(sum, weight_of(__fsub_rn(x[i], origin)));
  total = {max, sum};
}

// What a visit leaves: of scores s, and of t = z / T.
struct Sums {
  Softmax score, target;
};
__device__ inline Sums empty_sums() { return {empty_softmax(), empty_softmax()}; }
__device__ inline Sums merged(Sums a, Sums b) { return {merged(a.score, b.score), merged(a.target, b.target)}; }

template <typename T>
struct Pair {
  const T* expert;
  const T* anti;
  float alpha;  // 0: off, and nothing is read
};

// A row's logits and parameters. The pairs lie in shared memory.
template <typename T>
struct Row {
  const T* target;
  const Pair<T>* pairs;
  int num_pairs, vocab;
  float temperature;
  bool with_target;  // t differs from s, and somebody asks for it

  // All threads of the block call it; ends with a barrier.
  __device__ Row(const SampleArgs& args, int64_t row, Pair<T>* memory)
      : target(static_cast<const T*>(args.target) + row * args.target_stride),
        pairs(memory),
        num_pairs(static_cast<int>(args.pairs)),
        vocab(static_cast<int>(args.vocab)),
        temperature(effective_temperature(args.temperature[row])) {
    int p = static_cast<int>(threadIdx.x);
    bool on = false;
    if (p < num_pairs) {
      const T* expert = static_cast<const T*>(args.expert) + p * args.expert_pair_stride + row * args.expert_stride;
      const T* anti = nullptr;
      if (args.anti) anti = static_cast<const T*>(args.anti) + p * args.anti_pair_stride + row * args.anti_stride;
      float alpha = args.alpha[row * args.alpha_stride + p];
      on = alpha != 0.0f;
      memory[p] = {expert, anti, alpha};
    }
    with_target = __syncthreads_or(on) != 0 && !args.target_is_combined;
  }
};

template <int N>
__device__ inline void store(float* to, const float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) *reinterpret_cast<float4*>(to + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
}

// Scores of tokens [begin, end), begin and the storage whole loads, to `score`, and t to `target` where it is not null.
// Past the vocabulary both are -inf. Returns this thread's part of the sums.
template <typename T>
__device__ inline Sums visit(const Row<T>& row, int begin, int end, float* score, float* target) {
  constexpr int n = kPerLoad<T>;
  Sums sums = empty_sums();
  for (int at = begin + static_cast<int>(threadIdx.x) * n; at < end; at += kThreads * n) {
    uint4 z = load_tokens(row.target, at, row.vocab, mask_of(T{}));
    float s[n];
    unpack(z, s, T{});
    for (int p = 0; p < row.num_pairs; p++) {
      Pair<T> pair = row.pairs[p];
      if (pair.alpha == 0.0f) continue;
      float d[n];
      uint4 plus = load_tokens(pair.expert, at, row.vocab, 0);
      if (pair.anti) {
        float minus[n];
        uint4 packed = load_tokens(pair.anti, at, row.vocab, 0);
        unpack(plus, d, T{});
        unpack(packed, minus, T{});
#pragma unroll
        for (int i = 0; i < n; i++) d[i] = __fsub_rn(d[i], minus[i]);
      } else {
        unpack(plus, d, T{});
      }
#pragma unroll
      for (int i = 0; i < n; i++) s[i] = corrected(s[i], pair.alpha, d[i]);
    }
    float t[n];
    unpack(z, t, T{});
#pragma unroll
    for (int i = 0; i < n; i++) s[i] = scored(s[i], t[i], row.temperature);
    add(sums.score, s);
    store(score + (at - begin), s);
    if (!row.with_target) continue;
#pragma unroll
    for (int i = 0; i < n; i++) t[i] = scored(t[i], t[i], row.temperature);
    add(sums.target, t);
    if (target) store(target + (at - begin), t);
  }
  return sums;
}

}  // namespace cuda
}  // namespace ensemble_decode
