// Low-rank adapters: y += b (a x), with an adapter of its own, or none, for every row.
//
// Consecutive rows with the same adapter go through its factors together, in the register tiles of linear layers; so
// members of an ensemble that lie one after another in the batch read each factor once. As there, an output is one
// chain of additions: over k for a x, over the rank for b (a x).

constexpr int kLoraColumns = 16;

template <typename T, int Rows>
static void lora_tile(const T* group, const Ahead<T>& ahead, const Input<T>* x, int64_t x_stride, int64_t steps,
                      float* sums) {
  dot_tile<T, Rows, 1>(&group, kLoraColumns * Step<T>::kPer, ahead.at, ahead.stride, x, x_stride, steps, sums,
                       kLoraColumns);
}

template <typename T>
static inline LinearTile<T> lora_tile_of(int rows) {
#if SIMD_LEVEL == 4
  static constexpr LinearTile<T> tiles[] = {
      lora_tile<T, 1>, lora_tile<T, 2>, lora_tile<T, 3>, lora_tile<T, 4>,  lora_tile<T, 5>,  lora_tile<T, 6>,
      lora_tile<T, 7>, lora_tile<T, 8>, lora_tile<T, 9>, lora_tile<T, 10>, lora_tile<T, 11>, lora_tile<T, 12>};
#elif SIMD_LEVEL == 3
  static constexpr LinearTile<T> tiles[] = {lora_tile<T, 1>, lora_tile<T, 2>, lora_tile<T, 3>,
                                            lora_tile<T, 4>, lora_tile<T, 5>, lora_tile<T, 6>};
#else
  static constexpr LinearTile<T> tiles[] = {lora_tile<T, 1>};
#endif
  return tiles[rows - 1];
}

// sums [rows][16] = a group of 16 columns times x; on the way the group that comes next is asked for.
template <typename T>
static inline void lora_group(const T* group, int64_t rows, const Input<T>* x, int64_t x_stride, int64_t steps,
                              float* sums) {
  int64_t step_elements = kLoraColumns * Step<T>::kPer;
  Ahead<T> ahead{{group + steps * step_elements, nullptr}, step_elements};
  lora_tile_of<T>(static_cast<int>(rows))(group, ahead, x, x_stride, steps, sums);
}

// The end of the run of rows from `row` on, below `last`, that share its adapter and fit a tile.
static inline int64_t adapter_run(const int32_t* adapter, int64_t row, int64_t last) {
  int64_t end = row + 1;
  while (end < last && end < row + kTileRows && adapter[end] == adapter[row]) end++;
  return end;
}

static inline int64_t lora_low_groups(const Lora& lora) {
  return (lora.num_segments * lora.rank + kLoraColumns - 1) / kLoraColumns;
}
// The stride of the rows of a x, for every segment.
template <typename T>
static inline int64_t lora_low_stride(const Lora& lora) {
  return input_stride<T>(lora_low_groups(lora) * kLoraColumns);
}

// low [row] = a x for the rows [first, last) of x that have an adapter.
template <typename T>
static inline void lora_down(const Lora& lora, const int32_t* adapter, int64_t first, int64_t last, const Input<T>* x,
                             int64_t x_stride, Input<T>* low, int64_t low_stride) {
  constexpr int kPer = Step<T>::kPer;
  int64_t steps = (lora.in_features + kPer - 1) / kPer, groups = lora_low_groups(lora);
  int64_t group_elements = steps * kLoraColumns * kPer;
  float sums[kTileRows * kLoraColumns];
  for (int64_t row = first, end; row < last; row = end) {
    end = adapter_run(adapter, row, last);
    if (adapter[row] < 0) continue;
    const T* a = static_cast<const T*>(lora.a) + adapter[row] * groups * group_elements;
    for (int64_t g = 0; g < groups; g++) {
      lora_group<T>(a + g * group_elements, end - row, x + row * x_stride, x_stride, steps, sums);
      for (int64_t r = row; r < end; r++)
        store(low + r * low_stride + g * kLoraColumns, load(sums + (r - row) * kLoraColumns));
    }
  }
}

