// ensemble_sample on an NVIDIA GPU: one read of the logits, then Gumbel-max and a check (docs/kernels.md).
//
// sm_90 and later: one row per cluster of eight blocks, whose shared memory holds the row's scores; one launch. Elsewhere,
// and where a row is too long for that, the same in two launches with the scores in a workspace.
//
// Kernels: ensemble_sample_cluster<T>(SampleArgs, int slice) on a grid of 8 * rows blocks in clusters of 8, dynamic shared
// memory of `slice` floats, or twice that where nucleus_target is set and there are pairs;
// ensemble_sample_visit<T>(SampleArgs, int slice, Workspace) on (rows, slices) blocks, then
// ensemble_sample_finish<T>(SampleArgs, Workspace) on `rows` blocks. kThreads threads a block.
#pragma once

#include "ensemble_sample.h"
#include "row.cuh"
#include "team.cuh"

#if !defined(ED_DYNAMIC_SHARED)
#define ED_DYNAMIC_SHARED(name) extern __shared__ float4 name[]
#endif

namespace ensemble_decode {
namespace cuda {

constexpr int kVisitSlice = 4096;  // tokens of a block of the first of two launches
constexpr int kGrain = 8;          // slices are whole loads of every type

// Of the two launches. Rows are `padded` floats long.
struct Workspace {
  float* score;
  float* target;  // null where no filter looks at t
  Sums* sums;     // [rows, slices]
  int64_t padded;
  int slices;
};

// Larger is larger, as unsigned integers. -0 becomes 0 first: they are equal as scores.
__device__ inline uint32_t ordered(float x) {
  uint32_t bits = as_bits(__fadd_rn(x, 0.0f));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float from_ordered(uint32_t key) {
  return as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
__device__ inline float next_above(float x) { return from_ordered(ordered(x) + 1); }

// A token and its key in one number: the largest is the largest key, and of equal keys the lowest token. 0 is no token.
__device__ inline uint64_t candidate(float key, uint32_t token) {
  return static_cast<uint64_t>(ordered(key)) << 32 | (0xffffffffu - token);
}
__device__ inline uint32_t token_of(uint64_t candidate) { return 0xffffffffu - static_cast<uint32_t>(candidate); }

struct Larger {
  template <int>
  __device__ static uint64_t over(uint64_t x) {
    uint32_t key = static_cast<uint32_t>(x >> 32), largest = __reduce_max_sync(kAllLanes, key);
    uint32_t rest = __reduce_max_sync(kAllLanes, key == largest ? static_cast<uint32_t>(x) : 0);
    return static_cast<uint64_t>(largest) << 32 | rest;
  }
};

// Sums of exponentials are taken to the largest maximum first. Then they add up.
struct MergeSums {
  template <int Lanes>
  __device__ static Softmax over(Softmax x) {
    float max = from_ordered(__reduce_max_sync(kAllLanes, ordered(x.max)));
    return {max, sum_of_lanes<Lanes>(rescaled(x, max))};
  }
  template <int Lanes>
  __device__ static Sums over(Sums x) {
    return {over<Lanes>(x.score), over<Lanes>(x.target)};
  }
};

// Tokens from a bound on: what they weigh, and how many there are.
struct Tally {
  float mass;
  uint32_t count;
};
struct AddTallies {
  template <int Lanes>
  __device__ static Tally over(Tally x) {
    uint32_t own = threadIdx.x % 32 < Lanes ? x.count : 0;
    return {sum_of_lanes<Lanes>(x.mass), __reduce_add_sync(kAllLanes, own)};
  }
};

// What this block holds of a row: `count` scores, padded to whole quads by -inf, and what the filters look at.
struct Slice {
  const float *score, *filter;
  int first, count;
};

__device__ inline void load_quad(const float* x, int quad, float (&to)[4]) {
  float4 v = reinterpret_cast<const float4*>(x)[quad];
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// x[i] without an array in memory.
__device__ inline float one_of(const float (&x)[4], uint32_t i) {
  float low = i & 1 ? x[1] : x[0], high = i & 1 ? x[3] : x[2];
  return i & 2 ? high : low;
}

// Weight and number of the team's tokens with f >= least.
template <typename Team>
__device__ inline Tally tally(Team& team, const Slice& slice, float max, float least) {
  Tally own = {0.0f, 0};
#pragma unroll 1
  for (int quad = static_cast<int>(threadIdx.x); 4 * quad < slice.count; quad += kThreads) {
    float f[4];
    load_quad(slice.filter, quad, f);
    if (!(fmaxf(fmaxf(f[0], f[1]), fmaxf(f[2], f[3])) >= least)) continue;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      bool counts = f[i] >= least;
      own.mass = __fadd_rn(own.mass, counts ? weight_of(__fsub_rn(f[i], max)) : 0.0f);
      own.count += counts;
    }
  }
  return team.all(own, AddTallies());
}

// The k-th largest filter value of the team's row, counting equals; -inf where fewer than k tokens are left. By histograms
// of 11, 11 and 10 bits from the top: three sweeps of on-chip memory, whatever the row, and integers only.
template <typename Team>
__device__ inline float kth_largest(Team& team, TeamMemory& memory, const Slice& slice, uint32_t k) {
  uint32_t prefix = 0, known = 0;
#pragma unroll 1
  for (int pass = 0; pass < 3; pass++) {
    int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bits = pass == 2 ? 10 : 11;
    uint32_t mask = (1u << bits) - 1;
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) memory.bins[i] = 0;
    if (threadIdx.x == 0) memory.found_bin = kBins;
    __syncthreads();
#pragma unroll 1
    for (int quad = static_cast<int>(threadIdx.x); 4 * quad < slice.count; quad += kThreads) {
      float f[4];
      load_quad(slice.filter, quad, f);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        uint32_t key = ordered(f[i]);
        if (f[i] > ED_NONE && (key & known) == prefix) atomicAdd(&memory.bins[(key >> shift) & mask], 1u);
      }
    }
    team.barrier();
    // From the top bin down, thread t has kOwn quads of bins; before them lie those of the threads below t.
    constexpr int kOwn = kBins / 4 / kThreads;
    int last = kBins / 4 - 1 - static_cast<int>(threadIdx.x) * kOwn;
    uint32_t own = 0;
    for (int i = 0; i < kOwn; i++) {
      uint4 bins = team.counts(last - i);
      own += bins.x + bins.y + bins.z + bins.w;
    }
    uint32_t through = own;
    int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      uint32_t below = __shfl_up_sync(kAllLanes, through, step);
      if (lane >= step) through += below;
    }
    if (lane == 31) memory.warp_total[warp] = through;
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < warp; w++) through += memory.warp_total[w];
    uint32_t before = through - own;
    if (before < k && k <= through) {
      for (int i = 0; i < kOwn; i++) {
        uint4 bins = team.counts(last - i);
        uint32_t descending[4] = {bins.w, bins.z, bins.y, bins.x};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (before < k && k <= before + descending[j]) {
            memory.found_bin = static_cast<uint32_t>(4 * (last - i) + 3 - j);
            memory.found_before = before;
          }
          before += descending[j];
        }
      }
    }
    team.barrier();
    if (memory.found_bin == kBins) return ED_NONE;
    prefix |= memory.found_bin << shift;
    known |= mask << shift;
    k -= memory.found_before;
    __syncthreads();
  }
  return from_ordered(prefix);
}

