// Causal attention of new tokens over a paged KV cache.
//
// Keys are taken in splits of kSplit positions, at boundaries that depend on the position alone. Within a split a
// query's scores, their maximum, the exponentials, their sum and the weighted sum of the values are computed in one
// fixed order; splits are merged from left to right. So the bits of a token's output are the same whether it comes
// alone, in a chunk of a prefill, or in one prefill, and whichever threads compute the splits.
//
// A work item is (sequence, kv head, tile of new tokens): the query heads that share a kv head, and the tokens of a
// tile, are the rows that share each read of a key or value. Where there are too few items for the threads, as for a
// single long sequence, an item is one split of that, and a second pass merges.

constexpr int kSplit = 256;
constexpr int kSplitBlocks = kSplit / kBlockSize;
constexpr int kMaxRows = 48;  // rows of a tile
// Register tiles, as those of linear layers: rows x blocks of keys, rows x vectors of a value. As many of these as leave
// chains of additions enough to hide an addition's latency, and registers for what they are made of.
constexpr int kTileRowsOfHeads = SIMD_LEVEL >= 3 ? 6 : 1;
constexpr int wide(int rows) { return SIMD_LEVEL == 4 ? 4 : SIMD_LEVEL == 3 ? (rows == 1 ? 4 : rows <= 3 ? 2 : 1) : 2; }
constexpr int kFar = 2;  // prefetched into the second-level cache: a split's keys or values fill the first

// Vectors of sixteen elements in a cache line.
template <typename T>
constexpr int kLineVectors = 64 / (16 * static_cast<int>(sizeof(T)));

// out[r][16 v + lane] = sum over keys in their order of p[r][key] * value[key][16 v + lane]. On the way it asks for what
// lies at the same places of the next blocks.
template <typename T, int Rows, int Vectors, bool Whole>
static void value_tile(const T* const* blocks, const T* const* next, int64_t keys, int64_t head_dim, int64_t lanes,
                       const float* p, float* out, int64_t out_stride) {
  V16 acc[Rows][Vectors];
  for (int r = 0; r < Rows; r++)
    for (int v = 0; v < Vectors; v++) acc[r][v] = zero();
  for (int64_t first = 0; first < keys; first += kBlockSize) {
    const T* value = blocks[first / kBlockSize];
    int64_t ahead = next[first / kBlockSize] - value;
    int64_t last = keys - first < kBlockSize ? keys : first + kBlockSize;
    for (int64_t key = first; key < last; key++, value += head_dim) {
      V16 x[Vectors];
      for (int v = 0; v < Vectors; v += kLineVectors<T>) __builtin_prefetch(value + ahead + 16 * v, 0, kFar);
      for (int v = 0; v < Vectors; v++) x[v] = Whole ? load(value + 16 * v) : load_n(value + 16 * v, lanes);
      for (int r = 0; r < Rows; r++) {
        V16 weight = set1(p[r * kSplit + key]);
        for (int v = 0; v < Vectors; v++) acc[r][v] = fma(weight, x[v], acc[r][v]);
      }
    }
  }
  for (int r = 0; r < Rows; r++)
    for (int v = 0; v < Vectors; v++) store(out + r * out_stride + 16 * v, acc[r][v]);
}

template <typename T>
struct AttentionTiles {
  using Score = void (*)(const T* const*, int64_t, const T* const*, int64_t, const Input<T>*, int64_t, int64_t, float*, int64_t);
  using Value = void (*)(const T* const*, const T* const*, int64_t, int64_t, int64_t, const float*, float*, int64_t);
#if SIMD_LEVEL >= 3
#define ROWS(f, wide, ...) {f<T, 1, wide(1), __VA_ARGS__>, f<T, 2, wide(2), __VA_ARGS__>, f<T, 3, wide(3), __VA_ARGS__>, \
                            f<T, 4, wide(4), __VA_ARGS__>, f<T, 5, wide(5), __VA_ARGS__>, f<T, 6, wide(6), __VA_ARGS__>}
