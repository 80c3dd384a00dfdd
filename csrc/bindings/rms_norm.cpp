#include <torch/csrc/stable/library.h>

#include "layers.h"

namespace {
using namespace ensemble_decode;

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_offset) {
  const char* op = "rms_norm";
  check(x.dim() >= 1, op, "x must have at least one dimension");
  DType dtype = dtype_of(op, "x", x);
  check_tensor(op, "weight", weight, x.scalar_type(), {x.size(x.dim() - 1)});
  check_contiguous(op, "weight", weight);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Tensor out = torch::stable::new_empty(x, sizes);
  Tensor rows = as_rows(x);
  RmsNormArgs args{};
  args.dtype = dtype;
  args.x = rows.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.rows = rows.size(0);
  args.x_stride = rows.stride(0);
  args.width = rows.size(1);
  args.eps = static_cast<float>(eps);
  args.weight_offset = static_cast<float>(weight_offset);
  if (args.rows > 0) kernels().rms_norm(args);
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ensemble_decode, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset=0.0) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ensemble_decode, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm)); }
