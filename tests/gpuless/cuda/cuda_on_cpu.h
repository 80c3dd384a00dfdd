// Runs CUDA kernels, unmodified, as plain C++ on a CPU: g++ -include cuda_on_cpu.h, and launch() instead of <<<>>>.
//
// A block is an OS thread, a CUDA thread is a fiber of it; the blocks of a cluster run at the same time. What each finds:
//   always   threads that meet at different barriers or shuffles, a shuffle that reads a lane which isn't there, a
//            cluster's barrier that is waited for without arriving, deadlock, access to a block that has exited
//   ASan     any byte outside of a tensor, of dynamic shared memory, or of the shared memory of a block that has exited
//   UBSan    misaligned vector accesses, shifts and overflows
//   TSan     two threads that touch the same memory with no barrier between them, in one block or in two
// ON_CPU_SEED shuffles the order of threads. Shared and dynamic shared memory begin as 0xff bytes. Shuffles order no memory,
// as in CUDA's memory model; only barriers do.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define ON_CPU_RELEASE(p) __tsan_release(p)
#define ON_CPU_ACQUIRE(p) __tsan_acquire(p)
#else
#define ON_CPU_RELEASE(p) (void)(p)
#define ON_CPU_ACQUIRE(p) (void)(p)
#endif
// The machinery itself is not what is tested.
#define ON_CPU_PLAIN __attribute__((no_sanitize("thread"), noinline))

// ── the language ────────────────────────────────────────────────────────────────────────────────────────────────────
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // a block never leaves its OS thread
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;
using cudaError_t = int;  // for declarations only
using cudaStream_t = void*;

namespace on_cpu {

constexpr size_t kStack = 64 << 10;

enum class State { ready, at_block_barrier, at_warp, at_cluster_barrier, done };

extern "C" void on_cpu_switch(void** save, void* to);
asm(".text\n.weak on_cpu_switch\non_cpu_switch:\n"
    " pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    " movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
    " popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  void* tsan = nullptr;
  State state = State::ready;
  const void* where = nullptr;  // the barrier in the source
  unsigned mask = 0, tid = 0;
  int kind = 0;
  uint64_t value = 0;
  uint64_t cluster_phase = 0;
  unsigned warp_phase = 0;  // how often it was at __syncwarp
  bool arrived = false;  // at the cluster's barrier, and has not waited yet
  dim3 index;
};

struct Block;

struct Cluster {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Block*> blocks;  // null: not begun, or exited
  unsigned begun = 0, threads = 0, arrived = 0, exited = 0, asleep = 0;
  uint64_t phase = 0;
  char order[2];  // what TSan knows a phase by
};

struct Block {
  std::unique_ptr<Fiber[]> fibers;
  unsigned threads = 0, rank = 0;
  Cluster* cluster = nullptr;
  dim3 index, size, grid;
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  void* scheduler_fake_stack = nullptr;
  void* scheduler_tsan = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  uint64_t phase = 0;
  int vote = 0;
  char order[2];
  uint64_t lanes[32][32];
  char warp_order[32][2];
  char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  char* thread_pointer = nullptr;
};

inline thread_local Block* block = nullptr;
inline char kernel_end;

[[noreturn]] ON_CPU_PLAIN inline void die(const char* what) {
  unsigned at = block ? block->index.x : 0, tid = block && block->current ? block->current->tid : 0;
  fprintf(stderr, "cuda_on_cpu: %s (block %u, thread %u)\n", what, at, tid);
  abort();
}

// ── fibers ──────────────────────────────────────────────────────────────────────────────────────────────────────────
ON_CPU_PLAIN inline void to_scheduler() {
  Block* b = block;
  Fiber* f = b->current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(f->state == State::done ? nullptr : &f->fake_stack, b->stack_bottom, b->stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(b->scheduler_tsan, 1);
#endif
  on_cpu_switch(&f->stack_pointer, b->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f->fake_stack, nullptr, nullptr);
#endif
}

ON_CPU_PLAIN inline void to_fiber(Block& b, Fiber& f) {
  b.current = &f;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&b.scheduler_fake_stack, f.stack, kStack);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(f.tsan, 1);
#endif
  on_cpu_switch(&b.scheduler, f.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(b.scheduler_fake_stack, nullptr, nullptr);
#endif
  b.current = nullptr;
}

ON_CPU_PLAIN inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->stack_bottom, &block->stack_size);
#endif
  (*block->body)();
  if (block->current->arrived) die("a thread exits between arriving at the cluster's barrier and waiting for it");
  ON_CPU_RELEASE(&kernel_end);
  ON_CPU_RELEASE(block);
  block->current->state = State::done;
  to_scheduler();
  __builtin_unreachable();
}

