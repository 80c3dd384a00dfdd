// Who works on a row: one block, or one cluster of blocks. Everything that crosses threads goes through here, in an
// order that only the shape of the team decides.
#pragma once

#include <cstdint>
#include <cstring>

namespace ensemble_decode {
namespace cuda {

// Of every block. The sums' last bits depend on it, the tokens don't.
#if !defined(ED_CUDA_THREADS)
#define ED_CUDA_THREADS 512
#endif
constexpr int kThreads = ED_CUDA_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int kCluster = 8;  // blocks
constexpr int kBins = 2048;  // of a histogram: 11 bits of a key
static_assert(kBins / kWarps >= 64, "each warp's share of the bins holds a queue of two quads a lane");
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kExchangeWords = 4;

// What the members of a team hold for one another, in shared memory. Results are written to one of two slots in turn:
// who writes a slot again has passed a barrier that all readers of its last content have reached.
struct TeamMemory {
  uint32_t warp[2][kWarps][kExchangeWords];
  uint32_t block[2][kExchangeWords];
  alignas(16) uint32_t bins[kBins];
  uint32_t warp_total[kWarps];
  uint32_t found_bin, found_before;
};

template <typename V>
__device__ inline void put(uint32_t* slot, const V& value) {
  static_assert(sizeof(V) % 4 == 0 && sizeof(V) <= 4 * kExchangeWords, "an exchanged value is a few 32-bit words");
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &value, sizeof(V));
#pragma unroll
  for (unsigned i = 0; i < sizeof(V) / 4; i++) slot[i] = words[i];
}

template <typename V>
__device__ inline V get(const uint32_t* slot) {
  uint32_t words[sizeof(V) / 4];
#pragma unroll
  for (unsigned i = 0; i < sizeof(V) / 4; i++) words[i] = slot[i];
  V value;
  memcpy(&value, words, sizeof(V));
  return value;
}

// The sum over `Lanes` neighbouring lanes, the same bits in each: whichever lane adds, it adds the same two numbers.
template <int Lanes>
__device__ inline float sum_of_lanes(float x) {
#pragma unroll
  for (int mask = Lanes / 2; mask > 0; mask >>= 1) x = __fadd_rn(x, __shfl_xor_sync(kAllLanes, x, mask));
  return x;
}

// One block is the team: the row is its slice.
class BlockTeam {
 public:
  __device__ BlockTeam(TeamMemory& memory) : memory_(memory), turn_(0) {}

  __device__ unsigned rank() const { return 0; }

  // All threads of the team reach this point, and see what the others wrote before it.
  __device__ void barrier() { __syncthreads(); }

  // The merge of every thread's value, the same bits in every thread: Merge::over<Lanes>(value) merges the values of a
  // warp's lanes, which repeat after the first `Lanes`, and gives every lane the same bits.
  template <typename V, typename Merge>
  __device__ V all(V value, Merge) {
    turn_ ^= 1;
    return this->template of_block<Merge>(value);
  }

  // x[i] of the row, where x is split over the team.
  template <typename V>
  __device__ V at(const V* x, int i) const {
    return x[i];
  }

  // Sums over the team of each block's four bins from 4 * i on.
  __device__ uint4 counts(int i) const { return reinterpret_cast<const uint4*>(memory_.bins)[i]; }

  // No thread may leave while another might read its memory.
  __device__ void leave() {}

 protected:
  template <typename Merge, typename V>
  __device__ V of_block(V value) {
    value = Merge::template over<32>(value);
    if (threadIdx.x % 32 == 0) put(memory_.warp[turn_][threadIdx.x / 32], value);
    __syncthreads();
    value = get<V>(memory_.warp[turn_][threadIdx.x % kWarps]);
    return Merge::template over<kWarps>(value);
  }

  TeamMemory& memory_;
  int turn_;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// A cluster is the team: block `rank` holds tokens [rank * slice, (rank + 1) * slice) in its shared memory.
class ClusterTeam : public BlockTeam {
 public:
  __device__ ClusterTeam(TeamMemory& memory, int slice)
      : BlockTeam(memory), slice_(slice), rank_(__clusterRelativeBlockRank()) {}

  __device__ unsigned rank() const { return rank_; }

  __device__ void barrier() {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
  }

  template <typename V, typename Merge>
  __device__ V all(V value, Merge) {
    turn_ ^= 1;
    value = of_block<Merge>(value);
    if (threadIdx.x == 0) put(memory_.block[turn_], value);
    barrier();
    value = get<V>(of_rank(memory_.block[turn_], threadIdx.x % kCluster));
    return Merge::template over<kCluster>(value);
  }

  template <typename V>
  __device__ V at(const V* x, int i) const {
    unsigned owner = static_cast<unsigned>(i / slice_);
    return of_rank(x, owner)[i - static_cast<int>(owner) * slice_];
  }

  __device__ uint4 counts(int i) const {
    uint4 total = {};
#pragma unroll 2
    for (unsigned r = 0; r < kCluster; r++) {
      uint4 own = reinterpret_cast<const uint4*>(of_rank(memory_.bins, r))[i];
      total = {total.x + own.x, total.y + own.y, total.z + own.z, total.w + own.w};
    }
    return total;
  }

  __device__ void leave() { barrier(); }

 private:
  template <typename V>
  __device__ const V* of_rank(const V* mine, unsigned rank) const {
    return static_cast<const V*>(__cluster_map_shared_rank(mine, rank));
  }

  int slice_;
  unsigned rank_;
};
#endif

}  // namespace cuda
}  // namespace ensemble_decode
