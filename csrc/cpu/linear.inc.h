// Linear layers on packed weights.
//
// Weights lie in groups of 32 columns, [group][step of k][32], so that a thread that owns a group reads one stream of
// consecutive cache lines. A tile of up to kTileRows rows x 32 columns lives in registers for the whole of k: one
// chain of additions per output, whatever the number of rows.

// The accumulators fill the registers, but for a step's weights and a broadcast. AVX-512: 12 rows x 32 columns, 24 of 32
// registers. AVX2: 6 rows x 16 columns, 12 of 16; up to three rows take all 32 columns, and so read their weights once.
constexpr int kTileRows = SIMD_LEVEL == 4 ? 12 : SIMD_LEVEL == 3 ? 6 : 1;
constexpr int kWideRows = SIMD_LEVEL == 3 ? 3 : kTileRows;
constexpr int kTileColumns = kGroupColumns;
// So few rows wait for memory, which two streams get more out of than one: their tiles take two groups at a time. With AVX2
// some accumulators of two and three rows go to memory for it: three rows of 16-bit weights, which take more instructions to
// widen, were slower so.
template <typename T>
constexpr int kPairRows = SIMD_LEVEL == 0 ? 1 : SIMD_LEVEL == 4 || sizeof(T) == sizeof(float) ? 3 : 2;
// Rows that go through one group of columns before the next: their inputs stay in the second-level cache.
constexpr int64_t kRowBlock = 96;
// How far ahead a stream of weights is asked for, and the largest group to be asked for as a whole.
constexpr int64_t kStreamBytes = 4096, kMaxGroupBytes = 256 * 1024;

struct Tile {
  int64_t row, column;  // of its first element
  int rows;
  float* sums;  // [rows][kTileColumns]
};

// What a tile asks for while it computes, `stride` elements further with each step: [0] with its first sixteen columns,
// [1] with the others.
template <typename T>
struct Ahead {
  const T* at[2];
  int64_t stride;
};

template <typename T, int Rows>
static void linear_tile(const T* group, const Ahead<T>& ahead, const Input<T>* x, int64_t x_stride, int64_t steps,
                        float* sums) {
  constexpr int kPer = Step<T>::kPer, kColumns = Rows <= kWideRows ? 2 : 1;
  const T* w[2] = {group, group + Step<T>::kVector};
  for (int c = 0; c < 2; c += kColumns)
    dot_tile<T, Rows, kColumns>(w + c, kTileColumns * kPer, ahead.at + c, ahead.stride, x, x_stride, steps,
                                sums + 16 * c, kTileColumns);
}

template <typename T>
using LinearTile = void (*)(const T*, const Ahead<T>&, const Input<T>*, int64_t, int64_t, float*);

template <typename T>
static inline LinearTile<T> linear_tile_of(int rows) {
#if SIMD_LEVEL == 4
  static constexpr LinearTile<T> tiles[] = {
      linear_tile<T, 1>, linear_tile<T, 2>, linear_tile<T, 3>, linear_tile<T, 4>,  linear_tile<T, 5>,  linear_tile<T, 6>,
      linear_tile<T, 7>, linear_tile<T, 8>, linear_tile<T, 9>, linear_tile<T, 10>, linear_tile<T, 11>, linear_tile<T, 12>};
#elif SIMD_LEVEL == 3
  static constexpr LinearTile<T> tiles[] = {linear_tile<T, 1>, linear_tile<T, 2>, linear_tile<T, 3>,
                                            linear_tile<T, 4>, linear_tile<T, 5>, linear_tile<T, 6>};
#else
  static constexpr LinearTile<T> tiles[] = {linear_tile<T, 1>};
#endif
  return tiles[rows - 1];
}

// The first row of tile t of a block: even shares, but that AVX2 takes eight rows as 3 and 5. Four rows of sixteen columns are
// eight chains of additions, just as many as its two multipliers keep under way, so that whatever waits is not made up for.
static inline int64_t first_row(int64_t block, int64_t tiles, int64_t t) {
  if (SIMD_LEVEL == 3 && block == 8 && t == 1) return 3;
  return block * t / tiles;
}

// The weights a little further on: for the first tile of a group that nobody has asked for.
template <typename T>
static inline Ahead<T> stream_ahead(const T* group) {
  const T* at = group + kStreamBytes / static_cast<int64_t>(sizeof(T));
  return {{at, at + 16 * Step<T>::kPer}, kTileColumns * Step<T>::kPer};
}

