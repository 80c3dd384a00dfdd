// The score of the sampling contract, s = (z + sum of alpha (z+ - z-)) / T, is one expression in every back end, taken
// from left to right and compiled without contraction to an FMA. Here are its scalar parts.
#pragma once

#include "philox.h"

namespace ensemble_decode {

// A difference z+ - z- that is not finite counts as 0 (masks make -inf - -inf, and must not poison a row).
ED_HOST_DEVICE static inline float finite_or_zero(float x) { return x - x == 0.0f ? x : 0.0f; }

// Temperature 0 is greedy: scores are then taken at temperature 1.
ED_HOST_DEVICE static inline float effective_temperature(float temperature) {
  return temperature == 0.0f ? 1.0f : temperature;
}

// The score itself, for back ends that take one token at a time. Intrinsics keep a GPU's compiler from contracting a
// product and a sum, whatever flags it is called with; C++ is compiled with -ffp-contract=off.
#if defined(__CUDA_ARCH__)
#define ED_MULTIPLY(x, y) __fmul_rn(x, y)
#define ED_ADD(x, y) __fadd_rn(x, y)
#define ED_DIVIDE(x, y) __fdiv_rn(x, y)
#else
#define ED_MULTIPLY(x, y) ((x) * (y))
#define ED_ADD(x, y) ((x) + (y))
#define ED_DIVIDE(x, y) ((x) / (y))
#endif

// sum + alpha * difference, of one pair.
ED_HOST_DEVICE static inline float corrected(float sum, float alpha, float difference) {
  return ED_ADD(sum, ED_MULTIPLY(alpha, finite_or_zero(difference)));
}

// What z + sum of corrections becomes: a mask holds, whatever overflowed beside it; then the temperature.
ED_HOST_DEVICE static inline float scored(float sum, float z, float temperature) {
  if (z == -__builtin_inff()) sum = z;
  return temperature == 1.0f ? sum : ED_DIVIDE(sum, temperature);
}

}  // namespace ensemble_decode