// Which tokens are still candidates: least <= f and above < f.
struct Window {
  float least, above;
  __device__ bool holds(float f) const { return f >= least && f > above; }
};

// The best of this warp's candidates, as far as this lane has seen them. Few tokens are candidates where the row has filters,
// but of 128 neighbours nearly always one is: so quads that hold one wait in `queue` until there is one for each lane. Where
// every lane's own quad holds one, nothing waits. Lanes tell one another how good a key must be.
__device__ inline uint64_t best_of_thread(const Slice& slice, Window window, bool greedy, uint32_t* queue,
                                          const int64_t* seed, const int64_t* position) {
  NoiseKey noise = noise_key(*seed, *position);
  uint64_t best = 0;
  float to_beat = ED_NONE;
  int lane = static_cast<int>(threadIdx.x % 32), quads = (slice.count + 3) / 4, waiting = 0;
#pragma unroll 1
  for (int base = static_cast<int>(threadIdx.x) - lane; base < quads || waiting > 0; base += kThreads) {
    int quad = base + lane;
    bool mine = false;
    if (quad < quads) {
      float f[4];
      load_quad(slice.filter, quad, f);
      mine = window.holds(f[0]) || window.holds(f[1]) || window.holds(f[2]) || window.holds(f[3]);
    }
    uint32_t found = __ballot_sync(kAllLanes, mine);
    if (found != kAllLanes) {
      if (mine) queue[waiting + __popc(found & ((1u << lane) - 1))] = static_cast<uint32_t>(quad);
      waiting += __popc(found);
      if (waiting < 32 && base + kThreads < quads) continue;
      __syncwarp();
      int from = max(waiting - 32, 0);
      mine = from + lane < waiting;
      if (mine) quad = static_cast<int>(queue[from + lane]);
      waiting = from;
      __syncwarp();
    }
    float s[4] = {}, u[4] = {};
    unsigned promising = 0;
    uint32_t first = static_cast<uint32_t>(slice.first + 4 * quad);
    if (mine) {
      load_quad(slice.score, quad, s);
      load_quad(slice.filter, quad, u);
#pragma unroll
      for (unsigned i = 0; i < 4; i++) promising |= static_cast<unsigned>(window.holds(u[i])) << i;
      if (!greedy) {
        PhiloxWords words = noise_words(first >> 2, noise);
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
          // E >= u, so that s - log(u) bounds the key; 1e-3 is far more than the fast logarithm is off.
          u[i] = uniform(words.word[i]);
          if (__fadd_rn(s[i], __fsub_rn(1e-3f, __logf(u[i]))) < to_beat) promising &= ~(1u << i);
        }
      }
    }
#pragma unroll 1
    for (; promising; promising &= promising - 1) {
      uint32_t i = static_cast<uint32_t>(__ffs(static_cast<int>(promising)) - 1);
      float key = one_of(s, i);
      if (!greedy) {
        key = __fsub_rn(key, logf(-log1pf(-one_of(u, i))));
        if (!(key >= -kLargest)) key = -kLargest;  // u rounded to 1: a candidate all the same
      }
      uint64_t own = candidate(key, first + i);
      best = own > best ? own : best;
    }
    uint32_t best_key = __reduce_max_sync(kAllLanes, static_cast<uint32_t>(best >> 32));
    if (best_key) to_beat = from_ordered(best_key);
  }
  return best;
}

