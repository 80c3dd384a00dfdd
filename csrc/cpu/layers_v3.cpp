// The layer operators for AVX2 and FMA (x86-64-v3).
#if defined(__x86_64__)
#include <immintrin.h>

#include "../score.h"
#include "layers.h"
#include "schedule.h"
#include "threads.h"

// After the headers: what they define is compiled for every machine.
#pragma GCC target("arch=x86-64-v3")
#define SIMD_LEVEL 3
#define VARIANT v3
#define VARIANT_TABLE kernels_v3
#define VARIANT_NAME "v3"
#include "layers.inc.h"
#endif
