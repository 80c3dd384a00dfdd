// ensemble_sample and combine on a CPU. No framework: raw pointers, sizes, strides in elements.
#pragma once

#include <cstdint>

namespace ensemble_decode {

enum class DType;

// One token a row from softmax((z + sum of alpha (z+ - z-)) / T) inside the kept set. Parameters are one a row.
struct SampleArgs {
  DType dtype;
  const void* target;  // [rows, vocab]
  const void* expert;  // [pairs, rows, vocab], or null
  const void* anti;    // likewise; null: expert holds the differences
  int64_t rows, vocab, pairs;
  int64_t target_stride, expert_pair_stride, expert_stride, anti_pair_stride, anti_stride;
  const float* alpha;  // [rows, pairs]
  int64_t alpha_stride;
  const float *temperature, *top_p, *min_p;
  const int32_t* top_k;
  const int64_t *seed, *position;
  bool nucleus_target, target_is_combined;
  int64_t* token;
  float *logprob, *target_logprob;
  float* out;  // combine: [rows, vocab]
  int64_t out_stride;
};

}  // namespace ensemble_decode