// sums [rows from first to last][sums_stride] += sixteen columns of b low from `column` on, `count` of them real.
template <typename T>
static inline void lora_up(const Lora& lora, const int32_t* adapter, int64_t first, int64_t last, const Input<T>* low,
                           int64_t low_stride, int64_t column, int64_t count, float* sums, int64_t sums_stride) {
  constexpr int kPer = Step<T>::kPer;
  int64_t steps = lora.rank / kPer, group_elements = steps * kLoraColumns * kPer;
  int64_t groups = (lora.out_features + kLoraColumns - 1) / kLoraColumns;
  int64_t end_column = count < kLoraColumns ? column + count : column + kLoraColumns;
  float products[kTileRows * kLoraColumns];
  for (int64_t row = first, end; row < last; row = end) {
    end = adapter_run(adapter, row, last);
    if (adapter[row] < 0) continue;
    const T* b = static_cast<const T*>(lora.b) + adapter[row] * groups * group_elements;
    // As a rule one group and one segment; two where a segment's width is no multiple of sixteen.
    for (int64_t at = column, segment = 0; at < end_column;) {
      while (lora.segment_ends[segment] <= at) segment++;
      int64_t group = at / kLoraColumns, stop = (group + 1) * kLoraColumns;
      stop = stop < end_column ? stop : end_column;
      stop = stop < lora.segment_ends[segment] ? stop : lora.segment_ends[segment];
      lora_group<T>(b + group * group_elements, end - row, low + row * low_stride + segment * lora.rank, low_stride,
                    steps, products);
      for (int64_t r = row; r < end; r++) {
        float* to = sums + (r - first) * sums_stride + at - column;
        const float* from = products + (r - row) * kLoraColumns + at - group * kLoraColumns;
        if (stop - at == kLoraColumns)
          store(to, load(to) + load(from));
        else
          for (int64_t i = 0; i < stop - at; i++) to[i] += from[i];
      }
      at = stop;
    }
  }
}

template <typename T>
static void lora(const LoraArgs& args) {
  const Lora& lora = args.lora;
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  int64_t n = lora.out_features, k = lora.in_features, low_stride = lora_low_stride<T>(lora), x_stride = input_stride<T>(k);
  Counter* counter = nullptr;
  Input<T>*converted = nullptr, *low = nullptr;
  Carver carver{nullptr, 0};
  for (int pass = 0; pass < 2; pass++) {  // once for the size, once for good
    counter = carver.take<Counter>(2);
    converted = carver.take<Input<T>>(args.rows * x_stride);
    low = carver.take<Input<T>>(args.rows * low_stride);
    if (pass == 0) carver = {static_cast<char*>(workspace(static_cast<size_t>(carver.used))), 0};
  }
  __builtin_memset(counter, 0, 2 * sizeof(Counter));
  constexpr int64_t kColumns = 256;  // of one work item
  int64_t column_blocks = (n + kColumns - 1) / kColumns, row_tiles = (args.rows + kTileRows - 1) / kTileRows;
  parallel(threads_for(args.rows * (k + n) * lora.rank), [&](Team& team) {
    int64_t begin, end;
    while (take(counter[0], args.rows, team.size, begin, end)) {
      for (int64_t r = begin; r < end; r++) to_input(x + r * args.x_stride, k, converted + r * x_stride);
      lora_down<T>(lora, args.adapter, begin, end, converted, x_stride, low, low_stride);
    }
    team.barrier();
    float sums[kTileRows * kLoraColumns];
    while (take(counter[1], row_tiles * column_blocks, team.size, begin, end)) {
      for (int64_t item = begin; item < end; item++) {
        int64_t row = item / column_blocks * kTileRows, first = item % column_blocks * kColumns;
        int64_t last_row = row + kTileRows < args.rows ? row + kTileRows : args.rows;
        int64_t last = first + kColumns < n ? first + kColumns : n;
        for (int64_t c = first; c < last; c += kLoraColumns) {
          __builtin_memset(sums, 0, sizeof(sums));
          lora_up<T>(lora, args.adapter, row, last_row, low, low_stride, c, last - c, sums, kLoraColumns);
          for (int64_t r = row; r < last_row; r++) {
            if (args.adapter[r] < 0) continue;
            T* at = y + r * args.y_stride + c;
            store_n(at, load_n(at, last - c) + load(sums + (r - row) * kLoraColumns), last - c);
          }
        }
      }
    }
  });
}
