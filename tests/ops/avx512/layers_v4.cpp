// csrc/cpu/layers_v4.cpp, which this takes the place of, with its instructions computed by AVX2.
#include <immintrin.h>

#include <cstring>

#include "../score.h"
#include "layers.h"
#include "schedule.h"
#include "threads.h"

#pragma GCC target("arch=x86-64-v3")
#include "avx512_on_avx2.h"
#define SIMD_LEVEL 4
#define VARIANT v4
#define VARIANT_TABLE kernels_v4
#define VARIANT_NAME "v4"
#include "layers.inc.h"
