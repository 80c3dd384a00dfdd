// ensemble_sample and combine on a CPU: one read of the logits, then Gumbel-max and a check (see docs of the contract).
//
// A row is cut into blocks of 256 tokens. One visit of a block reads its logits, writes c = z + sum of alpha (z+ - z-)
// to a scratch row, and leaves the block's maximum and its sum of exponentials (relative to that maximum). What follows
// touches only tokens that can be kept: none below a bound that no kept token can lie under. Only those are divided by
// the temperature: c / T rises with c, so maxima and bounds of s are those of c. Blocks are the unit that threads share,
// and every sum over blocks goes in their order, so no result depends on the number of threads.

// What every c (or z) reaches whose quotient by T is at least `bound`: a little less than bound * T.
static inline float undivided(float bound, float heat) {
  if (heat == 1.0f) return bound;
  float product = bound * heat;
  // Quotients are rounded by 2^-24 of themselves, and by 2^-150 where they are subnormal.
  product = product - (product < 0.0f ? -product : product) * 0x1p-20f - heat * 0x1p-148f - 0x1p-126f;
  return product > -kLargestFloat ? product : -kLargestFloat;
}

// Tokens in the blocks of `share` whose c (or z, with the target's nucleus) is at least `bound`, in the order of their
// ids, laid down from the share's first token on, and divided by T. -1 when there are more than `most`.
static inline int64_t gather(const RowScratch& row, Share share, bool by_target, int64_t vocab, float bound, float heat,
                             int64_t most) {
  int64_t count = 0, first = share.begin * kSampleBlock;
  V16 least = set1(bound), divisor = set1(heat);
  const float* raw = by_target ? row.target : row.combined;
  const float* maxima = by_target ? row.of_target.max : row.of_combined.max;
  int32_t* id = row.id + first;
  float *filter = row.filter + first, *score = row.score + first;
  for (int64_t b = share.begin; b < share.end; b++) {
    if (!(maxima[b] >= bound)) continue;
    if (count > most) return -1;
    int64_t begin = b * kSampleBlock, end = begin + kSampleBlock < vocab ? begin + kSampleBlock : vocab;
    for (int64_t i = begin; i < end; i += 16) {
      V16 x = load(raw + i);
      unsigned mask = mask_le(least, x);
      // Sixteen lanes are stored, the chosen ones first: never beyond the tokens that were looked at.
      store_ids(id + count, static_cast<int32_t>(i), mask);
      store_chosen(filter + count, x, mask);
      if (by_target) store_chosen(score + count, load(row.combined + i), mask);
      count += __builtin_popcount(mask);
    }
  }
  if (heat == 1.0f) return count;
  for (int64_t i = 0; i < count; i += 16) {
    store_n(filter + i, load(filter + i) / divisor, count - i);
    if (by_target) store_n(score + i, load(score + i) / divisor, count - i);
  }
  return count;
}

