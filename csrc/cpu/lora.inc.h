// Low-rank adapters: y += b (a x), with an adapter of its own, or none, for every row. Both products stay in float32.

// Four products with one row, in the fixed order of 16 lanes and then sum(). The rows of a are short and come from
// memory: the next four are asked for on the way.
template <typename T, typename X>
static inline void dot4(const T* a, int64_t a_stride, const X* x, int64_t width, float* out) {
  V16 acc[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) {
    V16 v = load(x + i);
    for (int j = 0; j < 4; j++) {
      __builtin_prefetch(a + (j + 4) * a_stride + i);
      acc[j] = fma(load(a + j * a_stride + i), v, acc[j]);
    }
  }
  if (i < width) {
    V16 v = load_n(x + i, width - i);
    for (int j = 0; j < 4; j++) acc[j] = fma(load_n(a + j * a_stride + i, width - i), v, acc[j]);
  }
  for (int j = 0; j < 4; j++) out[j] = sum(acc[j]);
}

template <typename T, typename X>
static inline float dot(const T* a, const X* x, int64_t width) {
  V16 acc = zero();
  for (int64_t i = 0; i < width; i += 16) acc = fma(load_n(a + i, width - i), load_n(x + i, width - i), acc);
  return sum(acc);
}

// low [segments * rank] = a x for one row.
template <typename T, typename X>
static inline void lora_down(const Lora& lora, int32_t adapter, const X* x, int64_t width, float* low) {
  int64_t total = lora.rank * lora.num_segments;
  const T* a = static_cast<const T*>(lora.a) + adapter * total * width;
  int64_t j = 0;
  for (; j + 4 <= total; j += 4) dot4(a + j * width, width, x, width, low + j);
  for (; j < total; j++) low[j] = dot(a + j * width, x, width);
}

// Sixteen columns of b low from `column` on, `count` of them real.
template <typename T>
static inline V16 lora_up(const Lora& lora, int32_t adapter, const float* low, int64_t column, int64_t count) {
  if (count > 16) count = 16;
  const T* b = static_cast<const T*>(lora.b) + adapter * lora.b_adapter_stride;
  int segment = 0;
  while (lora.segment_ends[segment] <= column) segment++;
  if (lora.b_lane_stride == 1 && column % 16 == 0 && lora.segment_ends[segment] >= column + count) {
    const float* t = low + segment * lora.rank;
    const T* group = b + column / 16 * lora.b_group_stride;
    V16 result = zero();
    for (int64_t j = 0; j < lora.rank; j++) {
      __builtin_prefetch(group + 2 * lora.b_group_stride + 16 * j);  // the same half of the next tile's 32 columns
      result = fma(load(group + 16 * j), set1(t[j]), result);
    }
    return result;
  }
  float sums[16] = {};
  for (int64_t i = 0; i < count; i++) {
    while (lora.segment_ends[segment] <= column + i) segment++;
    const float* t = low + segment * lora.rank;
    const T* from = b + (column + i) / 16 * lora.b_group_stride + (column + i) % 16 * lora.b_lane_stride;
    V16 lane = zero();  // the same chain as above, in one lane
    for (int64_t j = 0; j < lora.rank; j++) lane = fma(load_n(from + j * lora.b_rank_stride, 1), set1(t[j]), lane);
    float lanes[16];
    store(lanes, lane);
    sums[i] = lanes[0];
  }
  return load(sums);
}

template <typename T>
static void lora(const LoraArgs& args) {
  const Lora& lora = args.lora;
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  int64_t low_width = lora.rank * lora.num_segments, n = args.out_features;
  char* memory = static_cast<char*>(workspace(2 * sizeof(Counter) + static_cast<size_t>(args.rows * low_width) * 4));
  __builtin_memset(memory, 0, 2 * sizeof(Counter));
  Counter* counter = reinterpret_cast<Counter*>(memory);
  float* low = reinterpret_cast<float*>(memory + 2 * sizeof(Counter));
  constexpr int64_t kColumns = 256;  // of one work item
  int64_t column_blocks = (n + kColumns - 1) / kColumns;
  parallel(threads_for(args.rows * (args.in_features + n) * lora.rank), [&](Team& team) {
    int64_t begin, end;
    while (take(counter[0], args.rows, team.size, begin, end))
      for (int64_t r = begin; r < end; r++)
        if (args.adapter[r] >= 0)
          lora_down<T>(lora, args.adapter[r], x + r * args.x_stride, args.in_features, low + r * low_width);
    team.barrier();
    while (take(counter[1], args.rows * column_blocks, team.size, begin, end)) {
      for (int64_t item = begin; item < end; item++) {
        int64_t r = item / column_blocks, first = item % column_blocks * kColumns;
        if (args.adapter[r] < 0) continue;
        int64_t last = first + kColumns < n ? first + kColumns : n;
        for (int64_t c = first; c < last; c += 16) {
          T* at = y + r * args.y_stride + c;
          V16 sum = load_n(at, last - c) + lora_up<T>(lora, args.adapter[r], low + r * low_width, c, last - c);
          store_n(at, sum, last - c);
        }
      }
    }
  });
}
