// Work sharing inside a parallel region: threads take chunks that shrink as the work runs out, so that a thread that
// loses its core for a while does not hold up the others.
#pragma once

#include <cstdint>

namespace ensemble_decode {

struct alignas(64) Counter {
  int64_t next;  // zero before the region starts
};

// The next chunk of `total` items for one of `threads` threads; false when none is left.
static inline bool take(Counter& counter, int64_t total, int threads, int64_t& begin, int64_t& end) {
  int64_t seen = __atomic_load_n(&counter.next, __ATOMIC_RELAXED);
  for (;;) {
    if (seen >= total) return false;
    int64_t chunk = threads == 1 ? total - seen : (total - seen) / (2 * threads);
    if (chunk < 1) chunk = 1;
    if (__atomic_compare_exchange_n(&counter.next, &seen, seen + chunk, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      begin = seen;
      end = seen + chunk;
      return true;
    }
  }
}

}  // namespace ensemble_decode