#else
#define ROWS(f, wide, ...) {f<T, 1, wide(1), __VA_ARGS__>}
#endif
  static constexpr int one(int) { return 1; }
  static constexpr Score score_many[] = ROWS(dot_tile, wide, kFar);
  static constexpr Score score_one[] = ROWS(dot_tile, one, kFar);
  static constexpr Value value_many[] = ROWS(value_tile, wide, true);
  static constexpr Value value_one[] = ROWS(value_tile, one, true);
  static constexpr Value value_rest[] = ROWS(value_tile, one, false);
#undef ROWS
};

// What a thread needs for one tile.
template <typename T>
struct AttentionScratch {
  Input<T>* queries;  // [kMaxRows][input_stride(head_dim)]
  float* scores;      // [kMaxRows][kSplit]
  float* sums;        // [kMaxRows][head_stride]
};

// The result of a row so far, or over one split: softmax weights relative to e^largest.
struct Partial {
  float largest, weight;
};

static inline int64_t head_stride(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// The blocks of keys that a thread reads next.
struct Following {
  const int32_t* table;
  int64_t blocks, kv_head;  // 0 blocks where nothing is known
};

// Rows of a tile against keys [first, first + kSplit): row r sees the first limits[r] of them (none if <= 0).
template <typename T>
static void attend_split(const Paging& paging, const int32_t* table, int64_t kv_head, int64_t first, int rows,
                         const int64_t* limits, const Following& following, const AttentionScratch<T>& scratch,
                         Partial* partials, float* sums) {
  using Tiles = AttentionTiles<T>;
  constexpr int kPer = Step<T>::kPer;
  int64_t head_dim = paging.head_dim, block_elements = head_dim * kBlockSize, stride = head_stride(head_dim);
  int64_t query_stride = input_stride<T>(head_dim);
  int64_t keys = 0;
  for (int r = 0; r < rows; r++) keys = limits[r] > keys ? limits[r] : keys;
  int64_t blocks = (keys + kBlockSize - 1) / kBlockSize;
  // A block is too short for the hardware's prefetchers. So while the keys are read the values are asked for, and with them
  // the keys that come next: memory is never idle while there is arithmetic to do, nor the other way round.
  const T *k[kSplitBlocks], *v[kSplitBlocks], *next[kSplitBlocks];
  auto of = [&](const int32_t* blocks_of, int64_t b, int64_t head) {
    return (static_cast<int64_t>(blocks_of[b]) * paging.num_kv_heads + head) * block_elements;
  };
  for (int64_t b = 0; b < blocks; b++) {
    int64_t at = of(table, first / kBlockSize + b, kv_head);
    k[b] = static_cast<const T*>(paging.k_cache) + at;
    v[b] = static_cast<const T*>(paging.v_cache) + at;
    next[b] = k[b];
    if (int64_t n = following.blocks; n > 0)
      next[b] = static_cast<const T*>(paging.k_cache) + of(following.table, b < n ? b : n - 1, following.kv_head);
  }

  int width = wide(rows < kTileRowsOfHeads ? rows : kTileRowsOfHeads);
  for (int64_t b = 0; b < blocks;) {
    bool many = width > 1 && b + width <= blocks;
    for (int r = 0; r < rows; r += kTileRowsOfHeads) {
      int n = rows - r < kTileRowsOfHeads ? rows - r : kTileRowsOfHeads;
      (many ? Tiles::score_many : Tiles::score_one)[n - 1](
          k + b, kBlockSize * kPer, v + b, kBlockSize * kPer, scratch.queries + r * query_stride, query_stride, head_dim / kPer,
          scratch.scores + r * kSplit + b * kBlockSize, kSplit);
    }
    b += many ? width : 1;
  }

  V16 scale = set1(paging.scale), lowest = set1(-__builtin_inff());
  for (int r = 0; r < rows; r++) {
    float* row = scratch.scores + r * kSplit;
    int64_t n = limits[r] < 0 ? 0 : limits[r];
    V16 top = lowest;
    for (int64_t i = 0; i < n; i += 16) {
      V16 s = keep_below(load(row + i) * scale, static_cast<int>(n - i), lowest);
      store(row + i, s);
      top = max(s, top);
    }
    float m = largest(top);
    V16 shift = set1(m), total = zero();
    for (int64_t i = 0; i < n; i += 16) {
      V16 p = keep_below(exp(load(row + i) - shift), static_cast<int>(n - i), zero());
      store(row + i, p);
      total = total + p;
    }
    for (int64_t i = (n + 15) / 16 * 16; i < keys; i += 16) store(row + i, zero());
    partials[r] = {m, sum(total)};
  }

  for (int r = 0; r < rows; r += kTileRowsOfHeads) {
    int n = rows - r < kTileRowsOfHeads ? rows - r : kTileRowsOfHeads;
    const float* p = scratch.scores + r * kSplit;
    for (int64_t d = 0; d < head_dim;) {
      const T *shifted[kSplitBlocks], *shifted_next[kSplitBlocks];
      for (int64_t b = 0; b < blocks; b++) {
        shifted[b] = v[b] + d;
        shifted_next[b] = next[b] + d;
      }
      bool many = d + 16 * wide(n) <= head_dim, whole = d + 16 <= head_dim;
      (many ? Tiles::value_many : whole ? Tiles::value_one : Tiles::value_rest)[n - 1](
          shifted, shifted_next, keys, head_dim, head_dim - d, p, sums + r * stride + d, stride);
      d += many ? 16 * wide(n) : 16;
    }
  }
}

// Folds the result over the next split into the result so far.
static inline void merge_split(Partial& total, float* sums, const Partial& next, const float* next_sums, int64_t stride) {
  float m = next.largest > total.largest ? next.largest : total.largest;
  V16 differences = zero();
  float lanes[16] = {total.largest - m, next.largest - m};
  differences = exp(load(lanes));
  store(lanes, differences);
  V16 keep = set1(lanes[0]), add = set1(lanes[1]);
  for (int64_t i = 0; i < stride; i += 16) store(sums + i, fma(load(next_sums + i), add, load(sums + i) * keep));
  total = {m, total.weight * lanes[0] + next.weight * lanes[1]};
}

// One tile of new tokens of one sequence, for the query heads of one kv head.
struct AttentionTile {
  int64_t sequence, kv_head, head, heads;   // query heads head .. head + heads - 1
  int64_t token, tokens;                    // new tokens, by their row in q
  int64_t position;                         // of the first of them
  int64_t splits() const { return (position + tokens - 1) / kSplit + 1; }
};

// How the new tokens of a call are cut into tiles; the same for every thread.
struct AttentionPlan {
  const Paging* paging;
  int64_t head_tiles, heads_per_tile, tokens_per_tile;
  int64_t* first_item;  // [sequences + 1] cumulative over kv heads, head tiles, token tiles (and splits)
  int64_t items;
  bool by_split;
  int64_t rows_per_item, stride;
  Partial* partials;  // by_split: [items][rows_per_item]
  float* sums;        // by_split: [items][rows_per_item][stride]

  int64_t token_tiles(int64_t s) const {
    return (paging->query_start[s + 1] - paging->query_start[s] + tokens_per_tile - 1) / tokens_per_tile;
  }
  int64_t max_splits(int64_t s) const { return (paging->context_len[s] + kSplit - 1) / kSplit; }

  // Item -> tile and split. Splits beyond the tile's own are empty.
  AttentionTile tile(int64_t item, int64_t& split) const {
    int64_t lo = 0, hi = paging->num_sequences;
    while (hi - lo > 1) {
      int64_t middle = (lo + hi) / 2;
      (first_item[middle] <= item ? lo : hi) = middle;
    }
    AttentionTile t;
    t.sequence = lo;
    int64_t rest = item - first_item[lo], tiles = token_tiles(lo), splits = by_split ? max_splits(lo) : 1;
    split = rest % splits;
    rest /= splits;
    int64_t first = rest % tiles * tokens_per_tile, start = paging->query_start[lo];
    int64_t count = paging->query_start[lo + 1] - start;
    rest /= tiles;
    int64_t group = paging->num_heads / paging->num_kv_heads, head_tile = rest % head_tiles;
    t.kv_head = rest / head_tiles;
    t.head = t.kv_head * group + head_tile * heads_per_tile;
    t.heads = group - head_tile * heads_per_tile < heads_per_tile ? group - head_tile * heads_per_tile : heads_per_tile;
    t.token = start + first;
    t.tokens = count - first < tokens_per_tile ? count - first : tokens_per_tile;
    t.position = paging->context_len[lo] - count + first;
    return t;
  }

  // The blocks of a split of a tile, and those that an item begins with.
  Following blocks(const AttentionTile& t, int64_t split) const {
    int64_t first = split * kSplitBlocks, all = (t.position + t.tokens - 1) / kBlockSize + 1 - first;
    const int32_t* table = paging->block_table + t.sequence * paging->table_stride + first;
    return {table, all < kSplitBlocks ? all : kSplitBlocks, t.kv_head};
  }
  Following blocks(int64_t item) const {
    int64_t split;
    AttentionTile t = tile(item, split);
    return blocks(t, split);
  }
};

static inline int64_t plan_items(AttentionPlan& plan, bool by_split) {
  const Paging& paging = *plan.paging;
  plan.by_split = by_split;
  plan.items = 0;
  for (int64_t s = 0; s < paging.num_sequences; s++) {
    plan.first_item[s] = plan.items;
    plan.items += paging.num_kv_heads * plan.head_tiles * plan.token_tiles(s) * (by_split ? plan.max_splits(s) : 1);
  }
  plan.first_item[paging.num_sequences] = plan.items;
  return plan.items;
}

// Cuts a call into tiles. first_item [sequences + 1] is the caller's. The caller then gives partials and sums, of
// items * rows_per_item (* stride) elements, if by_split.
static inline AttentionPlan plan_attention(const Paging& paging, int64_t* first_item, int threads) {
  AttentionPlan plan{};
  int64_t group = paging.num_heads / paging.num_kv_heads, most_tokens = 0, most_splits = 0;
  plan.paging = &paging;
  plan.first_item = first_item;
  plan.heads_per_tile = group < kMaxRows ? group : kMaxRows;
  plan.head_tiles = (group + plan.heads_per_tile - 1) / plan.heads_per_tile;
  for (int64_t s = 0; s < paging.num_sequences; s++) {
    int64_t tokens = paging.query_start[s + 1] - paging.query_start[s], splits = plan.max_splits(s);
    most_tokens = tokens > most_tokens ? tokens : most_tokens;
    most_splits = splits > most_splits ? splits : most_splits;
  }
  plan.tokens_per_tile = kMaxRows / plan.heads_per_tile;
  if (most_tokens < plan.tokens_per_tile) plan.tokens_per_tile = most_tokens > 0 ? most_tokens : 1;
  plan.rows_per_item = plan.heads_per_tile * plan.tokens_per_tile;
  plan.stride = head_stride(paging.head_dim);
  int64_t items = plan_items(plan, false);
  if (threads > 1 && most_splits > 1 && items < 4 * threads) plan_items(plan, true);
  return plan;
}

// The queries of a tile as rows token * heads + head, as the score tiles want them.
template <typename T, typename Q>
static inline void load_queries(const AttentionTile& tile, const Q* q, int64_t token_stride, int64_t head_stride_,
                                int64_t head_dim, Input<T>* queries) {
  int64_t stride = input_stride<T>(head_dim);
  for (int64_t t = 0; t < tile.tokens; t++)
    for (int64_t h = 0; h < tile.heads; h++)
      to_input(q + (tile.token + t) * token_stride + (tile.head + h) * head_stride_, head_dim,
               queries + (t * tile.heads + h) * stride);
}

template <typename Out>
static inline void store_row(const Partial& partial, const float* sums, int64_t head_dim, Out* out) {
  V16 inverse = set1(1.0f / partial.weight);
  for (int64_t d = 0; d < head_dim; d += 16) store_n(out + d, load(sums + d) * inverse, head_dim - d);
}

// Attention of all new tokens, whose keys and values are in the cache already: two counters, a barrier inside if
// by_split. out [tokens] rows of heads * head_dim.
template <typename T, typename Out>
static void attention_phase(Team& team, Counter* counters, const AttentionPlan& plan, const T* q, int64_t q_token_stride,
                            int64_t q_head_stride, Out* out, int64_t out_stride, const AttentionScratch<T>& scratch) {
  const Paging& paging = *plan.paging;
  int64_t head_dim = paging.head_dim, stride = plan.stride;
  int64_t limits[kMaxRows];
  Partial totals[kMaxRows], next[kMaxRows];
  int64_t begin, end, split;
  while (take(counters[0], plan.items, team.size, begin, end)) {
    for (int64_t item = begin; item < end; item++) {
      AttentionTile tile = plan.tile(item, split);
      int rows = static_cast<int>(tile.tokens * tile.heads);
      if (split >= tile.splits()) continue;
      const int32_t* table = paging.block_table + tile.sequence * paging.table_stride;
      load_queries<T>(tile, q, q_token_stride, q_head_stride, head_dim, scratch.queries);
      int64_t last = plan.by_split ? split + 1 : tile.splits();
      float* total_sums = plan.by_split ? plan.sums + item * plan.rows_per_item * stride : scratch.sums;
      float* next_sums = scratch.sums + kMaxRows * stride;
      Partial* total = plan.by_split ? plan.partials + item * plan.rows_per_item : totals;
      for (int64_t i = split; i < last; i++) {
        for (int r = 0; r < rows; r++) {
          int64_t visible = tile.position + r / tile.heads + 1 - i * kSplit;
          limits[r] = visible < kSplit ? visible : kSplit;
        }
        bool first = i == split;
        Following following = i + 1 < last       ? plan.blocks(tile, i + 1)
                              : item + 1 < end ? plan.blocks(item + 1)
                                               : Following{};
        attend_split<T>(paging, table, tile.kv_head, i * kSplit, rows, limits, following, scratch, first ? total : next,
                        first ? total_sums : next_sums);
        if (first) continue;
        for (int r = 0; r < rows; r++)
          if (limits[r] > 0) merge_split(total[r], total_sums + r * stride, next[r], next_sums + r * stride, stride);
      }
      if (plan.by_split) continue;
      for (int r = 0; r < rows; r++)
        store_row(total[r], total_sums + r * stride, head_dim,
                  out + (tile.token + r / tile.heads) * out_stride + (tile.head + r % tile.heads) * head_dim);
    }
  }
  if (!plan.by_split) return;
  team.barrier();
  while (take(counters[1], plan.items, team.size, begin, end)) {
    for (int64_t item = begin; item < end; item++) {
      AttentionTile tile = plan.tile(item, split);
      if (split != 0) continue;
      for (int64_t r = 0; r < tile.tokens * tile.heads; r++) {
        int64_t position = tile.position + r / tile.heads;
        Partial total = plan.partials[item * plan.rows_per_item + r];
        float* sums = plan.sums + (item * plan.rows_per_item + r) * stride;
        for (int64_t i = 1; i <= position / kSplit; i++) {
          int64_t at = (item + i) * plan.rows_per_item + r;
          merge_split(total, sums, plan.partials[at], plan.sums + at * stride, stride);
        }
        store_row(total, sums, head_dim,
                  out + (tile.token + r / tile.heads) * out_stride + (tile.head + r % tile.heads) * head_dim);
      }
    }
  }
}

// Where a sequence's token at `position` lies: elements before its kv head 0.
struct Slot {
  int64_t block, offset;
};
static inline Slot slot_of(const Paging& paging, int64_t sequence, int64_t position) {
  return {paging.block_table[sequence * paging.table_stride + position / kBlockSize], position % kBlockSize};
}

template <typename T>
static inline void write_key(const Paging& paging, const Slot& slot, int64_t kv_head, const T* key) {
  constexpr int64_t kPer = Step<T>::kPer;
  int64_t head_dim = paging.head_dim;
  T* to = static_cast<T*>(paging.k_cache) + (slot.block * paging.num_kv_heads + kv_head) * head_dim * kBlockSize;
  for (int64_t d = 0; d < head_dim; d += kPer)
    __builtin_memcpy(to + d * kBlockSize + slot.offset * kPer, key + d, kPer * sizeof(T));
}
template <typename T>
static inline void write_value(const Paging& paging, const Slot& slot, int64_t kv_head, const T* value) {
  int64_t head_dim = paging.head_dim;
  T* to = static_cast<T*>(paging.v_cache) + ((slot.block * paging.num_kv_heads + kv_head) * kBlockSize + slot.offset) * head_dim;
  __builtin_memcpy(to, value, static_cast<size_t>(head_dim) * sizeof(T));
}

// The sequence and position of every new token, for phases that go by token.
struct TokenPlace {
  int32_t sequence, position;
};
static inline void place_tokens(const Paging& paging, TokenPlace* places) {
  for (int64_t s = 0; s < paging.num_sequences; s++) {
    int32_t start = paging.query_start[s], end = paging.query_start[s + 1];
    for (int32_t t = start; t < end; t++)
      places[t] = {static_cast<int32_t>(s), paging.context_len[s] - (end - t)};
  }
}

// Bytes of scratch that a thread needs, and its pieces.
template <typename T>
static inline int64_t attention_scratch_bytes(int64_t head_dim) {
  int64_t query_bytes = kMaxRows * input_stride<T>(head_dim) * static_cast<int64_t>(sizeof(Input<T>));
  return query_bytes + kMaxRows * kSplit * 4 + 2 * kMaxRows * head_stride(head_dim) * 4;
}
template <typename T>
static inline AttentionScratch<T> attention_scratch(char* memory, int64_t head_dim) {
  AttentionScratch<T> scratch;
  scratch.queries = reinterpret_cast<Input<T>*>(memory);
  memory += kMaxRows * input_stride<T>(head_dim) * static_cast<int64_t>(sizeof(Input<T>));
  scratch.scores = reinterpret_cast<float*>(memory);
  scratch.sums = scratch.scores + kMaxRows * kSplit;
  return scratch;
}

template <typename T>
static void paged_attention(const AttentionArgs& args) {
  const Paging& paging = args.paging;
  const T *q = static_cast<const T*>(args.q), *k = static_cast<const T*>(args.k), *v = static_cast<const T*>(args.v);
  int64_t work = 0;
  for (int64_t s = 0; s < paging.num_sequences; s++)
    work += static_cast<int64_t>(paging.query_start[s + 1] - paging.query_start[s]) * paging.context_len[s];
  int threads = threads_for(work * paging.num_heads * paging.head_dim * 2);
  int64_t scratch_bytes = attention_scratch_bytes<T>(paging.head_dim);

  // Laid out twice: to know the size, then for good.
  AttentionPlan plan{};
  TokenPlace* places = nullptr;
  Counter* counters = nullptr;
  char* scratch = nullptr;
  auto first_item = static_cast<int64_t*>(__builtin_alloca(static_cast<size_t>(paging.num_sequences + 1) * 8));
  plan = plan_attention(paging, first_item, threads);
  Carver carver{nullptr, 0};
  for (int pass = 0; pass < 2; pass++) {
    counters = carver.take<Counter>(3);
    places = carver.take<TokenPlace>(paging.num_tokens);
    scratch = carver.take<char>(scratch_bytes * threads);
    plan.partials = carver.take<Partial>(plan.by_split ? plan.items * plan.rows_per_item : 0);
    plan.sums = carver.take<float>(plan.by_split ? plan.items * plan.rows_per_item * plan.stride : 0);
    if (pass == 0) carver = {static_cast<char*>(workspace(static_cast<size_t>(carver.used))), 0};
  }
  __builtin_memset(counters, 0, 3 * sizeof(Counter));
  place_tokens(paging, places);

  parallel(threads, [&](Team& team) {
    int64_t begin, end;
    while (take(counters[0], paging.num_tokens, team.size, begin, end)) {
      for (int64_t t = begin; t < end; t++) {
        Slot slot = slot_of(paging, places[t].sequence, places[t].position);
        for (int64_t h = 0; h < paging.num_kv_heads; h++) {
          write_key(paging, slot, h, k + t * args.k_token_stride + h * args.k_head_stride);
          write_value(paging, slot, h, v + t * args.v_token_stride + h * args.v_head_stride);
        }
      }
    }
    team.barrier();
    attention_phase<T>(team, counters + 1, plan, q, args.q_token_stride, args.q_head_stride, static_cast<T*>(args.out),
                       paging.num_heads * paging.head_dim,
                       attention_scratch<T>(scratch + team.index * scratch_bytes, paging.head_dim));
  });
}
