// RMS norm: x / sqrt(mean(x^2) + eps) * (offset + weight), in float32, rounded once.

template <typename In>
static inline float inverse_rms(const In* x, int64_t width, float eps) {
  V16 squares[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 64 <= width; i += 64)
    for (int j = 0; j < 4; j++) {
      V16 v = load(x + i + 16 * j);
      squares[j] = fma(v, v, squares[j]);
    }
  for (int j = 0; i < width; i += 16, j++) {
    V16 v = load_n(x + i, width - i);
    squares[j] = fma(v, v, squares[j]);
  }
  float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(width);
  return 1.0f / __builtin_sqrtf(mean + eps);
}

// One row; Out is float, T or Input<T>.
template <typename T, typename In, typename Out>
static inline void rms_norm_row(const In* x, const T* weight, int64_t width, float eps, float offset, Out* out) {
  V16 inverse = set1(inverse_rms(x, width, eps)), add = set1(offset);
  for (int64_t i = 0; i < width; i += 16) {
    V16 v = load_n(x + i, width - i) * inverse * (add + load_n(weight + i, width - i));
    store_n(out + i, v, width - i);
  }
}

template <typename T>
static void rms_norm(const RmsNormArgs& args) {
  const T *x = static_cast<const T*>(args.x), *weight = static_cast<const T*>(args.weight);
  T* out = static_cast<T*>(args.out);
  parallel(threads_for(args.rows * args.width), [&](Team& team) {
    int64_t begin = args.rows * team.index / team.size, end = args.rows * (team.index + 1) / team.size;
    for (int64_t r = begin; r < end; r++)
      rms_norm_row(x + r * args.x_stride, weight, args.width, args.eps, args.weight_offset, out + r * args.width);
  });
}
