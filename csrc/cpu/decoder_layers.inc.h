// The pre-norm decoder layers of a model in one parallel region: the phases of the operators beside it, with barriers
// between.
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

// What the layers of a call have in common: sizes, and scratch memory for the inputs of the four linears, the low-rank
// products, and what stays in float32.
template <typename T>
struct Scratch {
  enum { kNorm1, kRotary, kAttention, kLowO = kAttention + 2, kNorm2, kLowDown, kLinears };
  int64_t rows, width, q_width, kv_width, intermediate, low_stride;
  int num_counters;  // those above, then one a thread for each linear
  AttentionPlan plan;
  Counter* counters;  // of layers with an even number, then of the others
  TokenPlace* places;
  Input<T>*normed, *attended, *product, *low;
  float *qkv, *residual;
  T* q;
  char* attention_memory;
  int64_t attention_bytes;

  Scratch(const LayerArgs* layers, int64_t count, int64_t* first_item, int threads) {
    const Paging& paging = layers->paging;
    rows = paging.num_tokens;
    width = layers->width;
    q_width = paging.num_heads * paging.head_dim;
    kv_width = paging.num_kv_heads * paging.head_dim;
    intermediate = layers->intermediate;
    low_stride = 0;
    for (const LayerArgs* layer = layers; layer < layers + count; layer++) {
      for (int i = 0; layer->lora && i < 4; i++) {
        int64_t stride = lora_low_stride<T>(layer->lora[i]);
        low_stride = stride > low_stride ? stride : low_stride;
      }
    }
    plan = plan_attention(paging, first_item, threads);
    attention_bytes = attention_scratch_bytes<T>(paging.head_dim);
    num_counters = kLinears + 4 * threads;
    Carver carver{nullptr, 0};
    for (int pass = 0; pass < 2; pass++) {
      counters = carver.take<Counter>(2 * num_counters);
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
    __builtin_memset(counters, 0, 2 * static_cast<size_t>(num_counters) * sizeof(Counter));
    if (width % 2 || q_width % 2 || intermediate % 2)  // what pads the last step of two must be zero
      __builtin_memset(normed, 0, static_cast<size_t>(reinterpret_cast<char*>(qkv) - reinterpret_cast<char*>(normed)));
    place_tokens(paging, places);
  }
};

// One layer, as one thread sees it.
template <typename T>
struct Layer : Scratch<T> {
  using S = Scratch<T>;
  using S::attended, S::attention_bytes, S::attention_memory, S::counters, S::intermediate, S::kv_width, S::low,
      S::low_stride, S::normed, S::places, S::plan, S::product, S::q, S::q_width, S::qkv, S::residual, S::rows, S::width;
  using S::kAttention, S::kLinears, S::kLowDown, S::kLowO, S::kNorm1, S::kNorm2, S::kRotary;
  const LayerArgs& args;
  const LayerArgs* next;  // the layer that comes then, or null
  const Paging& paging;
  const T* hidden;
  T* out;

  Layer(const Scratch<T>& scratch, const LayerArgs& a, const LayerArgs* after, const T* input, T* output, Counter* own)
      : Scratch<T>(scratch), args(a), next(after), paging(a.paging), hidden(input), out(output) {
    counters = own;
    plan.paging = &paging;  // this layer's caches
  }

  struct Linear {
    const void* packed;
    int64_t in_features, out_features;
  };
  Linear linear(const LayerArgs& layer, int which) const {
    switch (which) {
      case 0: return {layer.qkv, width, q_width + 2 * kv_width};
      case 1: return {layer.o, q_width, width};
      case 2: return {layer.gate_up, width, (intermediate + 15) / 16 * kTileColumns};
      default: return {layer.down, intermediate, width};
    }
  }

  // f(first, last) for shares of the rows.
  template <typename F>
  void each_share(Team& team, int counter, const F& f) {
    int64_t begin, end;
    while (take(counters[counter], rows, team.size, begin, end)) f(begin, end);
  }

  void low_products(int which, int64_t first, int64_t last, const Input<T>* x, int64_t in_features) {
    if (args.lora)
      lora_down<T>(args.lora[which], args.adapter, first, last, x, input_stride<T>(in_features), low, low_stride);
  }

  // Adds the adapters' part to the sixteen columns of a tile at `sums`, which are the linear's from `column` on.
  void add_adapters(int which, const Tile& tile, int64_t column, int64_t count, float* sums) const {
    if (args.lora)
      lora_up<T>(args.lora[which], args.adapter, tile.row, tile.row + tile.rows, low, low_stride, column, count, sums,
                 kTileColumns);
  }