// Tile `tile` of the `tiles` that share a group asks for its part of the next group, so that the memory works while
// the later tiles compute on what is in the cache.
template <typename T>
static inline Ahead<T> next_group_ahead(const T* next, int64_t group_elements, int64_t tile, int64_t tiles) {
  const T *at = next + group_elements * tile / tiles, *middle = at + group_elements / (2 * tiles);
  return {{at, middle}, (16 * Step<T>::kPer + tiles - 1) / tiles};
}

// The tiles of two groups that lie one after the other, in step. `ahead` is asked for in their order.
template <typename T, int Rows>
static void linear_pair(const T* group, const T* ahead, int64_t group_elements, const Input<T>* x, int64_t x_stride,
                        int64_t steps, float* const* sums) {
  constexpr int64_t kVector = Step<T>::kVector;
  const T *w[4] = {group, group + kVector, group + group_elements, group + group_elements + kVector},
          *hints[4] = {ahead, ahead + kVector, ahead + group_elements, ahead + group_elements + kVector};
  alignas(64) float both[Rows * 4 * 16];
  dot_tile<T, Rows, 4>(w, kTileColumns * Step<T>::kPer, hints, kTileColumns * Step<T>::kPer, x, x_stride, steps, both, 4 * 16);
  for (int r = 0; r < Rows; r++)
    for (int c = 0; c < 4; c++) store(sums[c / 2] + r * kTileColumns + c % 2 * 16, load(both + (4 * r + c) * 16));
}

template <typename T>
static inline auto linear_pair_of(int64_t rows) {
  constexpr int kMost = kPairRows<T>;
  return rows == 1 ? linear_pair<T, 1> : rows == 2 ? linear_pair<T, kMost < 2 ? kMost : 2> : linear_pair<T, kMost>;
}

static inline void scale_columns(const Tile& tile, const float* scale) {
  for (int c = 0; c < kTileColumns; c += 16) {
    V16 factor = load(scale + c);
    for (int r = 0; r < tile.rows; r++) {
      float* sums = tile.sums + r * kTileColumns + c;
      store(sums, load(sums) * factor);
    }
  }
}

template <typename T>
static inline int64_t group_elements_of(int64_t in_features) {
  constexpr int kPer = Step<T>::kPer;
  return (in_features + kPer - 1) / kPer * kTileColumns * kPer;
}

static inline int64_t row_blocks_of(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }
static inline int64_t groups_of(int64_t out_features) { return (out_features + kTileColumns - 1) / kTileColumns; }

// The first weights that a thread will read in a linear: while it computes its last group of the linear before, it asks
// for them, so that the memory works through the barrier between.
template <typename T>
static inline const T* first_group(const Team& team, const T* packed, int64_t rows, int64_t in_features,
                                   int64_t out_features) {
  int64_t groups = groups_of(out_features), items = groups * row_blocks_of(rows);
  return packed + items * team.index / team.size % groups * group_elements_of<T>(in_features);
}

