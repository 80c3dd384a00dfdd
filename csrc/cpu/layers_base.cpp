// The layer operators in plain loops: any machine.
#include "../score.h"
#include "layers.h"
#include "schedule.h"
#include "threads.h"

#define SIMD_LEVEL 0
#define VARIANT base
#define VARIANT_TABLE kernels_base
#define VARIANT_NAME "base"
#include "layers.inc.h"
