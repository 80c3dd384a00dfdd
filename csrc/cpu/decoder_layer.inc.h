// One pre-norm decoder layer in one parallel region: the phases of the operators beside it, with barriers between.
//
// Everything between two roundings that the layer's own structure asks for (the inputs of linears, what the cache
// stores) stays in float32; the residual is rounded to the element type at the end of the layer.

static inline V16 activate(V16 x, Activation activation) {
  if (activation == Activation::silu) return x / (set1(1.0f) + exp(zero() - x));
  if (activation == Activation::gelu_tanh) {  // x / 2 (1 + tanh u) = x / (1 + e^-2u)
    V16 u = fma(x * x * x, set1(0.044715f), x) * set1(0.7978845608028654f);
    return x / (set1(1.0f) + exp(u * set1(-2.0f)));
  }
  float lanes[16];
  store(lanes, x);
  for (float& lane : lanes) lane = 0.5f * lane * (1.0f + __builtin_erff(lane * 0.70710678118654752f));
  return load(lanes);
}

// Rotates the first `width` elements of a head in place, i with i + width / 2, as transformers' rotate_half does.
static inline void rotate(float* head, const float* cos, const float* sin, int64_t width) {
  int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += 16) {
    int64_t n = half - i;
    V16 a = load_n(head + i, n), b = load_n(head + half + i, n);
    store_n(head + i, a * load_n(cos + i, n) - b * load_n(sin + i, n), n);
    store_n(head + half + i, b * load_n(cos + half + i, n) + a * load_n(sin + half + i, n), n);
  }
}

constexpr int64_t kMaxHeadDim = 1024;

template <typename T>
struct Layer {
  const LayerArgs& args;
  const Paging& paging;
  int64_t rows, width, q_width, kv_width, intermediate, low_stride;
  AttentionPlan plan;

  // Scratch: inputs of the four linears, the low-rank products, and what stays in float32.
  enum { kNorm1, kQkv, kRotary, kAttention, kLowO = kAttention + 2, kO, kNorm2, kGateUp, kLowDown, kDown, kCounters };
  Counter* counters;
  TokenPlace* places;
  Input<T>*normed, *attended, *product, *low;
  float *qkv, *residual;
  T* q;
  char* attention_memory;
  int64_t attention_bytes;

  Layer(const LayerArgs& a, int64_t* first_item, int threads) : args(a), paging(a.paging) {
    rows = paging.num_tokens;
    width = args.width;
    q_width = paging.num_heads * paging.head_dim;
    kv_width = paging.num_kv_heads * paging.head_dim;
    intermediate = args.intermediate;
    low_stride = 0;
    for (int i = 0; args.lora && i < 4; i++) {
      int64_t stride = lora_low_stride<T>(args.lora[i]);
      low_stride = stride > low_stride ? stride : low_stride;
    }
    plan = plan_attention(paging, first_item, threads);
    attention_bytes = attention_scratch_bytes<T>(paging.head_dim);
    Carver carver{nullptr, 0};
    for (int pass = 0; pass < 2; pass++) {
      counters = carver.take<Counter>(kCounters);
      places = carver.take<TokenPlace>(rows);
      normed = carver.take<Input<T>>(rows * input_stride<T>(width));
      attended = carver.take<Input<T>>(rows * input_stride<T>(q_width));
      product = carver.take<Input<T>>(rows * input_stride<T>(intermediate));
      low = carver.take<Input<T>>(rows * low_stride);
      qkv = carver.take<float>(rows * (q_width + 2 * kv_width));
      residual = carver.take<float>(rows * width);
      q = carver.take<T>(rows * q_width);
      attention_memory = carver.take<char>(attention_bytes * threads);
      plan.partials = carver.take<Partial>(plan.by_split ? plan.items * plan.rows_per_item : 0);
      plan.sums = carver.take<float>(plan.by_split ? plan.items * plan.rows_per_item * plan.stride : 0);
      if (pass == 0) carver = {static_cast<char*>(workspace(static_cast<size_t>(carver.used))), 0};
    }
    __builtin_memset(counters, 0, kCounters * sizeof(Counter));
    if (width % 2 || q_width % 2 || intermediate % 2)  // what pads the last step of two must be zero
      __builtin_memset(normed, 0, static_cast<size_t>(reinterpret_cast<char*>(qkv) - reinterpret_cast<char*>(normed)));
    place_tokens(paging, places);
  }