// ── barriers and shuffles, as a thread sees them ────────────────────────────────────────────────────────────────────
ON_CPU_PLAIN inline int block_barrier(int predicate, const void* where) {
  Block* b = block;
  Fiber* f = b->current;
  f->state = State::at_block_barrier;
  f->where = where;
  f->value = predicate != 0;
  // In turn, or a thread that is late to go on would be ordered after what others do beyond the barrier.
  char* order = &b->order[b->phase & 1];
  ON_CPU_RELEASE(order);
  to_scheduler();
  ON_CPU_ACQUIRE(order);
  return b->vote;
}

ON_CPU_PLAIN inline uint64_t warp_exchange(unsigned mask, uint64_t value, int kind) {
  Fiber* f = block->current;
  if (!(mask >> (f->tid & 31) & 1)) die("a lane calls a *_sync function with a mask that does not name it");
  f->state = State::at_warp;
  f->mask = mask;
  f->kind = kind;
  f->value = value;
  to_scheduler();
  return 0;
}

// All lanes, and what they wrote is seen by the others: in turn, as at the block's barrier.
ON_CPU_PLAIN inline void warp_barrier() {
  Fiber* f = block->current;
  char* order = &block->warp_order[f->tid >> 5][f->warp_phase++ & 1];
  ON_CPU_RELEASE(order);
  warp_exchange(0xffffffffu, 0, 4);
  ON_CPU_ACQUIRE(order);
}

ON_CPU_PLAIN inline uint64_t lane_value(unsigned mask, unsigned lane) {
  unsigned warp = block->current->tid >> 5;
  if (!(mask >> lane & 1) || warp * 32 + lane >= block->threads) die("a shuffle reads a lane that is not in the mask");
  return block->lanes[warp][lane];
}

ON_CPU_PLAIN inline void cluster_arrive() {
  Fiber* f = block->current;
  Cluster* c = block->cluster;
  if (f->arrived) die("a thread arrives twice at the cluster's barrier without waiting");
  f->arrived = true;
  std::lock_guard<std::mutex> lock(c->mutex);
  f->cluster_phase = c->phase;
  ON_CPU_RELEASE(&c->order[c->phase & 1]);
  if (++c->arrived == c->threads) {
    c->arrived = 0;
    c->asleep = 0;
    c->phase++;
    c->changed.notify_all();
  }
}

ON_CPU_PLAIN inline void cluster_wait() {
  Fiber* f = block->current;
  if (!f->arrived) die("a thread waits for the cluster's barrier without arriving");
  f->state = State::at_cluster_barrier;
  to_scheduler();
  f->arrived = false;
  ON_CPU_ACQUIRE(&block->cluster->order[f->cluster_phase & 1]);
}

// Where another block of the cluster has what this block has at p: each block's variables lie in its OS thread's local
// storage, at the same distance from its thread pointer.
ON_CPU_PLAIN inline void* map_shared_rank(const void* p, unsigned rank) {
  Cluster* c = block->cluster;
  if (rank >= c->blocks.size()) die("a rank that the cluster does not have");
  Block* other;
  {
    std::lock_guard<std::mutex> lock(c->mutex);
    other = c->blocks[rank];
  }
  if (!other) die("shared memory of a block that has not begun, or has exited");
  const char* at = static_cast<const char*>(p);
  if (at >= block->dynamic && at < block->dynamic + block->dynamic_bytes) return other->dynamic + (at - block->dynamic);
  return other->thread_pointer + (at - block->thread_pointer);
}

