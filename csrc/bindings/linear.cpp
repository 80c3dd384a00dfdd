#include <torch/csrc/stable/library.h>

#include <optional>

#include "layers.h"

namespace ensemble_decode {

const void* check_packed(const char* op, const char* name, const Tensor& packed, const Tensor* scale, ScalarType dtype,
                         int64_t in_features, int64_t groups, const float*& scale_data) {
  if (scale)
    check_tensor(op, name, packed, ScalarType::Char, {groups, (in_features + 1) / 2 * 2, kGroupColumns});
  else if (dtype == ScalarType::BFloat16)
    check_tensor(op, name, packed, dtype, {groups, (in_features + 1) / 2, kGroupColumns, 2});
  else
    check_tensor(op, name, packed, dtype, {groups, in_features, kGroupColumns});
  check_contiguous(op, name, packed);
  scale_data = nullptr;
  if (scale) {
    std::string of = std::string("scale of ") + name;
    check_tensor(op, of.c_str(), *scale, ScalarType::Float, {groups * kGroupColumns});
    check_contiguous(op, of.c_str(), *scale);
    scale_data = static_cast<const float*>(scale->const_data_ptr());
  }
  return packed.const_data_ptr();
}

}  // namespace ensemble_decode

namespace {
using namespace ensemble_decode;

// [groups, in_features rounded up to two, 32].
Tensor pack_bytes(const Tensor& rows) {
  check(rows.is_cpu(), "pack_weight", "weight must be on the CPU");
  int64_t n = rows.size(0), k = rows.size(1), groups = (n + kGroupColumns - 1) / kGroupColumns;
  Tensor packed = torch::stable::new_empty(rows, {groups, (k + 1) / 2 * 2, kGroupColumns});
  pack_int8(static_cast<const int8_t*>(rows.const_data_ptr()), rows.stride(0), n, k,
            static_cast<int8_t*>(packed.mutable_data_ptr()));
  return packed;
}

// [groups, steps, 32] with the elements of a step as a fourth dimension where there are two (bfloat16).
Tensor pack(const Tensor& weight) {
  check(weight.dim() == 2, "pack_weight", "weight is ", weight, ", it must be [out_features, in_features]");
  if (weight.scalar_type() == ScalarType::Char) return pack_bytes(as_rows(weight));
  DType dtype = dtype_of("pack_weight", "weight", weight);
  Tensor rows = as_rows(weight);
  int64_t n = rows.size(0), k = rows.size(1), per_step = elements_per_step(dtype);
  int64_t groups = (n + kGroupColumns - 1) / kGroupColumns, steps = (k + per_step - 1) / per_step;
  Tensor packed = per_step == 1 ? torch::stable::new_empty(weight, {groups, steps, kGroupColumns})
                                : torch::stable::new_empty(weight, {groups, steps, kGroupColumns, per_step});
  pack_weight(dtype, rows.const_data_ptr(), rows.stride(0), n, k, packed.mutable_data_ptr());
  return packed;
}

Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t out_features,
              bool out_fp32, const std::optional<Tensor>& scale) {
  const char* op = "linear";
  check(x.dim() >= 1, op, "x must have at least one dimension");
  int64_t k = x.size(x.dim() - 1), groups = (out_features + kGroupColumns - 1) / kGroupColumns;
  DType dtype = dtype_of(op, "x", x);
  LinearArgs args{};
  args.packed =
      check_packed(op, "packed", packed, scale ? &*scale : nullptr, x.scalar_type(), k, groups, args.scale);
  if (bias) {
    check_tensor(op, "bias", *bias, x.scalar_type(), {out_features});
    check_contiguous(op, "bias", *bias);
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  Tensor out = torch::stable::new_empty(x, sizes, out_fp32 ? ScalarType::Float : x.scalar_type());
  Tensor rows = as_rows(x);
  args.dtype = dtype;
  args.x = rows.const_data_ptr();
  args.rows = rows.size(0);
  args.x_stride = rows.stride(0);
  args.in_features = k;
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.out_features = out_features;
  args.out = out.mutable_data_ptr();
  args.out_float32 = out_fp32;
  if (args.rows > 0) kernels().linear(args);
  return out;
}

std::string cpu_variant() { return kernels().name; }
bool set_cpu_variant(std::string name) { return use_kernels(name.c_str()); }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ensemble_decode, m) {
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? bias, int out_features, bool out_fp32=False, Tensor? scale=None) -> "
      "Tensor");
  m.def("cpu_variant() -> str");
  m.def("set_cpu_variant(str name) -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(ensemble_decode, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack));
  m.impl("linear", TORCH_BOX(&linear));
}
STABLE_TORCH_LIBRARY_IMPL(ensemble_decode, CompositeExplicitAutograd, m) {
  m.impl("cpu_variant", TORCH_BOX(&cpu_variant));
  m.impl("set_cpu_variant", TORCH_BOX(&set_cpu_variant));
}
