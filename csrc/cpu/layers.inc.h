// One variant of every layer operator. layers_*.cpp include this after setting their instruction set, SIMD_LEVEL and
// VARIANT (a namespace name). No inline function of the standard library may be called from here on: the linker
// could give other files the copy that was compiled for this instruction set.
namespace ensemble_decode {
namespace VARIANT {

// Fewer than some 30,000 multiplications are not worth waking a thread.
static inline int threads_for(int64_t multiplications) {
  int64_t useful = multiplications / 30000 + 1;
  int threads = num_threads();
  return useful < threads ? static_cast<int>(useful) : threads;
}

// Hands out consecutive pieces of a block of memory, each at a cache line; with a null base it only counts.
struct Carver {
  char* base;
  int64_t used;
  template <typename U>
  U* take(int64_t count) {
    U* piece = reinterpret_cast<U*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(U)) + 63) / 64 * 64;
    return piece;
  }
};

#include "simd.inc.h"
#include "linear.inc.h"
#include "lora.inc.h"
#include "rms_norm.inc.h"
#include "paged_attention.inc.h"
#include "decoder_layers.inc.h"
#include "noise.inc.h"
#include "ensemble_sample_visit.inc.h"
#include "ensemble_sample.inc.h"

// Each operator for the element type that its arguments name.
#define BY_DTYPE(op, Args)                                 \
  static void op##_by_dtype(const Args& args) {            \
    switch (args.dtype) {                                  \
      case DType::float32: return op<float>(args);         \
      case DType::bfloat16: return op<bfloat16>(args);     \
      case DType::float16: return op<float16>(args);       \
    }                                                      \
  }
BY_DTYPE(linear, LinearArgs)
BY_DTYPE(lora, LoraArgs)
BY_DTYPE(rms_norm, RmsNormArgs)
BY_DTYPE(paged_attention, AttentionArgs)
BY_DTYPE(decoder_layers, LayersArgs)
BY_DTYPE(ensemble_sample, SampleArgs)
BY_DTYPE(combine, SampleArgs)
#undef BY_DTYPE

}  // namespace VARIANT

extern const Kernels VARIANT_TABLE;
const Kernels VARIANT_TABLE = {
    VARIANT_NAME,
    VARIANT::linear_by_dtype,
    VARIANT::lora_by_dtype,
    VARIANT::rms_norm_by_dtype,
    VARIANT::paged_attention_by_dtype,
    VARIANT::decoder_layers_by_dtype,
    VARIANT::ensemble_sample_by_dtype,
    VARIANT::combine_by_dtype,
};

}  // namespace ensemble_decode