// ── the scheduler of a block ────────────────────────────────────────────────────────────────────────────────────────
ON_CPU_PLAIN inline bool release_warps(Block& b) {
  bool released = false;
  for (unsigned i = 0; i < b.threads; i++) {
    Fiber& f = b.fibers[i];
    if (f.state != State::at_warp) continue;
    unsigned first = i / 32 * 32;
    bool all = true;
    for (unsigned lane = 0; lane < 32 && all; lane++) {
      if (!(f.mask >> lane & 1) || first + lane >= b.threads) continue;
      Fiber& g = b.fibers[first + lane];
      b.current = &f;
      if (g.state == State::done) die("a *_sync function waits for a lane that has exited");
      all = g.state == State::at_warp;
      if (all && (g.mask != f.mask || g.kind != f.kind))
        die("lanes of one warp meet in different *_sync functions, or with different masks");
      b.current = nullptr;
    }
    if (!all) continue;
    for (unsigned lane = 0; lane < 32 && first + lane < b.threads; lane++)
      if (f.mask >> lane & 1) b.lanes[first / 32][lane] = b.fibers[first + lane].value;
    unsigned mask = f.mask;
    for (unsigned lane = 0; lane < 32 && first + lane < b.threads; lane++)
      if (mask >> lane & 1) b.fibers[first + lane].state = State::ready;
    released = true;
  }
  return released;
}

ON_CPU_PLAIN inline bool release_block_barrier(Block& b, unsigned done) {
  const void* where = nullptr;
  int votes = 0;
  for (unsigned i = 0; i < b.threads; i++) {
    Fiber& f = b.fibers[i];
    if (f.state != State::at_block_barrier) continue;
    b.current = &f;
    if (where && f.where != where) die("threads wait at different __syncthreads");
    b.current = nullptr;
    where = f.where;
    votes += static_cast<int>(f.value);
  }
  if (done) die("some threads have exited while others wait at __syncthreads");
  b.vote = votes > 0;
  b.phase++;
  for (unsigned i = 0; i < b.threads; i++) b.fibers[i].state = State::ready;
  return true;
}

// Fibers whose phase of the cluster's barrier is over go on; with none of them able to, `patient` waits for it.
ON_CPU_PLAIN inline bool release_cluster_barrier(Block& b, bool patient) {
  Cluster* c = b.cluster;
  std::unique_lock<std::mutex> lock(c->mutex);
  auto over = [&] {
    for (unsigned i = 0; i < b.threads; i++)
      if (b.fibers[i].state == State::at_cluster_barrier && b.fibers[i].cluster_phase != c->phase) return true;
    return false;
  };
  if (patient && !over()) {
    // None of this block's threads can go on before the phase is over; with all blocks so, it never is.
    if (++c->asleep == c->blocks.size()) die("deadlock at the cluster's barrier");
    c->changed.wait(lock, [&] { return over() || c->exited > 0; });
    if (!over()) die("a block has exited while others wait at the cluster's barrier");
  }
  bool released = false;
  for (unsigned i = 0; i < b.threads; i++) {
    Fiber& f = b.fibers[i];
    if (f.state != State::at_cluster_barrier || f.cluster_phase == c->phase) continue;
    f.state = State::ready;
    released = true;
  }
  return released;
}