// The token of a row whose scores are known, or -1. Every thread of the team comes to the same answer, by the same
// numbers: all decisions are the team's.
template <typename Team>
__device__ inline int choose(Team& team, TeamMemory& memory, const SampleArgs& args, int64_t row, const Slice& slice,
                             Softmax total) {
  int vocab = static_cast<int>(args.vocab), k = args.top_k[row];
  float p = args.top_p[row], min_p = args.min_p[row];
  bool greedy = args.temperature[row] == 0.0f, use_k = k > 0 && k < vocab, use_p = p < 1.0f;
  Window window = {-kLargest, ED_NONE};
  uint32_t* queue = memory.bins + threadIdx.x / 32 * (kBins / kWarps);  // histograms are done with before it is used
  if (min_p > 0.0f) window.least = __fadd_rn(total.max, logf(min_p));
  float mass = total.sum;
  if (use_k && use_p) {
    // Top-p looks at what top-k left. With top-k alone, counting what lies above a candidate is enough.
    float kth = kth_largest(team, memory, slice, static_cast<uint32_t>(k));
    window.least = fmaxf(window.least, kth);
    mass = tally(team, slice, total.max, kth).mass;
    use_k = false;
  } else if (use_p) {
    // All tokens with e^(f - max) <= (1 - p) Z / V together weigh at most (1 - p) Z, so none of them is kept.
    float cut = __fdiv_rn(__fmul_rn(__fsub_rn(1.0f, p), mass), static_cast<float>(vocab));
    float bound = __fadd_rn(total.max, __fsub_rn(logf(__fmul_rn(cut, 0.9999f)), 1e-4f));
    window.least = fmaxf(window.least, fminf(bound, total.max));
  }
  for (;;) {
    uint64_t best = team.all(best_of_thread(slice, window, greedy, queue, args.seed + row, args.position + row), Larger());
    if (best == 0) return -1;
    int token = static_cast<int>(token_of(best));
    float own = team.at(slice.filter, token);
    if (!(use_p || use_k) || own == total.max) return token;
    Tally heavier = tally(team, slice, total.max, next_above(own));
    bool kept = (!use_p || heavier.mass < __fmul_rn(p, mass)) && (!use_k || heavier.count < static_cast<uint32_t>(k));
    if (kept) return token;
    window.above = own;  // what is kept lies above, and so does the best of it
  }
}

__device__ inline float log_softmax(float x, Softmax total) {
  return __fsub_rn(__fsub_rn(x, total.max), logf(total.sum));
}