  // f(first, last) for shares of the rows.
  template <typename F>
  void each_share(Team& team, int counter, const F& f) {
    int64_t begin, end;
    while (take(counters[counter], rows, team.size, begin, end)) f(begin, end);
  }

  void low_products(int linear, int64_t first, int64_t last, const Input<T>* x, int64_t in_features) {
    if (args.lora)
      lora_down<T>(args.lora[linear], args.adapter, first, last, x, input_stride<T>(in_features), low, low_stride);
  }

  // Adds the adapters' part to the sixteen columns of a tile at `sums`, which are the linear's from `column` on.
  void add_adapters(int linear, const Tile& tile, int64_t column, int64_t count, float* sums) const {
    if (args.lora)
      lora_up<T>(args.lora[linear], args.adapter, tile.row, tile.row + tile.rows, low, low_stride, column, count, sums,
                 kTileColumns);
  }

  // The tiles of one linear, whose weights are T or, where they have scales, int8.
  template <typename Finish>
  void multiply(Team& team, int counter, int linear, const Input<T>* x, int64_t in_features, const void* packed,
                int64_t out_features, const Finish& finish) {
    const float* scale = args.scales[linear];
    int64_t stride = input_stride<T>(in_features);
    if (scale)
      linear_phase(team, counters[counter], x, stride, rows, static_cast<const Int8<T>*>(packed), scale, in_features,
                   out_features, finish);
    else
      linear_phase(team, counters[counter], x, stride, rows, static_cast<const T*>(packed), scale, in_features,
                   out_features, finish);
  }

  // One linear, each sixteen of its outputs given to done(row, column, count, sums).
  template <typename Done>
  void project(Team& team, int counter, int linear, const Input<T>* x, int64_t in_features, const void* packed,
               const void* bias, int64_t out_features, const Done& done) {
    auto finish = [&](const Tile& tile) {
      int64_t last = tile.column + kTileColumns < out_features ? tile.column + kTileColumns : out_features;
      for (int64_t c = tile.column; c < last; c += 16) {
        float* sums = tile.sums + c - tile.column;
        add_adapters(linear, tile, c, last - c, sums);
        V16 add = bias ? load_n(static_cast<const T*>(bias) + c, last - c) : zero();
        for (int r = 0; r < tile.rows; r++) done(tile.row + r, c, last - c, load(sums + r * kTileColumns) + add);
      }
    };
    multiply(team, counter, linear, x, in_features, packed, out_features, finish);
  }