ON_CPU_PLAIN inline void run_fibers(Block& b, unsigned seed) {
  std::vector<unsigned> order(b.threads);
  for (unsigned i = 0; i < b.threads; i++) order[i] = i;
  std::mt19937 random(seed);
  for (;;) {
    bool ran = false;
    if (seed) std::shuffle(order.begin(), order.end(), random);
    for (unsigned i : order) {
      if (b.fibers[i].state != State::ready) continue;
      ran = true;
      to_fiber(b, b.fibers[i]);
    }
    unsigned count[5] = {};
    for (unsigned i = 0; i < b.threads; i++) count[static_cast<int>(b.fibers[i].state)]++;
    unsigned done = count[static_cast<int>(State::done)];
    if (done == b.threads) return;
    bool released = count[static_cast<int>(State::at_warp)] > 0 && release_warps(b);
    unsigned in_cluster = count[static_cast<int>(State::at_cluster_barrier)];
    unsigned in_block = count[static_cast<int>(State::at_block_barrier)];
    if (!released && in_block > 0 && in_block + done == b.threads) released = release_block_barrier(b, done);
    if (in_cluster > 0) released |= release_cluster_barrier(b, !released && !ran);
    if (!ran && !released) die("deadlock: some threads wait for what the others never reach");
  }
}

// What a block leaves behind: its dynamic shared memory is overwritten, which TSan holds against every access from another
// block that no barrier separates from it.
__attribute__((noinline)) inline void forget_shared_memory_of_exited_block(char* memory, size_t bytes) {
  memset(memory, 0xdd, bytes);
}

ON_CPU_PLAIN inline void run_block(Block& b, unsigned seed) {
  block = &b;
  b.thread_pointer = static_cast<char*>(__builtin_thread_pointer());
  b.threads = b.size.x * b.size.y * b.size.z;
  b.fibers.reset(new Fiber[b.threads]);
  char* stacks = static_cast<char*>(mmap(nullptr, kStack * b.threads, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) die("no memory for stacks");
#if defined(__SANITIZE_THREAD__)
  b.scheduler_tsan = __tsan_get_current_fiber();
#endif
  for (unsigned i = 0; i < b.threads; i++) {
    Fiber& f = b.fibers[i];
    f.tid = i;
    f.index = dim3(i % b.size.x, i / b.size.x % b.size.y, i / (b.size.x * b.size.y));
    f.stack = stacks + kStack * i;
#if defined(__SANITIZE_THREAD__)
    f.tsan = __tsan_create_fiber(0);
#endif
    void** top = reinterpret_cast<void**>(f.stack + kStack);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int j = 0; j < 6; j++) *--top = nullptr;
    f.stack_pointer = top;
  }
  Cluster* c = b.cluster;
  {  // hardware starts the blocks of a cluster together
    std::unique_lock<std::mutex> lock(c->mutex);
    c->blocks[b.rank] = &b;
    c->threads += b.threads;
    c->begun++;
    c->changed.notify_all();
    c->changed.wait(lock, [&] { return c->begun == c->blocks.size(); });
  }
  run_fibers(b, seed);
  {
    std::lock_guard<std::mutex> lock(c->mutex);
    c->blocks[b.rank] = nullptr;
    c->exited++;
    c->changed.notify_all();
  }
  ON_CPU_ACQUIRE(&b);
#if defined(__SANITIZE_THREAD__)
  for (unsigned i = 0; i < b.threads; i++) __tsan_destroy_fiber(b.fibers[i].tsan);
#endif
  munmap(stacks, kStack * b.threads);
  block = nullptr;
}

struct Free {
  void operator()(char* p) const { free(p); }
};
using AlignedMemory = std::unique_ptr<char, Free>;
inline AlignedMemory aligned_memory(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, bytes + 1)) die("no memory");
  memset(memory, 0xff, bytes);
  return AlignedMemory(static_cast<char*>(memory));
}