// Everything after the visit. `filter_is_target`: slice.filter is t.
template <typename T, typename Team>
__device__ inline void finish(Team& team, TeamMemory& memory, const SampleArgs& args, int64_t row, const Slice& slice,
                              const Sums& sums, bool with_target, bool filter_is_target) {
  bool valid = sums.score.sum > 0.0f;  // not NaN, and not of a row that is all masked
  int token = -1;
  if (valid) token = choose(team, memory, args, row, slice, filter_is_target ? sums.target : sums.score);
  if (team.rank() == 0 && threadIdx.x == 0) {
    args.token[row] = token;
    float logprob = as_float(0x7fc00000u), target_logprob = logprob;
    if (token >= 0) {
      logprob = log_softmax(team.at(slice.score, token), sums.score);
      if (!args.target_is_combined) target_logprob = logprob;
      if (with_target) {
        float z = widen(static_cast<const T*>(args.target)[row * args.target_stride + token]);
        target_logprob = log_softmax(scored(z, z, effective_temperature(args.temperature[row])), sums.target);
      }
    }
    args.logprob[row] = logprob;
    args.target_logprob[row] = target_logprob;
  }
  team.leave();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) ensemble_sample_cluster(const SampleArgs args, int slice) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __shared__ TeamMemory memory;
  __shared__ Pair<T> pairs[kMostPairs];
  ED_DYNAMIC_SHARED(scores);
  int64_t number = blockIdx.x / kCluster;
  ClusterTeam team(memory, slice);
  Row<T> row(args, number, pairs);
  bool keep_target = args.nucleus_target && row.with_target;
  float* score = reinterpret_cast<float*>(scores);
  float* target = keep_target ? score + slice : nullptr;
  int first = static_cast<int>(team.rank()) * slice, end = min(first + slice, row.vocab);
  Sums sums = team.all(visit(row, first, end, score, target), MergeSums());
  Slice held = {score, keep_target ? target : score, first, max(end - first, 0)};
  finish<T>(team, memory, args, number, held, sums, row.with_target, keep_target);
#endif
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    ensemble_sample_visit(const SampleArgs args, int slice, const Workspace workspace) {
  __shared__ TeamMemory memory;
  __shared__ Pair<T> pairs[kMostPairs];
  int64_t number = blockIdx.x;
  BlockTeam team(memory);
  Row<T> row(args, number, pairs);
  int first = static_cast<int>(blockIdx.y) * slice, end = min(first + slice, row.vocab);
  int64_t at = number * workspace.padded + first;
  float* target = workspace.target && row.with_target ? workspace.target + at : nullptr;
  Sums sums = team.all(visit(row, first, end, workspace.score + at, target), MergeSums());
  if (threadIdx.x == 0) workspace.sums[number * workspace.slices + blockIdx.y] = sums;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    ensemble_sample_finish(const SampleArgs args, const Workspace workspace) {
  __shared__ TeamMemory memory;
  int64_t number = blockIdx.x;
  BlockTeam team(memory);
  Sums own = empty_sums();
  for (int i = static_cast<int>(threadIdx.x); i < workspace.slices; i += kThreads)
    own = merged(own, workspace.sums[number * workspace.slices + i]);
  Sums sums = team.all(own, MergeSums());
  bool on = false;
  int p = static_cast<int>(threadIdx.x);
  if (p < args.pairs) on = args.alpha[number * args.alpha_stride + p] != 0.0f;
  bool with_target = __syncthreads_or(on) != 0 && !args.target_is_combined;
  bool filter_is_target = workspace.target && with_target;
  const float* score = workspace.score + number * workspace.padded;
  Slice held = {score, filter_is_target ? workspace.target + number * workspace.padded : score, 0,
                static_cast<int>(args.vocab)};
  finish<T>(team, memory, args, number, held, sums, with_target, filter_is_target);
}

inline bool keeps_target(const SampleArgs& args) {
  return args.nucleus_target && args.pairs > 0 && !args.target_is_combined;
}

// The plan for a device: whether it launches clusters, and the shared memory that a block may ask for.
inline Plan planned(const SampleArgs& args, bool clusters, size_t shared_of_block) {
  auto rounded_up = [](int64_t n, int64_t grain) { return (n + grain - 1) / grain * grain; };
  int64_t arrays = keeps_target(args) ? 2 : 1;
  int64_t slice = rounded_up((args.vocab + kCluster - 1) / kCluster, kGrain);
  size_t bytes = static_cast<size_t>(slice * arrays) * sizeof(float);
  if (clusters && bytes + sizeof(TeamMemory) + kMostPairs * sizeof(Pair<float>) <= shared_of_block)
    return {true, static_cast<int>(slice), kCluster, bytes, 0};
  int64_t slices = (args.vocab + kVisitSlice - 1) / kVisitSlice;
  size_t workspace = static_cast<size_t>(args.rows * slices) * (kVisitSlice * arrays * sizeof(float) + sizeof(Sums));
  return {false, kVisitSlice, static_cast<int>(slices), 0, workspace};
}

inline Workspace workspace_at(const SampleArgs& args, const Plan& plan, void* memory) {
  Workspace workspace = {};
  workspace.padded = static_cast<int64_t>(plan.slice) * plan.slices;
  workspace.slices = plan.slices;
  int64_t floats = args.rows * workspace.padded;
  workspace.score = static_cast<float*>(memory);
  if (keeps_target(args)) workspace.target = workspace.score + floats;
  workspace.sums = reinterpret_cast<Sums*>(workspace.score + (keeps_target(args) ? 2 : 1) * floats);
  return workspace;
}

}  // namespace cuda
}  // namespace ensemble_decode
