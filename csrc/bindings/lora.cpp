#include <torch/csrc/stable/library.h>

#include <vector>

#include "layers.h"

namespace ensemble_decode {

int64_t check_lora(const char* op, const Tensor& a, const Tensor& b, ScalarType dtype, int64_t in_features,
                   const int64_t* segment_ends, int num_segments, Lora& lora) {
  int64_t per_step = dtype == ScalarType::BFloat16 ? 2 : 1, dims = per_step == 2 ? 5 : 4;
  for (const Tensor* t : {&a, &b})
    check(t->dim() == dims, op, "lora factors must come from pack_lora, one is ", *t);
  int64_t adapters = b.size(0), steps = b.size(2), out_features = segment_ends[num_segments - 1];
  int64_t low_groups = (num_segments * steps * per_step + 15) / 16, groups = (out_features + 15) / 16;
  int64_t in_steps = (in_features + per_step - 1) / per_step;
  if (per_step == 2) {
    check_tensor(op, "packed b", b, dtype, {adapters, groups, steps, 16, 2});
    check_tensor(op, "packed a", a, dtype, {adapters, low_groups, in_steps, 16, 2});
  } else {
    check_tensor(op, "packed b", b, dtype, {adapters, groups, steps, 16});
    check_tensor(op, "packed a", a, dtype, {adapters, low_groups, in_steps, 16});
  }
  check_contiguous(op, "a", a);
  check_contiguous(op, "b", b);
  lora.a = a.const_data_ptr();
  lora.b = b.const_data_ptr();
  lora.rank = steps * per_step;
  lora.in_features = in_features;
  lora.out_features = out_features;
  lora.segment_ends = segment_ends;
  lora.num_segments = num_segments;
  return adapters;
}

const int32_t* check_adapter(const char* op, const Tensor& adapter, int64_t rows, int64_t adapters) {
  check_tensor(op, "adapter", adapter, ScalarType::Int, {rows});
  check_contiguous(op, "adapter", adapter);
  const int32_t* index = static_cast<const int32_t*>(adapter.const_data_ptr());
  for (int64_t r = 0; r < rows; r++)
    if (index[r] < -1 || index[r] >= adapters)
      fail(op, "adapter[", r, "] is ", index[r],
           ", it must be -1 (none) or an index below ", adapters);
  return index;
}

}  // namespace ensemble_decode

namespace {
using namespace ensemble_decode;

void lora_(Tensor y, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& adapter,
           std::vector<int64_t> segments) {
  const char* op = "lora_";
  check(!segments.empty(), op, "segments is empty, it must list the output width of each merged linear");
  int64_t out_features = 0;
  for (int64_t& width : segments) {
    check(width > 0, op, "segments holds ", width, ", every width must be positive");
    width = out_features += width;
  }
  check(x.dim() == 2, op, "x is ", x, ", it must be [tokens, in_features]");
  LoraArgs args{};
  args.dtype = dtype_of(op, "x", x);
  args.rows = x.size(0);
  check_tensor(op, "y", y, x.scalar_type(), {args.rows, out_features});
  check_last_dense(op, "y", y);
  check_last_dense(op, "x", x);
  int64_t adapters = check_lora(op, a, b, x.scalar_type(), x.size(1), segments.data(),
                                static_cast<int>(segments.size()), args.lora);
  args.adapter = check_adapter(op, adapter, args.rows, adapters);
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.x_stride = x.stride(0);
  args.y_stride = y.stride(0);
  if (args.rows > 0) kernels().lora(args);
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ensemble_decode, m) {
  m.def("lora_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor adapter, int[] segments) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(ensemble_decode, CPU, m) { m.impl("lora_", TORCH_BOX(&lora_)); }
