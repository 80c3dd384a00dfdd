#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "layers.h"

namespace {
using namespace ensemble_decode;

constexpr int64_t kMaxPairs = 64;

std::string number(double x) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", x);
  return text;
}

// target [B, V], expert and anti_expert [P, B, V], alpha [B, P].
SampleArgs logits_args(const char* op, const Tensor& target, const std::optional<Tensor>& expert,
                       const std::optional<Tensor>& anti, const std::optional<Tensor>& alpha) {
  check(target.is_cpu(), op, "target must be on the CPU");
  check(target.dim() == 2, op, "target is " + shape_of(target) + ", it must be [batch, vocabulary]");
  check_last_dense(op, "target", target);
  SampleArgs args{};
  args.dtype = dtype_of(op, "target", target);
  args.target = target.const_data_ptr();
  args.rows = target.size(0);
  args.vocab = target.size(1);
  args.target_stride = target.stride(0);
  check(args.vocab >= 1 && args.vocab < (int64_t{1} << 31), op, "target has an empty or too large vocabulary");
  if (!expert) {
    check(!anti, op, "anti_expert is given without expert");
    return args;
  }
  check(alpha.has_value(), op, "alpha is None, it must be [batch, pairs] where there are experts");
  check(expert->dim() == 3, op, "expert is " + shape_of(*expert) + ", it must be [pairs, batch, vocabulary]");
  args.pairs = expert->size(0);
  check(args.pairs <= kMaxPairs, op, "expert has " + std::to_string(args.pairs) + " pairs, at most 64 are allowed");
  check_tensor(op, "expert", *expert, target.scalar_type(), {args.pairs, args.rows, args.vocab});
  check_last_dense(op, "expert", *expert);
  args.expert = expert->const_data_ptr();
  args.expert_pair_stride = expert->stride(0);
  args.expert_stride = expert->stride(1);
  if (anti) {
    check_tensor(op, "anti_expert", *anti, target.scalar_type(), {args.pairs, args.rows, args.vocab});
    check_last_dense(op, "anti_expert", *anti);
    args.anti = anti->const_data_ptr();
    args.anti_pair_stride = anti->stride(0);
    args.anti_stride = anti->stride(1);
  }
  check_tensor(op, "alpha", *alpha, ScalarType::Float, {args.rows, args.pairs});
  check_last_dense(op, "alpha", *alpha);
  args.alpha = static_cast<const float*>(alpha->const_data_ptr());
  args.alpha_stride = alpha->stride(0);
  return args;
}

template <typename T>
const T* per_row(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t rows) {
  check_tensor(op, name, t, dtype, {rows});
  check_contiguous(op, name, t);
  return static_cast<const T*>(t.const_data_ptr());
}

void check_values(const char* op, const SampleArgs& args) {
  for (int64_t row = 0; row < args.rows; row++) {
    std::string at = "[" + std::to_string(row) + "] is ";
    float t = args.temperature[row], p = args.top_p[row], m = args.min_p[row];
    if (!(t >= 0.0f) || !std::isfinite(t)) fail(op + (": temperature" + at) + number(t) + ", allowed is 0 or more");
    if (!(p > 0.0f && p <= 1.0f)) fail(op + (": top_p" + at) + number(p) + ", allowed is above 0, at most 1");
    if (!(m >= 0.0f && m < 1.0f)) fail(op + (": min_p" + at) + number(m) + ", allowed is at least 0, below 1");
    if (args.top_k[row] < 0)
      fail(op + (": top_k" + at) + std::to_string(args.top_k[row]) + ", allowed is 0 (off) or more");
    for (int64_t pair = 0; pair < args.pairs; pair++) {
      float a = args.alpha[row * args.alpha_stride + pair];
      if (!std::isfinite(a)) fail(op + (": alpha" + at) + number(a) + ", a finite number is allowed");
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> ensemble_sample(const Tensor& target, const std::optional<Tensor>& expert,
                                                   const std::optional<Tensor>& anti,
                                                   const std::optional<Tensor>& alpha, const Tensor& temperature,
                                                   const Tensor& top_k, const Tensor& top_p, const Tensor& min_p,
                                                   const Tensor& seed, const Tensor& position, bool nucleus_target,
                                                   bool target_is_combined) {
  const char* op = "ensemble_sample";
  SampleArgs args = logits_args(op, target, expert, anti, alpha);
  check(!target_is_combined || !expert, op, "target_is_combined is true, but experts are given");
  check(!target_is_combined || !nucleus_target, op,
        "nucleus is 'target', which needs the target's own logits: target_is_combined must be false");
  args.temperature = per_row<float>(op, "temperature", temperature, ScalarType::Float, args.rows);
  args.top_k = per_row<int32_t>(op, "top_k", top_k, ScalarType::Int, args.rows);
  args.top_p = per_row<float>(op, "top_p", top_p, ScalarType::Float, args.rows);
  args.min_p = per_row<float>(op, "min_p", min_p, ScalarType::Float, args.rows);
  args.seed = per_row<int64_t>(op, "seed", seed, ScalarType::Long, args.rows);
  args.position = per_row<int64_t>(op, "position", position, ScalarType::Long, args.rows);
  check_values(op, args);
  args.nucleus_target = nucleus_target;
  args.target_is_combined = target_is_combined;
  Tensor token = torch::stable::new_empty(target, {args.rows}, ScalarType::Long);
  Tensor logprob = torch::stable::new_empty(target, {args.rows}, ScalarType::Float);
  Tensor target_logprob = torch::stable::new_empty(target, {args.rows}, ScalarType::Float);
  args.token = static_cast<int64_t*>(token.mutable_data_ptr());
  args.logprob = static_cast<float*>(logprob.mutable_data_ptr());
  args.target_logprob = static_cast<float*>(target_logprob.mutable_data_ptr());
  if (args.rows > 0) kernels().ensemble_sample(args);
  return {token, logprob, target_logprob};
}

void combine_out(const Tensor& target, const std::optional<Tensor>& expert, const std::optional<Tensor>& anti,
                 const std::optional<Tensor>& alpha, Tensor out) {
  const char* op = "combine";
  SampleArgs args = logits_args(op, target, expert, anti, alpha);
  check_tensor(op, "out", out, ScalarType::Float, {args.rows, args.vocab});
  check_last_dense(op, "out", out);
  args.out = static_cast<float*>(out.mutable_data_ptr());
  args.out_stride = out.stride(0);
  if (args.rows > 0) kernels().combine(args);
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ensemble_decode, m) {
  m.def(
      "ensemble_sample(Tensor target, Tensor? expert, Tensor? anti_expert, Tensor? alpha, Tensor temperature, "
      "Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor position, bool nucleus_target, "
      "bool target_is_combined) -> (Tensor, Tensor, Tensor)");
  m.def(
      "combine_out(Tensor target, Tensor? expert, Tensor? anti_expert, Tensor? alpha, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(ensemble_decode, CPU, m) {
  m.impl("ensemble_sample", TORCH_BOX(&ensemble_sample));
  m.impl("combine_out", TORCH_BOX(&combine_out));
}