  // Normalises x, the hidden states or the residual, for the linear that comes next.
  template <typename In>
  void norm(Team& team, int counter, const In* x, const void* weight, int linear) {
    int64_t stride = input_stride<T>(width);
    each_share(team, counter, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; r++)
        rms_norm_row(x + r * width, static_cast<const T*>(weight), width, args.eps, args.weight_offset,
                     normed + r * stride);
      low_products(linear, first, last, normed, width);
    });
  }

  // Per-head norm, rotary embedding, and the cache.
  void rotate_and_write(int64_t row) {
    int64_t head_dim = paging.head_dim, rotary = args.rotary_dim;
    float cos[kMaxHeadDim], sin[kMaxHeadDim], normed_head[kMaxHeadDim];
    T rounded[kMaxHeadDim];
    for (int64_t i = 0; i < rotary; i += 16) {
      int64_t at = row * args.rotary_stride + i, n = rotary - i;
      bool wide = args.rotary_float32;
      const float *cos32 = static_cast<const float*>(args.cos), *sin32 = static_cast<const float*>(args.sin);
      const T *cos16 = static_cast<const T*>(args.cos), *sin16 = static_cast<const T*>(args.sin);
      store(cos + i, wide ? load_n(cos32 + at, n) : load_n(cos16 + at, n));
      store(sin + i, wide ? load_n(sin32 + at, n) : load_n(sin16 + at, n));
    }
    Slot slot = slot_of(paging, places[row].sequence, places[row].position);
    float* projected = qkv + row * (q_width + 2 * kv_width);
    for (int64_t h = 0; h < paging.num_heads + paging.num_kv_heads; h++) {
      bool is_query = h < paging.num_heads;
      float* head = projected + h * head_dim;
      const void* weight = is_query ? args.q_norm : args.k_norm;
      if (weight) {
        rms_norm_row(head, static_cast<const T*>(weight), head_dim, args.eps, args.weight_offset, normed_head);
        head = normed_head;
      }
      rotate(head, cos, sin, rotary);
      T* out = is_query ? q + row * q_width + h * head_dim : rounded;
      for (int64_t i = 0; i < head_dim; i += 16) store_n(out + i, load_n(head + i, head_dim - i), head_dim - i);
      if (!is_query) write_key(paging, slot, h - paging.num_heads, rounded);
    }
    const float* values = projected + q_width + kv_width;
    for (int64_t h = 0; h < paging.num_kv_heads; h++) {
      for (int64_t i = 0; i < head_dim; i += 16)
        store_n(rounded + i, load_n(values + h * head_dim + i, head_dim - i), head_dim - i);
      write_value(paging, slot, h, rounded);
    }
  }

  // Gate and up columns of the same index come in one tile: [16 gate | 16 up].
  void gate_and_up(Team& team) {
    int64_t stride = input_stride<T>(intermediate);
    auto finish = [&](const Tile& tile) {
      int64_t i = tile.column / 2, count = intermediate - i;
      add_adapters(2, tile, i, count, tile.sums);
      add_adapters(2, tile, intermediate + i, count, tile.sums + 16);
      for (int r = 0; r < tile.rows; r++) {
        const float* sums = tile.sums + r * kTileColumns;
        V16 gated = activate(load(sums), args.activation) * load(sums + 16);
        store_n(product + (tile.row + r) * stride + i, gated, count);
      }
    };
    multiply(team, kGateUp, 2, normed, width, args.gate_up, (intermediate + 15) / 16 * kTileColumns, finish);
  }

  void run(Team& team) {
    const T* hidden = static_cast<const T*>(args.hidden);
    T* out = static_cast<T*>(args.out);
    int64_t qkv_width = q_width + 2 * kv_width, attended_stride = input_stride<T>(q_width);
    norm(team, kNorm1, hidden, args.norm1, 0);
    team.barrier();
    project(team, kQkv, 0, normed, width, args.qkv, args.qkv_bias, qkv_width,
            [&](int64_t r, int64_t c, int64_t n, V16 sums) { store_n(qkv + r * qkv_width + c, sums, n); });
    team.barrier();
    each_share(team, kRotary, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; r++) rotate_and_write(r);
    });
    team.barrier();
    attention_phase<T>(team, counters + kAttention, plan, q, q_width, paging.head_dim, attended, attended_stride,
                       attention_scratch<T>(attention_memory + team.index * attention_bytes, paging.head_dim));
    team.barrier();
    if (args.lora) {
      each_share(team, kLowO, [&](int64_t first, int64_t last) { low_products(1, first, last, attended, q_width); });
      team.barrier();
    }
    project(team, kO, 1, attended, q_width, args.o, args.o_bias, width,
            [&](int64_t r, int64_t c, int64_t n, V16 sums) {
              store_n(residual + r * width + c, load_n(hidden + r * width + c, n) + sums, n);
            });
    team.barrier();
    norm(team, kNorm2, residual, args.norm2, 2);
    team.barrier();
    gate_and_up(team);
    team.barrier();
    if (args.lora) {
      each_share(team, kLowDown,
                 [&](int64_t first, int64_t last) { low_products(3, first, last, product, intermediate); });
      team.barrier();
    }
    project(team, kDown, 3, product, intermediate, args.down, nullptr, width,
            [&](int64_t r, int64_t c, int64_t n, V16 sums) {
              store_n(out + r * width + c, load_n(residual + r * width + c, n) + sums, n);
            });
  }
};

template <typename T>
static void decoder_layer(const LayerArgs& args) {
  int64_t q_width = args.paging.num_heads * args.paging.head_dim;
  int threads = threads_for(args.paging.num_tokens * args.width * (q_width + args.intermediate));
  int64_t sequences = args.paging.num_sequences;
  auto first_item = static_cast<int64_t*>(__builtin_alloca(static_cast<size_t>(sequences + 1) * sizeof(int64_t)));
  Layer<T> layer(args, first_item, threads);
  parallel(threads, [&](Team& team) { layer.run(team); });
}
