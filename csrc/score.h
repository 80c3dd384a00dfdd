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

}  // namespace ensemble_decode
