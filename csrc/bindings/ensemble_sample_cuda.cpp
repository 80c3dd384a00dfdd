// ensemble_decode::ensemble_sample_cuda: the schema of ensemble_sample, by the kernels of csrc/cuda. Compiled only where the
// CUDA toolkit is (setup.py). Values of the parameters are not checked: that would wait for the device.
#if defined(ENSEMBLE_DECODE_WITH_CUDA)
#include "../cuda/ensemble_sample.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "layers.h"

namespace {
using namespace ensemble_decode;

constexpr const char* kOp = "ensemble_sample_cuda";
constexpr int64_t kMostPairs = 64;

void check_same_device(const char* name, const Tensor& t, const Tensor& target) {
  check(t.is_cuda() && t.get_device_index() == target.get_device_index(), kOp, name, " must be on the target's device");
}

void check_shape(const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  check(t.scalar_type() == dtype, kOp, name, " has another dtype than this operator needs of it");
  torch::headeronly::IntHeaderOnlyArrayRef expected(sizes.begin(), sizes.size());
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); i++) same = t.size(static_cast<int64_t>(i)) == expected[i];
  check(same, kOp, name, " is ", t, ", it must be ", expected);
  check_last_dense(kOp, name, t);
}

template <typename V>
const V* per_row(const char* name, const Tensor& t, ScalarType dtype, const Tensor& target) {
  check_same_device(name, t, target);
  check_shape(name, t, dtype, {target.size(0)});
  return static_cast<const V*>(t.const_data_ptr());
}

void set_experts(SampleArgs& args, const Tensor& target, const Tensor& expert, const std::optional<Tensor>& anti,
                 const std::optional<Tensor>& alpha) {
  check(alpha.has_value(), kOp, "alpha is None, it must be [batch, pairs] where there are experts");
  check(expert.dim() == 3, kOp, "expert is ", expert, ", it must be [pairs, batch, vocabulary]");
  args.pairs = expert.size(0);
  check(args.pairs <= kMostPairs, kOp, "expert has ", args.pairs, " pairs, at most 64 are allowed");
  check_same_device("expert", expert, target);
  check_shape("expert", expert, target.scalar_type(), {args.pairs, args.rows, args.vocab});
  args.expert = expert.const_data_ptr();
  args.expert_pair_stride = expert.stride(0);
  args.expert_stride = expert.stride(1);
  if (anti) {
    check_same_device("anti_expert", *anti, target);
    check_shape("anti_expert", *anti, target.scalar_type(), {args.pairs, args.rows, args.vocab});
    args.anti = anti->const_data_ptr();
    args.anti_pair_stride = anti->stride(0);
    args.anti_stride = anti->stride(1);
  }
  check_same_device("alpha", *alpha, target);
  check_shape("alpha", *alpha, ScalarType::Float, {args.rows, args.pairs});
  args.alpha = static_cast<const float*>(alpha->const_data_ptr());
  args.alpha_stride = alpha->stride(0);
}

void check_cuda(cudaError_t error) { check(error == cudaSuccess, kOp, cudaGetErrorString(error)); }

std::tuple<Tensor, Tensor, Tensor> ensemble_sample_cuda(
    const Tensor& target, const std::optional<Tensor>& expert, const std::optional<Tensor>& anti,
    const std::optional<Tensor>& alpha, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
    const Tensor& min_p, const Tensor& seed, const Tensor& position, bool nucleus_target, bool target_is_combined) {
  check(target.is_cuda(), kOp, "target must be on a CUDA device");
  check(target.dim() == 2, kOp, "target is ", target, ", it must be [batch, vocabulary]");
  check_last_dense(kOp, "target", target);
  check(target.size(1) >= 1 && target.size(1) < (int64_t{1} << 30), kOp, "target has an empty or too large vocabulary");
  check(target.size(0) < (int64_t{1} << 27), kOp, "target has too many rows");
  check(expert || !anti, kOp, "anti_expert is given without expert");
  check(!target_is_combined || !expert, kOp, "target_is_combined is true, but experts are given");
  check(!target_is_combined || !nucleus_target, kOp,
        "nucleus is 'target', which needs the target's own logits: target_is_combined must be false");
  SampleArgs args{};
  args.dtype = dtype_of(kOp, "target", target);
  args.target = target.const_data_ptr();
  args.rows = target.size(0);
  args.vocab = target.size(1);
  args.target_stride = target.stride(0);
  if (expert) set_experts(args, target, *expert, anti, alpha);
  args.temperature = per_row<float>("temperature", temperature, ScalarType::Float, target);
  args.top_k = per_row<int32_t>("top_k", top_k, ScalarType::Int, target);
  args.top_p = per_row<float>("top_p", top_p, ScalarType::Float, target);
  args.min_p = per_row<float>("min_p", min_p, ScalarType::Float, target);
  args.seed = per_row<int64_t>("seed", seed, ScalarType::Long, target);
  args.position = per_row<int64_t>("position", position, ScalarType::Long, target);
  args.nucleus_target = nucleus_target;
  args.target_is_combined = target_is_combined;
  torch::stable::accelerator::DeviceGuard guard(target.get_device_index());
  Tensor token = torch::stable::new_empty(target, {args.rows}, ScalarType::Long);
  Tensor logprob = torch::stable::new_empty(target, {args.rows}, ScalarType::Float);
  Tensor target_logprob = torch::stable::new_empty(target, {args.rows}, ScalarType::Float);
  args.token = static_cast<int64_t*>(token.mutable_data_ptr());
  args.logprob = static_cast<float*>(logprob.mutable_data_ptr());
  args.target_logprob = static_cast<float*>(target_logprob.mutable_data_ptr());
  cuda::Plan plan;
  check_cuda(cuda::plan_ensemble_sample(args, &plan));
  // torch's allocator gives it to nobody else before this stream is done with it.
  Tensor workspace =
      torch::stable::new_empty(target, {static_cast<int64_t>((plan.workspace_bytes + 3) / 4)}, ScalarType::Float);
  auto stream = torch::stable::accelerator::getCurrentStream(target.get_device_index()).nativeHandle();
  check_cuda(cuda::ensemble_sample(args, plan, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(stream)));
  return {token, logprob, target_logprob};
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ensemble_decode, m) {
  m.def(
      "ensemble_sample_cuda(Tensor target, Tensor? expert, Tensor? anti_expert, Tensor? alpha, Tensor temperature, "
      "Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor position, bool nucleus_target, "
      "bool target_is_combined) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(ensemble_decode, CUDA, m) { m.impl("ensemble_sample_cuda", TORCH_BOX(&ensemble_sample_cuda)); }
#endif
