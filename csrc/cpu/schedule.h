// Work sharing inside a parallel region, so that a thread that loses its core for a while does not hold up the others: either
// threads take chunks that shrink as the work runs out, or each has a range of its own and helps with another's at the end.
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

// The next `count` (up to `most`) of `total` items where each thread has a consecutive range of its own, so that it reads one
// stream of memory: from the front of its range and, once that is empty, one from the back of another's (`helps`). A counter
// a thread: items taken from the front, and 2^32 for each one taken from the back.
static inline bool take_near(Counter* counters, int64_t total, int index, int threads, int64_t most, int64_t& item,
                             int64_t& count, bool& helps) {
  for (int i = 0; i < threads; i++) {
    int owner = (index + i) % threads;
    int64_t begin = total * owner / threads, end = total * (owner + 1) / threads;
    int64_t& taken = counters[owner].next;
    int64_t seen = __atomic_load_n(&taken, __ATOMIC_RELAXED);
    helps = i > 0;
    for (;;) {
      int64_t front = seen & 0xffffffff, back = seen >> 32, left = end - begin - front - back;
      if (left <= 0) break;
      count = helps || left < most ? 1 : most;
      if (__atomic_compare_exchange_n(&taken, &seen, seen + (helps ? int64_t{1} << 32 : count), false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
        item = helps ? end - 1 - back : begin + front;
        return true;
      }
    }
  }
  return false;
}

}  // namespace ensemble_decode
