#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace ensemble_decode {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// About half a millisecond of spinning before a worker sleeps: longer than Python needs between two operators of a step and
// between two steps of a small batch (waking a sleeper cost 5 % of those), shorter than anyone minds when the engine goes idle.
constexpr int kSpins = 20000;
// A barrier that has spun this long is waiting for a thread that lost its core: give ours away.
constexpr int kSpinsBeforeYield = 2000;

// fork() copies the pool's memory but not its threads; a pool of an older generation is dead.
std::atomic<int> generation{0};

int available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
  int n = static_cast<int>(std::thread::hardware_concurrency());
  return n > 0 ? n : 1;
}

class Pool {
 public:
  explicit Pool(int size) : size_(size), generation_(generation.load()) {
    for (int i = 1; i < size; i++) workers_.emplace_back([this, i] { work(i); });
  }
  ~Pool() {
    if (generation_ != generation.load()) {  // in a forked child: the threads don't exist here
      for (auto& w : workers_) w.detach();
      return;
    }
    stop_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& w : workers_) w.join();
  }
  bool usable(int size) const { return size_ == size && generation_ == generation.load(); }

  void run(int threads, RegionFn fn, void* context) {
    fn_ = fn;
    context_ = context;
    team_ = threads;
    pending_.store(size_ - 1, std::memory_order_relaxed);
    arrived_.store(0, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    if (sleepers_.load() > 0) epoch_.notify_all();
    Team team{0, threads, this};
    fn(context, team);
    for (int spins = 0; pending_.load(std::memory_order_acquire) != 0;) {
      pause();
      if (++spins > kSpinsBeforeYield) sched_yield();
    }
  }

  void barrier(int size) {
    uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase;) {
      pause();
      if (++spins > kSpinsBeforeYield) sched_yield();
    }
  }

 private:
  void work(int index) {
    uint32_t seen = 0;
    for (;;) {
      int spins = 0;
      while (epoch_.load(std::memory_order_acquire) == seen) {
        pause();
        if (++spins > kSpins) {
          sleepers_.fetch_add(1);
          epoch_.wait(seen);
          sleepers_.fetch_sub(1);
        }
      }
      seen++;
      if (stop_.load()) return;
      if (index < team_) {
        Team team{index, team_, this};
        fn_(context_, team);
      }
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  const int size_;
  const int generation_;
  std::vector<std::thread> workers_;
  RegionFn fn_ = nullptr;
  void* context_ = nullptr;
  int team_ = 0;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<int> pending_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

thread_local int threads_of_caller = 0;
thread_local std::unique_ptr<Pool> pool;

}  // namespace

int num_threads() {
  if (threads_of_caller == 0) threads_of_caller = available_cores();
  return threads_of_caller;
}

void set_num_threads(int n) { threads_of_caller = n < 1 ? 1 : n; }

void Team::barrier() {
  if (size > 1) static_cast<Pool*>(state_)->barrier(size);
}

void run_region(int threads, RegionFn fn, void* context) {
  int n = num_threads();
  if (threads > n) threads = n;
  if (threads <= 1) {
    Team team{0, 1, nullptr};
    fn(context, team);
    return;
  }
  if (!pool || !pool->usable(n)) {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { generation.fetch_add(1); });
    (void)registered;
    pool.reset(new Pool(n));
  }
  pool->run(threads, fn, context);
}

}  // namespace ensemble_decode