// Every tile of x [rows, steps] times the packed weights goes to finish(tile), on some thread of the team. No barrier.
// One counter a thread; `then` is what this thread will read next, or null.
template <typename T, typename Finish>
static inline void linear_phase(Team& team, Counter* counters, const Input<T>* x, int64_t x_stride, int64_t rows,
                                const T* packed, const float* scale, int64_t in_features, int64_t out_features,
                                const T* then, const Finish& finish) {
  int64_t group_elements = group_elements_of<T>(in_features), steps = group_elements / (kTileColumns * Step<T>::kPer);
  int64_t groups = groups_of(out_features), items = groups * row_blocks_of(rows);
  bool whole_groups = group_elements * static_cast<int64_t>(sizeof(T)) <= kMaxGroupBytes, helps;
  int64_t own_end = items * (team.index + 1) / team.size, item, count, asked = -1;
  constexpr int kMostRows = kTileRows > kPairRows<T> ? kTileRows : kPairRows<T>;
  alignas(64) float memory[2][kMostRows * kTileColumns];
  float* sums[2] = {memory[0], memory[1]};
  auto done = [&](Tile tile) {
    if (scale) scale_columns(tile, scale + tile.column);
    finish(tile);
  };
  while (take_near(counters, items, team.index, team.size, SIMD_LEVEL > 0 && rows <= kPairRows<T> ? 2 : 1, item, count, helps)) {
    int64_t index = item % groups, first = item / groups * kRowBlock;
    int64_t block = rows - first < kRowBlock ? rows - first : kRowBlock;
    const T *group = packed + index * group_elements, *next = index + count < groups ? group + count * group_elements : packed;
    bool last = helps || item + count == own_end;
    if (last) next = then;
    if (count == 2) {
      const T* ahead = last && then && whole_groups ? then : group + kStreamBytes / static_cast<int64_t>(sizeof(T));
      linear_pair_of<T>(rows)(group, ahead, group_elements, x, x_stride, steps, sums);
      for (int64_t i = 0; i < 2; i++) done({0, (index + i) * kTileColumns, static_cast<int>(rows), sums[i]});
    } else {
      int64_t tiles = (block + kTileRows - 1) / kTileRows;
      bool ask = whole_groups && next && (last || block > kWideRows);
      for (int64_t t = 0; t < tiles; t++) {
        int64_t lo = first + first_row(block, tiles, t), hi = first + first_row(block, tiles, t + 1);
        bool stream = !ask || (item != asked && t == 0 && tiles > 1);
        Ahead<T> ahead = stream ? stream_ahead(group) : next_group_ahead(next, group_elements, t, tiles);
        Tile tile{lo, index * kTileColumns, static_cast<int>(hi - lo), sums[0]};
        linear_tile_of<T>(tile.rows)(group, ahead, x + lo * x_stride, x_stride, steps, tile.sums);
        done(tile);
      }
      if (!last) asked = item + 1;
    }
    if (last) then = nullptr;
  }
}

// The stride of rows of Input<T> in scratch memory: a whole number of cache lines.
template <typename T>
static inline int64_t input_stride(int64_t width) {
  return (width + 31) / 32 * 32;
}

// A row as linear_phase wants it, zero up to the end of the last step.
template <typename T>
static inline void to_input(const T* row, int64_t width, Input<T>* input) {
  for (int64_t i = 0; i < width; i += 16) {
    V16 v = load_n(row + i, width - i);
    store(input + i, v);  // the stride leaves room for the last sixteen
  }
}

template <typename T, typename Weight>
static void linear_with(const LinearArgs& args) {
  const T* x = static_cast<const T*>(args.x);
  int64_t n = args.out_features, k = args.in_features, stride = input_stride<T>(k);
  bool direct = sizeof(Input<T>) == sizeof(T) && k % Step<Weight>::kPer == 0;
  int threads = threads_for(args.rows * n * k);
  size_t counters = static_cast<size_t>(1 + threads) * sizeof(Counter);
  char* memory = static_cast<char*>(
      workspace(counters + (direct ? 0 : static_cast<size_t>(args.rows * stride) * sizeof(Input<T>))));
  __builtin_memset(memory, 0, counters);
  Counter* counter = reinterpret_cast<Counter*>(memory);
  Input<T>* converted = reinterpret_cast<Input<T>*>(memory + counters);
  const Input<T>* input = direct ? reinterpret_cast<const Input<T>*>(x) : converted;
  int64_t input_row = direct ? args.x_stride : stride;
  const T* bias = static_cast<const T*>(args.bias);

  auto finish = [&](const Tile& tile) {
    int64_t width = n - tile.column < kTileColumns ? n - tile.column : kTileColumns;
    for (int r = 0; r < tile.rows; r++) {
      for (int64_t c = 0; c < width; c += 16) {
        V16 y = load(tile.sums + r * kTileColumns + c);
        if (bias) y = y + load_n(bias + tile.column + c, width - c);
        int64_t at = (tile.row + r) * n + tile.column + c;
        if (args.out_float32)
          store_n(static_cast<float*>(args.out) + at, y, width - c);
        else
          store_n(static_cast<T*>(args.out) + at, y, width - c);
      }
    }
  };
  parallel(threads, [&](Team& team) {
    if (!direct) {
      int64_t begin, end;
      while (take(counter[0], args.rows, team.size, begin, end))
        for (int64_t r = begin; r < end; r++) to_input(x + r * args.x_stride, k, converted + r * stride);
      team.barrier();
    }
    linear_phase<Weight>(team, counter + 1, input, input_row, args.rows, static_cast<const Weight*>(args.packed), args.scale, k,
                         n, nullptr, finish);
  });
}

template <typename T>
static void linear(const LinearArgs& args) {
  args.scale ? linear_with<T, Int8<T>>(args) : linear_with<T, T>(args);
}
