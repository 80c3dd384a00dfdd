// A thread pool per calling thread, with a barrier inside one parallel region.
//
// Why not OpenMP: a decode step is a few hundred short phases, each 10-100 us. OpenMP's default
// spin makes two runtimes or a busy neighbour collapse (measured: 79 tok/s to 6), and every lane
// of an ensemble wants a team of its own. Here a team belongs to the thread that calls it, waits
// by spinning for a bounded time and then sleeps, and yields inside barriers when it is not
// making progress.
#pragma once

#include <cstdint>

namespace ensemble_decode {

// Threads that operators called from this thread may use (at least 1). Starts at the number of
// cores this process may run on.
int num_threads();
void set_num_threads(int n);

class Team {
 public:
  int index;  // 0 .. size - 1
  int size;
  // All members of the region reach this point before any goes on.
  void barrier();

  void* state_;  // the pool that runs the region
};

using RegionFn = void (*)(void* context, Team& team);
// Runs fn on `threads` threads (clamped to num_threads()), the caller being member 0. Returns
// when all are done. fn must not throw.
void run_region(int threads, RegionFn fn, void* context);

template <typename F>
void parallel(int threads, F&& fn) {
  run_region(
      threads, [](void* c, Team& t) { (*static_cast<F*>(c))(t); }, &fn);
}

// The [begin, end) share of member `index` of `size` of n items, in units of `grain`.
struct Share {
  int64_t begin, end;
};
inline Share share_of(int64_t n, int64_t grain, int index, int size) {
  int64_t units = (n + grain - 1) / grain;
  int64_t lo = units * index / size * grain, hi = units * (index + 1) / size * grain;
  return {lo < n ? lo : n, hi < n ? hi : n};
}

}  // namespace ensemble_decode