  // The tiles of one linear, whose weights are T or, where they have scales, int8.
  template <typename Finish>
  void multiply(Team& team, int which, const Input<T>* x, const Finish& finish) {
    if (args.scales[which])
      multiply_by<Int8<T>>(team, which, x, finish);
    else
      multiply_by<T>(team, which, x, finish);
  }

  template <typename Weight, typename Finish>
  void multiply_by(Team& team, int which, const Input<T>* x, const Finish& finish) {
    Linear now = linear(args, which);
    const LayerArgs* after = which < 3 ? &args : next;
    const Weight* then = nullptr;
    if (after) {
      Linear l = linear(*after, (which + 1) % 4);
      then = first_group(team, static_cast<const Weight*>(l.packed), rows, l.in_features, l.out_features);
    }
    linear_phase<Weight>(team, counters + kLinears + which * team.size, x, input_stride<T>(now.in_features), rows,
                         static_cast<const Weight*>(now.packed), args.scales[which], now.in_features, now.out_features, then,
                         finish);
  }

  // One linear, each sixteen of its outputs given to done(row, column, count, sums).
  template <typename Done>
  void project(Team& team, int which, const Input<T>* x, const void* bias, const Done& done) {
    int64_t out_features = linear(args, which).out_features;
    auto finish = [&](const Tile& tile) {
      int64_t last = tile.column + kTileColumns < out_features ? tile.column + kTileColumns : out_features;
      for (int64_t c = tile.column; c < last; c += 16) {
        float* sums = tile.sums + c - tile.column;
        add_adapters(which, tile, c, last - c, sums);
        V16 add = bias ? load_n(static_cast<const T*>(bias) + c, last - c) : zero();
        for (int r = 0; r < tile.rows; r++) done(tile.row + r, c, last - c, load(sums + r * kTileColumns) + add);
      }
    };
    multiply(team, which, x, finish);
  }

  // Normalises x, the hidden states or the residual, for the linear that comes next.
  template <typename In>
  void norm(Team& team, int counter, const In* x, const void* weight, int which) {
    int64_t stride = input_stride<T>(width);
    each_share(team, counter, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; r++)
        rms_norm_row(x + r * width, static_cast<const T*>(weight), width, args.eps, args.weight_offset,
                     normed + r * stride);
      low_products(which, first, last, normed, width);
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
    multiply(team, 2, normed, finish);
  }

  void run(Team& team) {
    int64_t qkv_width = q_width + 2 * kv_width, attended_stride = input_stride<T>(q_width);
    norm(team, kNorm1, hidden, args.norm1, 0);
    team.barrier();
    project(team, 0, normed, args.qkv_bias,
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
    project(team, 1, attended, args.o_bias,
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
    project(team, 3, product, nullptr,
            [&](int64_t r, int64_t c, int64_t n, V16 sums) {
              store_n(out + r * width + c, load_n(residual + r * width + c, n) + sums, n);
            });
  }
};

// Layers of one model: what they don't share are weights, adapters and caches. Each reads what the one before it wrote.
template <typename T>
static void decoder_layers(const LayersArgs& args) {
  const LayerArgs* layers = args.layers;
  int64_t count = args.count;
  const Paging& paging = layers->paging;
  int64_t q_width = paging.num_heads * paging.head_dim;
  int threads = threads_for(paging.num_tokens * layers->width * (q_width + layers->intermediate));
  auto first_item = static_cast<int64_t*>(__builtin_alloca(static_cast<size_t>(paging.num_sequences + 1) * sizeof(int64_t)));
  Scratch<T> scratch(layers, count, first_item, threads);
  parallel(threads, [&](Team& team) {
    for (int64_t i = 0; i < count; i++) {
      Counter* counters[2] = {scratch.counters, scratch.counters + scratch.num_counters};
      if (i > 0) {
        team.barrier();
        // Every thread has left the layer before; its counters are the next one's.
        size_t bytes = static_cast<size_t>(scratch.num_counters) * sizeof(Counter);
        if (team.index == 0) __builtin_memset(counters[(i + 1) % 2], 0, bytes);
      }
      T* out = static_cast<T*>(layers->out);
      const T* input = i == 0 ? static_cast<const T*>(layers->hidden) : out;
      const LayerArgs* next = i + 1 < count ? layers + i + 1 : nullptr;
      Layer<T>(scratch, layers[i], next, input, out, counters[i % 2]).run(team);
    }
  });
}