// exp(f - max) of every candidate; returns the sum of those with f >= least.
static inline double weigh(const RowScratch& scratch, int64_t count, float max, float least) {
  V16 top = set1(max), bound = set1(least), total = zero();
  for (int64_t i = 0; i < count; i += 16) {
    V16 f = load(scratch.filter + i), weight = exp(f - top);
    if (count - i < 16) weight = keep_below(weight, static_cast<int>(count - i), zero());
    store(scratch.mass + i, weight);
    total = total + where_greater(bound, f, zero(), weight);
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

// A bound of f that at least k tokens reach: the k-th largest block maximum. -largest where blocks are fewer than k.
static inline float top_k_bound(const float* maxima, int64_t blocks, int64_t k, float heat) {
  if (k > blocks) return -kLargestFloat;
  float bound = kth_largest(maxima, blocks, k) / heat;
  return bound > -kLargestFloat ? bound : -kLargestFloat;
}

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
static inline Best sample_dense(const RowScratch& scratch, Share share, int64_t vocab, const Total& total, float heat,
                                float bound, float above, NoiseKey key) {
  Best best;
  start(best, total.max);
  float u[kSampleBlock], from = undivided(bound > above ? bound : above, heat);
  from = from > -kLargestFloat ? from : -kLargestFloat;
  V16 top = set1(total.max), scale = set1(kLog2E), least = set1(from), divisor = set1(heat);
  for (int64_t b = share.begin; b < share.end; b++) {
    float block_max = scratch.of_combined.max[b];
    // The smallest u is 2^-33.
    if (!(block_max >= from)) continue;
    if (__builtin_expf(block_max / heat - total.max) < best.threshold * 0x1p-33f) continue;
    int64_t begin = b * kSampleBlock, end = begin + kSampleBlock < vocab ? begin + kSampleBlock : vocab;
    noise_of_block(begin, kSampleBlock, key, u);
    for (int64_t i = begin; i < end; i += 16) {
      V16 c = load(scratch.combined + i);
      unsigned mask = mask_le(load(u + (i - begin)) * set1(best.threshold), power_of_2_at_most_1((c / divisor - top) * scale));
      mask &= mask_le(least, c);
      while (mask) {
        int64_t token = i + __builtin_ctz(mask);
        mask &= mask - 1;
        float s = scratch.combined[token] / heat;
        if (s >= bound && s > above) offer(best, s, u[token - begin], token, token);
      }
    }
  }
  return best;
}

// The best of the candidates with least <= f and f > above. `weight` is exp(score - top).
static inline Best best_of(const RowScratch& scratch, int64_t count, const float* score, const float* weight,
                           float least, float above, float top, bool greedy) {
  Best best;
  start(best, top);
  V16 bound = set1(least), floor = set1(above), none = set1(NO_TOKEN);
  for (int64_t i = 0; i < count; i += 16) {
    V16 f = load(scratch.filter + i);
    unsigned mask = mask_le(bound, where_greater(f, floor, f, none));
    if (count - i < 16) mask &= (1u << (count - i)) - 1;
    if (!greedy) mask &= mask_le(load(scratch.noise + i) * set1(best.threshold), load(weight + i));
    while (mask) {
      int64_t at = i + __builtin_ctz(mask);
      mask &= mask - 1;
      if (!greedy) {
        offer(best, score[at], scratch.noise[at], scratch.id[at], at);
      } else if (score[at] > best.key) {
        best.key = score[at];
        best.token = scratch.id[at];
        best.at = at;
      }
    }
  }
  return best;
}

// The weight, exp(s - max), of all tokens with s > own.
static inline double mass_above(const RowScratch& scratch, int64_t vocab, const Total& total, float heat, float own) {
  double mass = 0.0;
  V16 top = set1(total.max), scale = set1(kLog2E), floor = set1(own), divisor = set1(heat);
  for (int64_t b = 0; b < sample_blocks(vocab); b++) {
    if (!(scratch.of_combined.max[b] / heat > own)) continue;
    int64_t begin = b * kSampleBlock, end = begin + kSampleBlock < vocab ? begin + kSampleBlock : vocab;
    V16 in_block = zero();
    for (int64_t i = begin; i < end; i += 16) {
      V16 s = load(scratch.combined + i) / divisor;
      in_block = in_block + where_greater(s, floor, power_of_2_at_most_1((s - top) * scale), zero());
    }
    mass += static_cast<double>(sum(in_block));
  }
  return mass;
}

static inline float factor_of(float heat) {
  float factor = kLog2E / heat;
  return factor < kLargestFloat ? factor : kLargestFloat;  // 0 times it must be 0
}

// What the sums over a row's blocks say about where its token can be: the same in every thread.
struct Plan {
  bool possible;  // the row has a valid sample
  bool by_target, greedy, use_k, may_be_dense, all;
  Total total, target_total, filter_total;
  float heat;  // T, or 1 for greedy rows
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
  plan.heat = effective_temperature(args.temperature[row]);
  plan.total = fold(scratch.of_combined, vocab, plan.heat);
  plan.possible = valid && plan.total.max > NO_TOKEN && plan.total.max <= kLargestFloat;
  if (!plan.possible) return plan;
  plan.target_total = with_target ? fold(scratch.of_target, vocab, plan.heat) : plan.total;
  plan.by_target = args.nucleus_target && with_target;  // without a pair the two distributions are one
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
    const float* maxima = plan.by_target ? scratch.of_target.max : scratch.of_combined.max;
    plan.bound = plan.higher = top_k_bound(maxima, blocks, k, plan.heat);
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
    part.best = sample_dense(scratch, part.share, vocab, plan.total, plan.heat, plan.bound, NO_TOKEN,
                             plan.key);
  else
    part.count = gather(scratch, part.share, plan.by_target, vocab, undivided(plan.higher, plan.heat), plan.heat,
                        plan.most);
}

// The parts' candidates one after another, in the order of their ids; -1 if one gave up.
static inline int64_t join_parts(const RowScratch& scratch, const Part* parts, int size, bool by_target) {
  int64_t count = 0;
  for (int i = 0; i < size; i++) {
    if (parts[i].count < 0) return -1;
    int64_t from = parts[i].share.begin * kSampleBlock;
    size_t bytes = static_cast<size_t>(parts[i].count) * 4;
    if (from != count) {
      __builtin_memmove(scratch.id + count, scratch.id + from, bytes);
      __builtin_memmove(scratch.filter + count, scratch.filter + from, bytes);
      if (by_target) __builtin_memmove(scratch.score + count, scratch.score + from, bytes);
    }
    count += parts[i].count;
  }
  return count;
}

static inline float log_share(float x, const Total& total) {
  return static_cast<float>(static_cast<double>(x) - total.max - __builtin_log(total.sum));
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
  bool by_target = plan.by_target, greedy = plan.greedy, use_k = plan.use_k;
  int64_t k = args.top_k[row];
  float p = args.top_p[row], min_p = args.min_p[row], least = plan.least, heat = plan.heat;
  NoiseKey key = plan.key;

  int64_t token = -1;
  if (greedy && !by_target) {  // the best token passes every filter
    for (int64_t b = 0; b < blocks && token < 0; b++) {
      if (scratch.of_combined.max[b] != total.raw) continue;
      int64_t i = b * kSampleBlock;
      while (scratch.combined[i] != total.raw) i++;
      token = i;
    }
  } else if (plan.all) {
    Best best = parts[0].best;
    for (int i = 1; i < size; i++)  // ids rise from part to part: the first of equals has the lowest
      if (parts[i].best.token >= 0 && (best.token < 0 || parts[i].best.key > best.key)) best = parts[i].best;
    token = best.token;
  } else {
    Share whole{0, blocks};
    int64_t count = join_parts(scratch, parts, size, by_target);
    if (count > 0) {
      double weight = weigh(scratch, count, filter_total.max, plan.higher);
      // If the tokens above the higher bound weigh p of all, no other token is kept.
      if (plan.higher > plan.bound && !(weight >= 1.0001 * p * filter_total.sum)) count = -1;
    }
    if (count < 0 || (count == 0 && plan.higher > plan.bound)) {
      count = gather(scratch, whole, by_target, vocab, undivided(plan.bound, heat), heat,
                     plan.may_be_dense ? vocab / 10 : vocab);
      if (count > 0) weigh(scratch, count, filter_total.max, plan.bound);
    }
    if (count < 0) {
      float above = NO_TOKEN;
      for (;;) {
        token = sample_dense(scratch, whole, vocab, total, heat, plan.bound, above, key).token;
        if (token < 0 || p >= 1.0f) break;
        float own = scratch.combined[token] / heat;
        if (mass_above(scratch, vocab, total, heat, own) < static_cast<double>(p) * total.sum) break;
        above = own;
      }
      count = 0;
    }
    const float *f = scratch.filter, *score = by_target ? scratch.score : f;
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
        if (f[i] >= least && score[i] > top) top = score[i];
      V16 score_top = set1(top);
      for (int64_t i = 0; i < count; i += 16) store(scratch.weight + i, exp(load(score + i) - score_top));
      weight = scratch.weight;
    }
    if (!greedy) noise_of(scratch.id, count, key, scratch.noise);
    float above = NO_TOKEN;  // candidates at or below it were found outside the nucleus
    while (count > 0) {
      Best best = best_of(scratch, count, score, weight, least, above, top, greedy);
      token = best.token;
      if (token < 0 || p >= 1.0f) break;
      // Kept by top-p iff the tokens strictly above weigh less than p of all.
      above = f[best.at];
      V16 floor = set1(above), mass = zero();
      for (int64_t i = 0; i < count; i += 16)
        mass = mass + where_greater(load(f + i), floor, load(scratch.mass + i), zero());
      if (static_cast<double>(sum(mass)) < static_cast<double>(p) * mass_total) break;
    }
  }
  if (token < 0) return;
  args.token[row] = token;
  args.logprob[row] = log_share(scratch.combined[token] / heat, total);
  if (args.target_is_combined) return;
  if (!with_target) {
    args.target_logprob[row] = args.logprob[row];
    return;
  }
  float z[16];
  store(z, load_n(static_cast<const T*>(args.target) + row * args.target_stride + token, 1));
  args.target_logprob[row] = log_share(z[0] / heat, target_total);
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
        bool with_target = in.pairs > 0 && !args.target_is_combined;
        float heat = effective_temperature(args.temperature[row]);
        Visit visit{heat, factor_of(heat), with_target, with_target && args.nucleus_target, false, true};
        Part own{split ? share_of(blocks, 1, team.index, team.size) : Share{0, blocks}, 0, {}};
        for (int64_t b = own.share.begin; b < own.share.end; b++) visit_block(in, vocab, b, visit, scratch);
        if (!split) {
          Plan plan = plan_row(args, row, visit.valid, with_target, scratch);
          if (plan.possible) search_part(plan, vocab, scratch, own);
          finish_row<T>(args, row, plan, with_target, scratch, &own, 1);
          continue;
        }
        // Each thread searches the scores it wrote: in another core's cache they would cost more than to compute.
        if (!visit.valid) __atomic_store_n(&invalid, 1, __ATOMIC_RELAXED);
        team.barrier();
        if (team.index == 0) {
          bool all_valid = __atomic_load_n(&invalid, __ATOMIC_RELAXED) == 0;
          plan_of_row = plan_row(args, row, all_valid, with_target, scratch);
        }
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
