// ensemble_sample and combine on a CPU: one read of the logits, then Gumbel-max and a check (see docs of the contract).
//
// A row is cut into blocks of 256 tokens. One visit of a block reads its logits, writes its scores to a scratch row,
// and leaves the block's maximum and its sum of exponentials (relative to that maximum). What follows touches only
// tokens that can be kept: none below a bound that no kept token can lie under. Blocks are the unit that threads share,
// and every sum over blocks goes in their order, so no result depends on the number of threads.

constexpr int64_t kSampleBlock = 256;
constexpr float kLargestFloat = 3.402823466e38f;
constexpr float kLog2E = 1.44269504088896341f;
#define NO_TOKEN (-__builtin_inff())

struct BlockSums {
  float max, sum;                // of scores s; sum of exp(s - max)
  float target_max, target_sum;  // of t = z / T
};

// Scratch of one row. `filter` is what the filters look at: `score`, or `target` for the target's nucleus.
struct RowScratch {
  float* score;
  float* target;
  BlockSums* blocks;
  // Candidates, in the order of their ids.
  int32_t* id;
  float *candidate_filter, *candidate_score, *mass, *weight, *noise;
};

static inline int64_t sample_blocks(int64_t vocab) { return (vocab + kSampleBlock - 1) / kSampleBlock; }

static inline int64_t scratch_floats(int64_t vocab) {
  int64_t padded = sample_blocks(vocab) * kSampleBlock;
  return 8 * padded + sample_blocks(vocab) * 4;
}

