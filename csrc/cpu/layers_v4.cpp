// The layer operators for AVX-512 with BF16 (Zen 4, Cooper Lake, Sapphire Rapids and later).
#if defined(__x86_64__)
#include <immintrin.h>

#include "../score.h"
#include "layers.h"
#include "schedule.h"
#include "threads.h"

// After the headers: what they define is compiled for every machine.
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define SIMD_LEVEL 4
#define VARIANT v4
#define VARIANT_TABLE kernels_v4
#define VARIANT_NAME "v4"
#include "layers.inc.h"
#endif