// Runs body() in every thread of every block. `cluster` blocks that follow one another in x are a cluster.
template <typename F>
void launch(dim3 grid, dim3 size, unsigned cluster, size_t dynamic_bytes, F kernel) {
  const char* text = getenv("ON_CPU_SEED");
  unsigned seed = text ? static_cast<unsigned>(atoi(text)) : 0;
  std::function<void()> body = kernel;
  unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned first = 0; first < blocks; first += cluster) {
    Cluster team;
    team.blocks.assign(cluster, nullptr);
    std::vector<std::thread> threads;
    std::vector<AlignedMemory> memory;
    for (unsigned rank = 0; rank < cluster; rank++) memory.push_back(aligned_memory(dynamic_bytes));
    for (unsigned rank = 0; rank < cluster; rank++)
      threads.emplace_back([&, rank] {
        unsigned i = first + rank;
        Block b;
        b.cluster = &team;
        b.rank = rank;
        b.index = dim3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y));
        b.size = size;
        b.grid = grid;
        b.body = &body;
        b.dynamic = memory[rank].get();
        b.dynamic_bytes = dynamic_bytes;
        run_block(b, seed ? seed * 7919 + i : 0);
        forget_shared_memory_of_exited_block(b.dynamic, dynamic_bytes);
#if defined(__SANITIZE_ADDRESS__)
        __asan_poison_memory_region(b.dynamic, dynamic_bytes);
#endif
      });
    for (std::thread& thread : threads) thread.join();
#if defined(__SANITIZE_ADDRESS__)
    for (auto& m : memory) __asan_unpoison_memory_region(m.get(), dynamic_bytes);
#endif
  }
  ON_CPU_ACQUIRE(&kernel_end);  // a kernel's end orders everything
}

template <typename T>
uint64_t as_word(T value) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(T));
  return word;
}
template <typename T>
T of_word(uint64_t word) {
  T value;
  memcpy(&value, &word, sizeof(T));
  return value;
}

}  // namespace on_cpu

// ── what kernels call ───────────────────────────────────────────────────────────────────────────────────────────────
#define threadIdx (on_cpu::block->current->index)
#define blockIdx (on_cpu::block->index)
#define blockDim (on_cpu::block->size)
#define gridDim (on_cpu::block->grid)
#define ED_DYNAMIC_SHARED(name) char* name = on_cpu::block->dynamic
#define ON_CPU_HERE                                           \
  ([]() __attribute__((noinline)) -> const void* {            \
    static const char here = 0;                               \
    return &here;                                             \
  }())
#define __syncthreads() ((void)on_cpu::block_barrier(0, ON_CPU_HERE))
#define __syncthreads_or(p) on_cpu::block_barrier((p) != 0, ON_CPU_HERE)
inline void __cluster_barrier_arrive() { on_cpu::cluster_arrive(); }
inline void __cluster_barrier_wait() { on_cpu::cluster_wait(); }
inline void* __cluster_map_shared_rank(const void* p, unsigned rank) { return on_cpu::map_shared_rank(p, rank); }
inline unsigned __clusterRelativeBlockRank() { return on_cpu::block->rank; }
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  on_cpu::warp_exchange(mask, on_cpu::as_word(value), 1);
  return on_cpu::of_word<T>(on_cpu::lane_value(mask, (threadIdx.x & 31) ^ static_cast<unsigned>(lanes)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
  on_cpu::warp_exchange(mask, on_cpu::as_word(value), 2);
  unsigned lane = threadIdx.x & 31;
  return lane < lanes ? value : on_cpu::of_word<T>(on_cpu::lane_value(mask, lane - lanes));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  on_cpu::warp_exchange(mask, value, 3);
  for (unsigned lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) value = std::max(value, static_cast<unsigned>(on_cpu::lane_value(mask, lane)));
  return value;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  on_cpu::warp_exchange(mask, value, 6);
  unsigned sum = 0;
  for (unsigned lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) sum += static_cast<unsigned>(on_cpu::lane_value(mask, lane));
  return sum;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  on_cpu::warp_exchange(mask, predicate != 0, 5);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) votes |= static_cast<unsigned>(on_cpu::lane_value(mask, lane)) << lane;
  return votes;
}
inline void __syncwarp() { on_cpu::warp_barrier(); }
inline unsigned atomicAdd(unsigned* p, unsigned value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }
// Not inlined: all of *p is read, also where only a part is used.
template <typename T>
__attribute__((noinline)) T __ldg(const T* p) {
  return *p;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned bits) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32) | low) >> (bits & 31));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __logf(float x) { return logf(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