static inline RowScratch scratch_at(float* memory, int64_t vocab) {
  int64_t padded = sample_blocks(vocab) * kSampleBlock;
  RowScratch scratch;
  scratch.score = memory;
  scratch.target = memory + padded;
  scratch.candidate_filter = memory + 2 * padded;
  scratch.candidate_score = memory + 3 * padded;
  scratch.mass = memory + 4 * padded;
  scratch.weight = memory + 5 * padded;
  scratch.noise = memory + 6 * padded;
  scratch.id = reinterpret_cast<int32_t*>(memory + 7 * padded);
  scratch.blocks = reinterpret_cast<BlockSums*>(memory + 8 * padded);
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

// One block: scores, maxima, sums of exponentials. False if a score is NaN or +inf, as it is where z is.
template <typename T>
static inline bool visit_block(const RowInput<T>& in, int64_t vocab, int64_t block, float temperature, bool divide,
                               bool with_target, bool keep_target, const RowScratch& scratch) {
  int64_t begin = block * kSampleBlock, size = vocab - begin < kSampleBlock ? vocab - begin : kSampleBlock;
  float* score = scratch.score + begin;
  float own_target[kSampleBlock];
  float* target = keep_target ? scratch.target + begin : own_target;
  V16 heat = set1(temperature), per_heat = set1(kLog2E / temperature), per_one = set1(kLog2E), none = set1(NO_TOKEN), max_s = none, max_t = none, limit = set1(kLargestFloat);
  unsigned valid = 0xffff;
  for (int64_t i = 0; i < size; i += 16) {
    int64_t n = size - i;
    V16 z = load_n(in.target + begin + i, n);
    V16 s = combined_at(in, begin + i, n, z);
    if (divide) s = s / heat;
    if (divide && keep_target) z = z / heat;
    if (n < 16) {
      s = keep_below(s, static_cast<int>(n), none);
      z = keep_below(z, static_cast<int>(n), none);
    }
    valid &= mask_le(s, limit);
    store(score + i, s);
    max_s = max(s, max_s);
    if (with_target) {
      store(target + i, z);
      max_t = max(z, max_t);
    }
  }
  BlockSums sums{largest(max_s), 0.0f, NO_TOKEN, 0.0f};
  if (sums.max > NO_TOKEN) {
    V16 total = zero(), top = set1(sums.max);
    for (int64_t i = 0; i < size; i += 16)
      total = total + power_of_2_at_most_1((load(score + i) - top) * per_one);
    sums.sum = sum(total);
  }
  if (with_target) {
    // Where no filter looks at t, z stands for it: only the sum divides by T, in its exponents.
    float own_max = largest(max_t);
    sums.target_max = keep_target ? own_max : own_max / temperature;
    if (own_max > NO_TOKEN) {
      V16 total = zero(), top = set1(own_max), factor = keep_target ? per_one : per_heat;
      for (int64_t i = 0; i < size; i += 16)
        total = total + power_of_2_at_most_1((load(target + i) - top) * factor);
      sums.target_sum = sum(total);
    }
  }
  scratch.blocks[block] = sums;
  return valid == 0xffff;
}

struct Total {
  float max;
  double sum;  // of exp(x - max)
};

static inline Total fold(const BlockSums* blocks, int64_t count, bool target) {
  Total total{NO_TOKEN, 0.0};
  for (int64_t b = 0; b < count; b++) {
    float m = target ? blocks[b].target_max : blocks[b].max;
    total.max = m > total.max ? m : total.max;
  }
  if (!(total.max > NO_TOKEN)) return total;
  for (int64_t b = 0; b < count; b++) {
    float m = target ? blocks[b].target_max : blocks[b].max, s = target ? blocks[b].target_sum : blocks[b].sum;
    if (s > 0.0f) total.sum += static_cast<double>(s * __builtin_expf(m - total.max));
  }
  return total;
}

// Tokens in the blocks of `share` whose filter value is at least `bound`, in the order of their ids, laid down from the
// share's first token on. -1 when there are more than `most`.
static inline int64_t gather(const RowScratch& row, Share share, const float* filter, bool target, int64_t vocab,
                             float bound, int64_t most) {
  int64_t count = 0;
  V16 least = set1(bound);
  RowScratch scratch = row;
  scratch.id += share.begin * kSampleBlock;
  scratch.candidate_filter += share.begin * kSampleBlock;
  scratch.candidate_score += share.begin * kSampleBlock;
  for (int64_t b = share.begin; b < share.end; b++) {
    if (!((target ? scratch.blocks[b].target_max : scratch.blocks[b].max) >= bound)) continue;
    if (count > most) return -1;
    int64_t begin = b * kSampleBlock, end = begin + kSampleBlock < vocab ? begin + kSampleBlock : vocab;
    for (int64_t i = begin; i < end; i += 16) {
      unsigned mask = mask_le(least, load(filter + i));
      while (mask) {
        int64_t token = i + __builtin_ctz(mask);
        mask &= mask - 1;
        scratch.id[count] = static_cast<int32_t>(token);
        scratch.candidate_filter[count] = filter[token];
        scratch.candidate_score[count] = scratch.score[token];
        count++;
      }
    }
  }
  return count;
}

// exp(f - max) of every candidate; returns their sum.
static inline double weigh(const RowScratch& scratch, int64_t count, float max) {
  V16 top = set1(max), total = zero();
  for (int64_t i = 0; i < count; i += 16) {
    V16 weight = exp(load(scratch.candidate_filter + i) - top);
    if (count - i < 16) weight = keep_below(weight, static_cast<int>(count - i), zero());
    store(scratch.mass + i, weight);
    total = total + weight;
  }
  return static_cast<double>(sum(total));
}

static inline uint32_t ordered_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
static inline float from_ordered_bits(uint32_t key) {
  uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// The k-th largest of n values (1 <= k <= n), by counting bytes from the top: 4 passes, no comparison sort.
static inline float kth_largest(const float* values, int64_t n, int64_t k) {
  uint32_t prefix = 0, known = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t counts[256] = {};
    for (int64_t i = 0; i < n; i++) {
      uint32_t key = ordered_bits(values[i]);
      if ((key & known) == prefix) counts[(key >> shift) & 255]++;
    }
    int byte = 255;
    for (; k > counts[byte]; byte--) k -= counts[byte];
    prefix |= static_cast<uint32_t>(byte) << shift;
    known |= 255u << shift;
  }
  return from_ordered_bits(prefix);
}

// A bound that at least k tokens reach: the k-th largest block maximum. -largest where there are fewer blocks than k.
static inline float top_k_bound(const RowScratch& scratch, bool target, int64_t blocks, int64_t k, float* values) {
  if (k > blocks) return -kLargestFloat;
  for (int64_t b = 0; b < blocks; b++) values[b] = target ? scratch.blocks[b].target_max : scratch.blocks[b].max;
  float bound = kth_largest(values, blocks, k);
  return bound > -kLargestFloat ? bound : -kLargestFloat;
}

// u of n tokens.
static inline void noise_of(const int32_t* ids, int64_t n, NoiseKey key, float* u) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t id = static_cast<uint32_t>(ids[i]);
    PhiloxWords w = noise_words(id >> 2, key);
    uint32_t even = id & 2 ? w.word[2] : w.word[0], odd = id & 2 ? w.word[3] : w.word[1];
    u[i] = uniform(id & 1 ? odd : even);
  }
}
// u of 256 tokens from a multiple of 256 on.
#if SIMD_LEVEL == 4
// Both halves of sixteen products of 32 bits.
static inline void multiply_wide(__m512i x, __m512i factor, __m512i& high, __m512i& low) {
  __m512i even = _mm512_mul_epu32(x, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
  high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
  low = _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
}
static inline void store_uniform(float* u, __m512i words) {
  V16 x = {_mm512_cvtepu32_ps(words)};
  store(u, (x + set1(0.5f)) * set1(0x1p-32f));
}
static inline void noise_of_block(int64_t first, NoiseKey key, float* u) {
  __m512i f0 = _mm512_set1_epi64(0xD2511F53), f1 = _mm512_set1_epi64(0xCD9E8D57);
  // Element 4 L + k holds quad 4 k + L: after the transposition in 128-bit lanes below, register k is quads 4 k … 4 k + 3.
  __m512i quads = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int part = 0; part < kSampleBlock / 64; part++) {
    __m512i c0 = _mm512_add_epi32(quads, _mm512_set1_epi32(static_cast<int>(first >> 2) + 16 * part));
    __m512i c1 = _mm512_set1_epi32(static_cast<int>(key.position)), c2 = _mm512_setzero_si512(), c3 = c2;
    uint32_t k0 = key.k0, k1 = key.k1;
    for (int round = 0; round < 10; round++) {
      __m512i h0, l0, h1, l1;
      multiply_wide(c0, f0, h0, l0);
      multiply_wide(c2, f1, h1, l1);
      c0 = _mm512_xor_si512(_mm512_xor_si512(h1, c1), _mm512_set1_epi32(static_cast<int>(k0)));
      c2 = _mm512_xor_si512(_mm512_xor_si512(h0, c3), _mm512_set1_epi32(static_cast<int>(k1)));
      c1 = l1;
      c3 = l0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    __m512i a = _mm512_unpacklo_epi32(c0, c1), b = _mm512_unpackhi_epi32(c0, c1);
    __m512i c = _mm512_unpacklo_epi32(c2, c3), d = _mm512_unpackhi_epi32(c2, c3);
    store_uniform(u + 64 * part, _mm512_unpacklo_epi64(a, c));
    store_uniform(u + 64 * part + 16, _mm512_unpackhi_epi64(a, c));
    store_uniform(u + 64 * part + 32, _mm512_unpacklo_epi64(b, d));
    store_uniform(u + 64 * part + 48, _mm512_unpackhi_epi64(b, d));
  }
}
#else
static inline void noise_of_block(int64_t first, NoiseKey key, float* u) {
  uint32_t words[4][kSampleBlock / 4];
  uint32_t quad = static_cast<uint32_t>(first >> 2);
  for (int i = 0; i < kSampleBlock / 4; i++) {
    PhiloxWords w = noise_words(quad + static_cast<uint32_t>(i), key);
    for (int j = 0; j < 4; j++) words[j][i] = w.word[j];
  }
  for (int i = 0; i < kSampleBlock / 4; i++)
    for (int j = 0; j < 4; j++) u[4 * i + j] = uniform(words[j][i]);
}
#endif

// The best of (key, lowest id) so far. `weight` tells cheaply who cannot win: key = s - log(E) with E >= u, so a token
// with u * exp(best - top) > exp(s - top) is behind. 3e-4 covers the rounding of both sides.
struct Best {
  float key, top, threshold;
  int64_t token;
  int64_t at;
};
static inline void start(Best& best, float top) {
  best.key = NO_TOKEN;
  best.top = top;
  best.threshold = 0.0f;
  best.token = -1;
  best.at = -1;
}
static inline void offer(Best& best, float score, float u, int64_t token, int64_t at) {
  float key = score - __builtin_logf(-__builtin_log1pf(-u));
  if (!(key >= -kLargestFloat)) key = -kLargestFloat;  // u rounded to 1: still a candidate, if it is the only one
  if (key > best.key || (key == best.key && token < best.token)) {
    best.key = key;
    best.token = token;
    best.at = at;
    best.threshold = __builtin_expf(key - best.top) * (1.0f - 3e-4f);
  }
}

// The best of the tokens in `share` with bound <= s and s > above, without gathering them: for rows where that is most
// tokens.
static inline Best sample_dense(const RowScratch& scratch, Share share, int64_t vocab, float max, float bound,
                                float above, NoiseKey key) {
  Best best;
  start(best, max);
  float u[kSampleBlock];
  V16 top = set1(max), per_one = set1(kLog2E), least = set1(bound), floor = set1(above), none = set1(NO_TOKEN);
  for (int64_t b = share.begin; b < share.end; b++) {
    float block_max = scratch.blocks[b].max;
    // The smallest u is 2^-33.
    if (!(block_max >= bound && block_max > above)) continue;
    if (__builtin_expf(block_max - max) < best.threshold * 0x1p-33f) continue;
    int64_t begin = b * kSampleBlock, end = begin + kSampleBlock < vocab ? begin + kSampleBlock : vocab;
    noise_of_block(begin, key, u);
    for (int64_t i = begin; i < end; i += 16) {
      V16 s = load(scratch.score + i);
      unsigned mask = mask_le(load(u + (i - begin)) * set1(best.threshold), power_of_2_at_most_1((s - top) * per_one));
      mask &= mask_le(least, where_greater(s, floor, s, none));
      while (mask) {
        int64_t token = i + __builtin_ctz(mask);
        mask &= mask - 1;
        offer(best, scratch.score[token], u[token - begin], token, token);
      }
    }
  }
  return best;
}

// The weight, exp(s - max), of all tokens with s > own.
static inline double mass_above(const RowScratch& scratch, int64_t vocab, float max, float own) {
  double mass = 0.0;
  V16 top = set1(max), per_one = set1(kLog2E), floor = set1(own);
  for (int64_t b = 0; b < sample_blocks(vocab); b++) {
    if (!(scratch.blocks[b].max > own)) continue;
    int64_t begin = b * kSampleBlock, end = begin + kSampleBlock < vocab ? begin + kSampleBlock : vocab;
    V16 total = zero();
    for (int64_t i = begin; i < end; i += 16) {
      V16 s = load(scratch.score + i);
      total = total + where_greater(s, floor, power_of_2_at_most_1((s - top) * per_one), zero());
    }
    mass += static_cast<double>(sum(total));
  }
  return mass;
}

// What the sums over a row's blocks say about where its token can be: the same in every thread.
struct Plan {
  bool possible;  // the row has a valid sample
  bool by_target, greedy, use_k, may_be_dense, all;
  Total total, target_total, filter_total;
  const float* filter;
  float least;   // exact: nothing below it is kept
  float bound;   // no kept token lies below it
  float higher;  // where to look first, or `bound`: few rows keep a token between the two
  int64_t most;  // candidates worth gathering
  NoiseKey key;
};

static inline Plan plan_row(const SampleArgs& args, int64_t row, bool valid, bool with_target,
                            const RowScratch& scratch) {
  int64_t vocab = args.vocab, blocks = sample_blocks(vocab);
  Plan plan;
  plan.total = fold(scratch.blocks, blocks, false);
  plan.possible = valid && plan.total.max > NO_TOKEN && plan.total.max <= kLargestFloat;
  if (!plan.possible) return plan;
  plan.target_total = with_target ? fold(scratch.blocks, blocks, true) : plan.total;
  plan.by_target = args.nucleus_target && with_target;  // without a pair the two distributions are one
  plan.filter = plan.by_target ? scratch.target : scratch.score;
  plan.filter_total = plan.by_target ? plan.target_total : plan.total;
  plan.greedy = args.temperature[row] == 0.0f;
  int64_t k = args.top_k[row];
  plan.use_k = k > 0 && k < vocab;
  float p = args.top_p[row], min_p = args.min_p[row], max = plan.filter_total.max;
  plan.key = noise_key(args.seed[row], args.position[row]);
  plan.least = -kLargestFloat;
  if (min_p > 0.0f) plan.least = max + static_cast<float>(__builtin_log(static_cast<double>(min_p)));
  plan.bound = plan.higher = plan.least;
  if (plan.use_k) {
    // The k-th value has to be found among all that may be above it, whatever min-p says.
    plan.bound = plan.higher = top_k_bound(scratch, plan.by_target, blocks, k, scratch.mass);
  } else if (p < 1.0f) {
    // All tokens with e^(f - m) <= (1 - p) Z / V together weigh at most (1 - p) Z, so none of them is kept.
    double cut = (1.0 - static_cast<double>(p)) * plan.filter_total.sum / static_cast<double>(vocab);
    float floor = max + static_cast<float>(__builtin_log(cut * 0.9999)) - 1e-4f;
    plan.bound = floor > plan.bound ? floor : plan.bound;
    if (plan.bound > max) plan.bound = max;
    plan.higher = plan.bound + 2.7725887f;  // a sixteenth of the tokens, were weights spread evenly
    if (!(plan.higher < max)) plan.higher = plan.bound;
  }
  // Gathering pays where few tokens are left; the paths that need all of them (k, the target's nucleus) always do.
  plan.may_be_dense = !plan.use_k && !plan.by_target;
  plan.all = plan.may_be_dense && p >= 1.0f && min_p <= 0.0f;
  plan.most = plan.may_be_dense || plan.higher > plan.bound ? vocab / 10 : vocab;
  return plan;
}

// What one thread found in its share of a row: candidates from `plan.higher` on, or, where all tokens are, the best.
constexpr int kMostParts = 64;
struct Part {
  Share share;
  int64_t count;
  Best best;
};

static inline void search_part(const Plan& plan, int64_t vocab, const RowScratch& scratch, Part& part) {
  part.count = -1;
  start(part.best, plan.total.max);
  if (plan.greedy && !plan.by_target) return;  // the blocks' maxima tell where it is
  if (plan.all)
    part.best = sample_dense(scratch, part.share, vocab, plan.total.max, plan.bound, NO_TOKEN, plan.key);
  else
    part.count = gather(scratch, part.share, plan.filter, plan.by_target, vocab, plan.higher, plan.most);
}

// The parts' candidates one after another, in the order of their ids; -1 if one gave up.
static inline int64_t join_parts(const RowScratch& scratch, const Part* parts, int size) {
  int64_t count = 0;
  for (int i = 0; i < size; i++) {
    if (parts[i].count < 0) return -1;
    int64_t from = parts[i].share.begin * kSampleBlock;
    size_t bytes = static_cast<size_t>(parts[i].count) * 4;
    if (from != count) {
      __builtin_memmove(scratch.id + count, scratch.id + from, bytes);
      __builtin_memmove(scratch.candidate_filter + count, scratch.candidate_filter + from, bytes);
      __builtin_memmove(scratch.candidate_score + count, scratch.candidate_score + from, bytes);
    }
    count += parts[i].count;
  }
  return count;
}

// Everything after the blocks were visited and searched.
template <typename T>
static inline void finish_row(const SampleArgs& args, int64_t row, const Plan& plan, bool with_target,
                              const RowScratch& scratch, const Part* parts, int size) {
  int64_t vocab = args.vocab, blocks = sample_blocks(vocab);
  args.token[row] = -1;
  args.logprob[row] = args.target_logprob[row] = __builtin_nanf("");
  if (!plan.possible) return;
  const Total &total = plan.total, &target_total = plan.target_total, &filter_total = plan.filter_total;
  const float* filter = plan.filter;
  bool by_target = plan.by_target, greedy = plan.greedy, use_k = plan.use_k;
  int64_t k = args.top_k[row];
  float p = args.top_p[row], min_p = args.min_p[row], least = plan.least;
  NoiseKey key = plan.key;

  int64_t token = -1;
  if (greedy && !by_target) {  // the best token passes every filter
    for (int64_t b = 0; b < blocks && token < 0; b++) {
      if (scratch.blocks[b].max != total.max) continue;
      int64_t i = b * kSampleBlock;
      while (scratch.score[i] != total.max) i++;
      token = i;
    }
  } else if (plan.all) {
    Best best = parts[0].best;
    for (int i = 1; i < size; i++)  // ids rise from part to part: the first of equals has the lowest
      if (parts[i].best.token >= 0 && (best.token < 0 || parts[i].best.key > best.key)) best = parts[i].best;
    token = best.token;
  } else {
    Share whole{0, blocks};
    int64_t count = join_parts(scratch, parts, size);
    if (count > 0) {
      double weight = weigh(scratch, count, filter_total.max);
      // If the tokens above the higher bound weigh p of all, no other token is kept.
      if (plan.higher > plan.bound && !(weight >= 1.0001 * p * filter_total.sum)) count = -1;
    }
    if (count < 0 || (count == 0 && plan.higher > plan.bound)) {
      count = gather(scratch, whole, filter, by_target, vocab, plan.bound, plan.may_be_dense ? vocab / 10 : vocab);
      if (count > 0) weigh(scratch, count, filter_total.max);
    }
    if (count < 0) {
      float above = NO_TOKEN;
      for (;;) {
        token = sample_dense(scratch, whole, vocab, total.max, plan.bound, above, key).token;
        if (token < 0 || p >= 1.0f) break;
        if (mass_above(scratch, vocab, total.max, scratch.score[token]) < static_cast<double>(p) * total.sum) break;
        above = scratch.score[token];
      }
      count = 0;
    }
    const float* f = scratch.candidate_filter;
    if (use_k) {
      float kth = kth_largest(f, count, k < count ? k : count);
      least = kth > least ? kth : least;
    }
    double mass_total = filter_total.sum;
    if (use_k && p < 1.0f) {
      mass_total = 0.0;
      float kth = least;
      if (min_p > 0.0f) kth = kth_largest(f, count, k < count ? k : count);
      for (int64_t i = 0; i < count; i++)
        if (f[i] >= kth) mass_total += scratch.mass[i];
    }
    const float* weight = scratch.mass;
    float top = filter_total.max;
    if (by_target) {
      top = NO_TOKEN;
      for (int64_t i = 0; i < count; i++)
        if (f[i] >= least && scratch.candidate_score[i] > top) top = scratch.candidate_score[i];
      V16 score_top = set1(top);
      for (int64_t i = 0; i < count; i += 16)
        store(scratch.weight + i, exp(load(scratch.candidate_score + i) - score_top));
      weight = scratch.weight;
    }
    if (!greedy) noise_of(scratch.id, count, key, scratch.noise);
    float above = NO_TOKEN;  // candidates at or below it were found outside the nucleus
    while (count > 0) {
      Best best;
      start(best, top);
      for (int64_t i = 0; i < count; i++) {
        if (f[i] < least || !(f[i] > above)) continue;
        if (greedy) {
          if (scratch.candidate_score[i] > best.key) {
            best.key = scratch.candidate_score[i];
            best.token = scratch.id[i];
            best.at = i;
          }
        } else if (scratch.noise[i] * best.threshold <= weight[i]) {
          offer(best, scratch.candidate_score[i], scratch.noise[i], scratch.id[i], i);
        }
      }
      token = best.token;
      if (token < 0 || p >= 1.0f) break;
      // Kept by top-p iff the tokens strictly above weigh less than p of all.
      double mass = 0.0;
      float own = f[best.at];
      for (int64_t i = 0; i < count; i++)
        if (f[i] > own) mass += scratch.mass[i];
      if (mass < static_cast<double>(p) * mass_total) break;
      above = own;
    }
  }
  if (token < 0) return;
  args.token[row] = token;
  args.logprob[row] =
      static_cast<float>(static_cast<double>(scratch.score[token]) - total.max - __builtin_log(total.sum));
  if (args.target_is_combined) return;
  if (!with_target) {
    args.target_logprob[row] = args.logprob[row];
    return;
  }
  float heat = effective_temperature(args.temperature[row]);
  T z[16];
  __builtin_memset(z, 0, sizeof(z));
  __builtin_memcpy(z, static_cast<const T*>(args.target) + row * args.target_stride + token, sizeof(T));
  float lanes[16];
  store(lanes, load(z));
  float t = lanes[0] / heat;
  args.target_logprob[row] =
      static_cast<float>(static_cast<double>(t) - target_total.max - __builtin_log(target_total.sum));
}

template <typename T>
static void ensemble_sample(const SampleArgs& args) {
  int64_t vocab = args.vocab, blocks = sample_blocks(vocab);
  int threads = threads_for(args.rows * vocab * 4);
  threads = threads < kMostParts ? threads : kMostParts;
  bool split = args.rows < threads;  // fewer rows than threads: threads share the blocks of each row
  int scratches = split ? 1 : threads;
  int64_t floats = (scratch_floats(vocab) + 15) / 16 * 16;
  float* memory = static_cast<float*>(workspace(static_cast<size_t>(floats * scratches) * sizeof(float)));
  Counter rows{0};
  int invalid = 0;
  Plan plan_of_row;
  Part parts[kMostParts];
  parallel(threads, [&](Team& team) {
    RowScratch scratch = scratch_at(memory + (split ? 0 : team.index) * floats, vocab);
    int64_t begin = 0, end = args.rows;
    while (split || take(rows, args.rows, team.size, begin, end)) {
      for (int64_t row = begin; row < end; row++) {
        RowInput<T> in = row_input<T>(args, row);
        float heat = effective_temperature(args.temperature[row]);
        bool with_target = in.pairs > 0 && !args.target_is_combined;
        bool keep_target = with_target && args.nucleus_target;
        Part own{split ? share_of(blocks, 1, team.index, team.size) : Share{0, blocks}, 0, {}};
        bool valid = true;
        for (int64_t b = own.share.begin; b < own.share.end; b++)
          valid &= visit_block(in, vocab, b, heat, heat != 1.0f, with_target, keep_target, scratch);
        if (!split) {
          Plan plan = plan_row(args, row, valid, with_target, scratch);
          if (plan.possible) search_part(plan, vocab, scratch, own);
          finish_row<T>(args, row, plan, with_target, scratch, &own, 1);
          continue;
        }
        // Each thread searches the scores it wrote: in another core's cache they would cost more than to compute.
        if (!valid) __atomic_store_n(&invalid, 1, __ATOMIC_RELAXED);
        team.barrier();
        if (team.index == 0) plan_of_row = plan_row(args, row, __atomic_load_n(&invalid, __ATOMIC_RELAXED) == 0, with_target, scratch);
        team.barrier();
        if (plan_of_row.possible) search_part(plan_of_row, vocab, scratch, own);
        parts[team.index] = own;
        team.barrier();
        if (team.index == 0) {
          finish_row<T>(args, row, plan_of_row, with_target, scratch, parts, team.size);
          __atomic_store_n(&invalid, 0, __ATOMIC_RELAXED);
        }
        team.barrier();
      }
      if (split) break;
    }
  });
}

template <typename T>
static void combine(const SampleArgs& args) {
  int64_t vocab = args.vocab, blocks = sample_blocks(vocab);
  int threads = threads_for(args.rows * vocab);
  Counter work{0};
  parallel(threads, [&](Team& team) {
    int64_t begin, end;
    while (take(work, args.rows * blocks, team.size, begin, end)) {
      for (int64_t item = begin; item < end; item++) {
        int64_t row = item / blocks, first = item % blocks * kSampleBlock;
        int64_t last = first + kSampleBlock < vocab ? first + kSampleBlock : vocab;
        RowInput<T> in = row_input<T>(args, row);
        for (int64_t i = first; i < last; i += 16) {
          V16 z = load_n(in.target + i, last - i);
          store_n(args.out + row * args.out_stride + i, combined_at(in, i, last - i, z), last - i);
        }
      }
    }
  });
}
