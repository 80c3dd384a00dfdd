// What the bindings of the layer operators share: checks that name the tensor, its value and what is allowed.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "../cpu/layers.h"

namespace ensemble_decode {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string text(const char* part) { return part; }
inline std::string text(int64_t part) { return std::to_string(part); }
inline std::string text(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string s = "[";
  for (size_t i = 0; i < sizes.size(); i++) s += (i ? ", " : "") + (sizes[i] < 0 ? "any" : std::to_string(sizes[i]));
  return s + "]";
}
inline std::string text(const Tensor& part) { return text(part.sizes()); }
inline std::string text(const std::string& part) { return part; }
inline std::string shape_of(const Tensor& t) { return text(t); }

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }
template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  fail(std::string(op) + ": " + (text(parts) + ...));
}

// The parts of the message (tensors print their shape) become text only where a check fails: a layer makes some forty.
template <typename... Parts>
inline void check(bool ok, const char* op, const Parts&... parts) {
  if (!ok) fail(op, parts...);
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: fail(op, name, " must be float32, bfloat16 or float16");
  }
}

// A dense tensor of a given dtype and, where not negative, of given sizes.
inline void check_tensor(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                         std::initializer_list<int64_t> sizes) {
  check(t.is_cpu(), op, name, " must be on the CPU");
  check(t.scalar_type() == dtype, op, name, " has another dtype than this operator needs of it");
  auto actual = t.sizes();
  bool same = actual.size() == sizes.size();
  const int64_t* expected = sizes.begin();
  for (size_t i = 0; same && i < sizes.size(); i++) same = expected[i] < 0 || actual[i] == expected[i];
  check(same, op, name, " is ", t, ", it must be ", torch::headeronly::IntHeaderOnlyArrayRef(expected, sizes.size()));
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  check(t.is_contiguous(), op, name, " must be contiguous");
}

inline void check_last_dense(const char* op, const char* name, const Tensor& t) {
  int64_t last = t.dim() - 1;
  check(t.size(last) <= 1 || t.stride(last) == 1, op, name, " must be contiguous in its last dimension");
}

// The data of a packed weight of `groups` groups of columns: of the layer's dtype, or int8 where there are scales,
// whose data `scale_data` then points to.
const void* check_packed(const char* op, const char* name, const Tensor& packed, const Tensor* scale, ScalarType dtype,
                         int64_t in_features, int64_t groups, const float*& scale_data);

// Rows of the last dimension: [..., width] as [rows, width] with one stride between rows.
inline Tensor as_rows(const Tensor& t) {
  if (t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1)) return t;
  Tensor dense = t.is_contiguous() ? t : torch::stable::contiguous(t);
  int64_t width = t.size(t.dim() - 1);
  return torch::stable::view(dense, {width == 0 ? 0 : dense.numel() / width, width});
}

// Fills `lora` from the packed factors of a stack of adapters; returns how many there are.
int64_t check_lora(const char* op, const Tensor& a, const Tensor& b, ScalarType dtype, int64_t in_features,
                   const int64_t* segment_ends, int num_segments, Lora& lora);

// The rows' adapters: int32, -1 or an index below `adapters`.
const int32_t* check_adapter(const char* op, const Tensor& adapter, int64_t rows, int64_t adapters);

// The paged layout of a call, checked: every block that will be touched exists.
Paging check_paging(const char* op, const Tensor& k_cache, const Tensor& v_cache, const Tensor& query_start,
                    const Tensor& context_len, const Tensor& block_table, ScalarType dtype, int64_t tokens,
                    int64_t heads, int64_t kv_heads, int64_t head_dim, double scale);

}  // namespace ensemble_decode
