// The read of the logits in ensemble_sample.inc.h: every block of a row once.

constexpr int64_t kSampleBlock = 256;
constexpr float kLargestFloat = 3.402823466e38f;
constexpr float kLog2E = 1.44269504088896341f;
#define NO_TOKEN (-__builtin_inff())

// Of every block, the maximum of c (or z) and the sum of exp((c - maximum) / T).
struct BlockSums {
  float *max, *sum;
};

// Scratch of one row.
struct RowScratch {
  float* combined;  // c
  float* target;    // z, where the filters look at it
  BlockSums of_combined, of_target;
  // Candidates, in the order of their ids. `filter` is what the filters look at: s, or z / T for the target's nucleus.
  int32_t* id;
  float *filter, *score, *mass, *weight, *noise;
};

static inline int64_t sample_blocks(int64_t vocab) { return (vocab + kSampleBlock - 1) / kSampleBlock; }
static inline int64_t padded_blocks(int64_t vocab) { return (sample_blocks(vocab) + 15) / 16 * 16; }

static inline int64_t scratch_floats(int64_t vocab) {
  return 8 * sample_blocks(vocab) * kSampleBlock + 4 * padded_blocks(vocab);
}

static inline RowScratch scratch_at(float* memory, int64_t vocab) {
  int64_t padded = sample_blocks(vocab) * kSampleBlock, blocks = padded_blocks(vocab);
  RowScratch scratch;
  scratch.combined = memory;
  scratch.target = memory + padded;
  scratch.filter = memory + 2 * padded;
  scratch.score = memory + 3 * padded;
  scratch.mass = memory + 4 * padded;
  scratch.weight = memory + 5 * padded;
  scratch.noise = memory + 6 * padded;
  scratch.id = reinterpret_cast<int32_t*>(memory + 7 * padded);
  float* sums = memory + 8 * padded;
  scratch.of_combined = {sums, sums + blocks};
  scratch.of_target = {sums + 2 * blocks, sums + 3 * blocks};
  return scratch;
}

constexpr int kMaxPairs = 64;

// A row's inputs: only the pairs that are on.
template <typename T>
struct RowInput {
  const T* target;
  const T* expert[kMaxPairs];
  const T* anti[kMaxPairs];
  float alpha[kMaxPairs];
  int pairs;
};

template <typename T>
static inline RowInput<T> row_input(const SampleArgs& args, int64_t row) {
  RowInput<T> in;
  in.target = static_cast<const T*>(args.target) + row * args.target_stride;
  in.pairs = 0;
  for (int64_t p = 0; p < args.pairs; p++) {
    float alpha = args.alpha[row * args.alpha_stride + p];
    if (alpha == 0.0f) continue;
    in.alpha[in.pairs] = alpha;
    in.expert[in.pairs] = static_cast<const T*>(args.expert) + p * args.expert_pair_stride + row * args.expert_stride;
    in.anti[in.pairs] =
        args.anti ? static_cast<const T*>(args.anti) + p * args.anti_pair_stride + row * args.anti_stride : nullptr;
    in.pairs++;
  }
  return in;
}

// z + sum of alpha (z+ - z-) of up to sixteen tokens from `at`; lanes from n on hold z = 0.
template <typename T>
static inline V16 combined_at(const RowInput<T>& in, int64_t at, int64_t n, V16 z) {
  V16 c = z;
  for (int p = 0; p < in.pairs; p++) {
    V16 d = load_n(in.expert[p] + at, n);
    if (in.anti[p]) d = d - load_n(in.anti[p] + at, n);
    c = c + set1(in.alpha[p]) * finite_or_zero(d);
  }
  return in.pairs ? masked_by(c, z) : c;  // alpha * d can overflow, and a mask still holds
}

// The same where all numbers are finite. A difference that is not makes c so too, and no later pair can mend it.
enum class Pairs { none, one, any };
template <typename T, Pairs pairs>
static inline V16 finite_combined_at(const RowInput<T>& in, int64_t at, V16 z) {
  if (pairs == Pairs::none) return z;
  if (pairs == Pairs::one) return z + set1(in.alpha[0]) * (load(in.expert[0] + at) - load(in.anti[0] + at));
  V16 c = z;
  for (int p = 0; p < in.pairs; p++) {
    V16 d = load(in.expert[p] + at);
    if (in.anti[p]) d = d - load(in.anti[p] + at);
    c = c + set1(in.alpha[p]) * d;
  }
  return c;
}

// What a visit needs to know of its row beside the logits.
struct Visit {
  float heat, factor;  // T, or 1 for greedy rows; log2(e) / T
  bool with_target, keep_target;
  bool careful;  // some number in the row was not finite
  bool valid;    // no c is NaN or +inf, as it is where z is
};

// The sum of exp(x / T - max / T) over a block; x of whole blocks only. The contract rounds x / T to float: up to 16 that
// moves no weight by more than 2e-6, and beyond it the division is carried out.
constexpr float kLargestUnrounded = 16.0f;
template <typename T>
static inline float sum_of_weights(const T* x, int64_t size, float max, const Visit& visit) {
  if (!(max > NO_TOKEN)) return 0.0f;
  float quotient = max / visit.heat, magnitude = quotient < 0.0f ? -quotient : quotient;
  V16 total = zero();
  if (visit.heat == 1.0f || magnitude <= kLargestUnrounded) {
    V16 top = set1(max), scale = set1(visit.factor);
    for (int64_t i = 0; i < size; i += 16) total = total + power_of_2_at_most_1((load(x + i) - top) * scale);
  } else {
    V16 top = set1(quotient), scale = set1(kLog2E), divisor = set1(visit.heat);
    for (int64_t i = 0; i < size; i += 16)
      total = total + power_of_2_at_most_1((load(x + i) / divisor - top) * scale);
  }
  return sum(total);
}

