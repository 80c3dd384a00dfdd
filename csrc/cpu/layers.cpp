#include "layers.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "threads.h"

namespace ensemble_decode {

extern const Kernels kernels_base;
#if defined(__x86_64__)
extern const Kernels kernels_v3;
extern const Kernels kernels_v4;
#endif

namespace {

bool runs(const Kernels& candidate) {
#if defined(__x86_64__)
  if (&candidate == &kernels_v4) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512bf16");
  }
  if (&candidate == &kernels_v3) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("f16c");
  }
#endif
  return &candidate == &kernels_base;
}

const Kernels* const candidates[] = {
#if defined(__x86_64__)
    &kernels_v4,
    &kernels_v3,
#endif
    &kernels_base,
};

const Kernels* find(const char* name) {
  for (const Kernels* candidate : candidates)
    if ((name == nullptr || std::strcmp(name, candidate->name) == 0) && runs(*candidate)) return candidate;
  return nullptr;
}

const Kernels*& chosen() {
  static const Kernels* kernels = [] {
    const Kernels* named = find(std::getenv("ENSEMBLE_DECODE_CPU"));
    return named ? named : find(nullptr);
  }();
  return kernels;
}

struct Memory {
  void* data = nullptr;
  size_t size = 0;
  ~Memory() { std::free(data); }
};

// Weights are read from end to end at every step: with 2 MB pages the hardware prefetchers and the TLB keep up.
void ask_for_huge_pages(void* data, size_t size) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + size) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)size;
#endif
}

template <typename T>
void pack_groups(const T* weight, int64_t stride, int64_t n, int64_t k, int64_t steps, int64_t per_step, T* packed) {
  int64_t groups = (n + kGroupColumns - 1) / kGroupColumns;
  ask_for_huge_pages(packed, static_cast<size_t>(groups * kGroupColumns * steps * per_step) * sizeof(T));
  parallel(num_threads(), [&](Team& team) {
    Share share = share_of(groups, 1, team.index, team.size);
    for (int64_t g = share.begin; g < share.end; g++) {
      T* group = packed + g * steps * kGroupColumns * per_step;
      for (int64_t s = 0; s < steps; s++)
        for (int64_t c = 0; c < kGroupColumns; c++)
          for (int64_t i = 0; i < per_step; i++) {
            int64_t column = g * kGroupColumns + c, at = s * per_step + i;
            *group++ = column < n && at < k ? weight[column * stride + at] : T{};
          }
    }
  });
}

}  // namespace

const Kernels& kernels() { return *chosen(); }

bool use_kernels(const char* name) {
  const Kernels* named = find(name);
  if (named) chosen() = named;
  return named != nullptr;
}

void pack_weight(DType dtype, const void* weight, int64_t stride, int64_t n, int64_t k, void* packed) {
  int64_t per_step = elements_per_step(dtype), steps = (k + per_step - 1) / per_step;
  if (dtype == DType::float32)
    pack_groups(static_cast<const uint32_t*>(weight), stride, n, k, steps, per_step, static_cast<uint32_t*>(packed));
  else
    pack_groups(static_cast<const uint16_t*>(weight), stride, n, k, steps, per_step, static_cast<uint16_t*>(packed));
}

void pack_int8(const int8_t* weight, int64_t stride, int64_t n, int64_t k, int8_t* packed) {
  pack_groups(weight, stride, n, k, (k + 1) / 2 * 2, 1, packed);
}

void* workspace(size_t bytes) {
  thread_local Memory memory;
  if (memory.size < bytes) {
    std::free(memory.data);
    memory.size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    memory.data = std::aligned_alloc(4096, memory.size);
    if (memory.data == nullptr) {
      memory.size = 0;
      throw std::bad_alloc();
    }
  }
  return memory.data;
}

}  // namespace ensemble_decode