// A whole block of finite numbers. False, with nothing but scratch written, where one is not finite.
template <typename T, Pairs pairs>
static inline bool visit_finite(const RowInput<T>& in, int64_t block, const Visit& visit, const RowScratch& scratch) {
  int64_t begin = block * kSampleBlock;
  float *combined = scratch.combined + begin, *kept = scratch.target + begin;
  V16 max_c = set1(NO_TOKEN), max_z = max_c, check = zero();
  for (int64_t i = 0; i < kSampleBlock; i += 16) {
    V16 z = load(in.target + begin + i), c = finite_combined_at<T, pairs>(in, begin + i, z);
    check = fma(c, zero(), check);  // NaN, once c is not finite
    store(combined + i, c);
    max_c = max(c, max_c);
    if (visit.keep_target) store(kept + i, z);
    if (pairs != Pairs::none) max_z = max(z, max_z);
  }
  if (!(sum(check) == 0.0f)) return false;
  float top = largest(max_c);
  scratch.of_combined.max[block] = top;
  scratch.of_combined.sum[block] = sum_of_weights(combined, kSampleBlock, top, visit);
  if (visit.with_target) {
    top = largest(max_z);
    scratch.of_target.max[block] = top;
    scratch.of_target.sum[block] = sum_of_weights(in.target + begin, kSampleBlock, top, visit);
  }
  return true;
}

// Any block, with all that the contract says about numbers that are not finite.
template <typename T>
static inline void visit_any(const RowInput<T>& in, int64_t vocab, int64_t block, Visit& visit,
                             const RowScratch& scratch) {
  int64_t begin = block * kSampleBlock, size = vocab - begin < kSampleBlock ? vocab - begin : kSampleBlock;
  float own_target[kSampleBlock];
  float *combined = scratch.combined + begin, *target = visit.keep_target ? scratch.target + begin : own_target;
  V16 none = set1(NO_TOKEN), max_c = none, max_z = none, limit = set1(kLargestFloat);
  unsigned valid = 0xffff;
  for (int64_t i = 0; i < size; i += 16) {
    int64_t n = size - i;
    V16 z = load_n(in.target + begin + i, n);
    V16 c = combined_at(in, begin + i, n, z);
    if (n < 16) {
      c = keep_below(c, static_cast<int>(n), none);
      z = keep_below(z, static_cast<int>(n), none);
    }
    valid &= mask_le(c, limit);
    store(combined + i, c);
    store(target + i, z);
    max_c = max(c, max_c);
    max_z = max(z, max_z);
  }
  if (valid != 0xffff) visit.valid = false;
  float top = largest(max_c);
  scratch.of_combined.max[block] = top;
  scratch.of_combined.sum[block] = sum_of_weights(combined, size, top, visit);
  if (visit.with_target) {
    top = largest(max_z);
    scratch.of_target.max[block] = top;
    scratch.of_target.sum[block] = sum_of_weights(target, size, top, visit);
  }
}

// One block: c, maxima, sums of exponentials. Both ways give the same bits where all numbers are finite; rows with masks
// are not worth trying the faster one on.
template <typename T>
static inline void visit_block(const RowInput<T>& in, int64_t vocab, int64_t block, Visit& visit,
                               const RowScratch& scratch) {
  if (!visit.careful && (block + 1) * kSampleBlock <= vocab) {
    bool finite = in.pairs == 0                 ? visit_finite<T, Pairs::none>(in, block, visit, scratch)
                  : in.pairs == 1 && in.anti[0] ? visit_finite<T, Pairs::one>(in, block, visit, scratch)
                                                : visit_finite<T, Pairs::any>(in, block, visit, scratch);
    if (finite) return;
    visit.careful = true;
  }
  visit_any(in, vocab, block, visit, scratch);
}

struct Total {
  float raw;   // the largest c (or z)
  float max;   // and divided by T, which is the largest s
  double sum;  // of exp(s - max)
};

static inline Total fold(const BlockSums& blocks, int64_t vocab, float heat) {
  int64_t count = sample_blocks(vocab), padded = padded_blocks(vocab);
  for (int64_t b = count; b < padded; b++) {
    blocks.max[b] = NO_TOKEN;
    blocks.sum[b] = 0.0f;
  }
  V16 max_of_lanes = set1(NO_TOKEN);
  for (int64_t b = 0; b < padded; b += 16) max_of_lanes = max(load(blocks.max + b), max_of_lanes);
  float raw = largest(max_of_lanes);
  Total total{raw, raw / heat, 0.0};
  if (!(raw > NO_TOKEN)) return total;
  V16 top = set1(total.max), scale = set1(kLog2E), divisor = set1(heat), all = zero();
  for (int64_t b = 0; b < padded; b += 16)
    all = all + load(blocks.sum + b) * power_of_2_at_most_1((load(blocks.max + b) / divisor - top) * scale);
  total.sum = static_cast<double>(sum(all));
  return total;
}
