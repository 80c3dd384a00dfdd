#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "layers.h"

namespace {
using namespace ensemble_decode;

const char* const op = "decoder_layer";

const void* vector_data(const char* name, const std::optional<Tensor>& t, ScalarType dtype, int64_t size) {
  if (!t) return nullptr;
  check_tensor(op, name, *t, dtype, {size});
  check_contiguous(op, name, *t);
  return t->const_data_ptr();
}

int64_t groups_of(int64_t columns) { return (columns + kGroupColumns - 1) / kGroupColumns; }

Tensor decoder_layer(const Tensor& hidden, const Tensor& cos, const Tensor& sin, const Tensor& norm1,
                     const Tensor& norm2, const Tensor& qkv, const std::optional<Tensor>& qkv_bias, const Tensor& o,
                     const std::optional<Tensor>& o_bias, const Tensor& gate_up, const Tensor& down,
                     const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, std::vector<Tensor> lora,
                     const std::optional<Tensor>& adapter, Tensor k_cache, Tensor v_cache, const Tensor& query_start,
                     const Tensor& context_len, const Tensor& block_table, int64_t num_heads, int64_t num_kv_heads,
                     int64_t head_dim, int64_t intermediate, double eps, double weight_offset, double scale,
                     int64_t activation, std::vector<Tensor> scales) {
  check(hidden.dim() == 2, op, "hidden is ", hidden, ", it must be [tokens, width]");
  int64_t tokens = hidden.size(0), width = hidden.size(1), q_width = num_heads * head_dim, kv_width = num_kv_heads * head_dim;
  ScalarType dtype = hidden.scalar_type();
  LayerArgs args{};
  args.dtype = dtype_of(op, "hidden", hidden);
  check_contiguous(op, "hidden", hidden);
  check(activation >= 0 && activation <= 2, op,
        "activation is ", activation, ", it must be 0 (silu), 1 (gelu_tanh) or 2 (gelu)");
  check(head_dim <= 1024, op, "head_dim is ", head_dim, ", it must be at most 1024");
  args.paging = check_paging(op, k_cache, v_cache, query_start, context_len, block_table, dtype, tokens, num_heads,
                             num_kv_heads, head_dim, scale);

  check(cos.dim() == 2 && cos.size(1) <= head_dim && cos.size(1) % 2 == 0, op,
        "cos is ", cos, ", it must be [tokens, rotary_dim], rotary_dim even and at most head_dim");
  ScalarType rotary = cos.scalar_type();
  check(rotary == dtype || rotary == ScalarType::Float, op, "cos and sin must be of hidden's dtype or float32");
  check_tensor(op, "cos", cos, rotary, {tokens, cos.size(1)});
  check_tensor(op, "sin", sin, rotary, {tokens, cos.size(1)});
  check_last_dense(op, "cos", cos);
  check(sin.stride(1) == cos.stride(1) && (tokens <= 1 || sin.stride(0) == cos.stride(0)), op,
        "cos and sin must have the same strides");
  args.cos = cos.const_data_ptr();
  args.sin = sin.const_data_ptr();
  args.rotary_dim = cos.size(1);
  args.rotary_stride = cos.stride(0);
  args.rotary_float32 = rotary == ScalarType::Float;

  args.hidden = hidden.const_data_ptr();
  args.width = width;
  args.intermediate = intermediate;
  check(scales.empty() || scales.size() == 4, op,
        "scales has ", static_cast<int64_t>(scales.size()), " tensors, it must have 0, or 4: of qkv, o, gate_up, down");
  auto weight = [&](const char* name, const Tensor& packed, int linear, int64_t in_features, int64_t groups) {
    const Tensor* scale = scales.empty() ? nullptr : &scales[static_cast<size_t>(linear)];
    return check_packed(op, name, packed, scale, dtype, in_features, groups, args.scales[linear]);
  };
  args.norm1 = vector_data("norm1", norm1, dtype, width);
  args.norm2 = vector_data("norm2", norm2, dtype, width);
  args.qkv = weight("qkv", qkv, 0, width, groups_of(q_width + 2 * kv_width));
  args.qkv_bias = vector_data("qkv_bias", qkv_bias, dtype, q_width + 2 * kv_width);
  args.o = weight("o", o, 1, q_width, groups_of(width));
  args.o_bias = vector_data("o_bias", o_bias, dtype, width);
  args.gate_up = weight("gate_up", gate_up, 2, width, (intermediate + 15) / 16);
  args.down = weight("down", down, 3, intermediate, groups_of(width));
  args.q_norm = vector_data("q_norm", q_norm, dtype, head_dim);
  args.k_norm = vector_data("k_norm", k_norm, dtype, head_dim);
  args.eps = static_cast<float>(eps);
  args.weight_offset = static_cast<float>(weight_offset);
  args.activation = static_cast<Activation>(activation);

  Lora adapters[4];
  int64_t qkv_ends[] = {q_width, q_width + kv_width, q_width + 2 * kv_width}, o_ends[] = {width};
  int64_t gate_up_ends[] = {intermediate, 2 * intermediate}, down_ends[] = {width};
  if (adapter && !lora.empty()) {
    check(lora.size() == 8, op,
          "lora has ", lora.size(), " tensors, it must have 0, or 8: a, b of qkv, o, gate_up, down");
    int64_t count = check_lora(op, lora[0], lora[1], dtype, width, qkv_ends, 3, adapters[0]);
    int64_t others[] = {check_lora(op, lora[2], lora[3], dtype, q_width, o_ends, 1, adapters[1]),
                        check_lora(op, lora[4], lora[5], dtype, width, gate_up_ends, 2, adapters[2]),
                        check_lora(op, lora[6], lora[7], dtype, intermediate, down_ends, 1, adapters[3])};
    for (int64_t other : others)
      check(other == count, op, "the tensors of lora must hold the same number of adapters");
    args.lora = adapters;
    args.adapter = check_adapter(op, *adapter, tokens, count);
  }
  Tensor out = torch::stable::new_empty(hidden, {tokens, width});
  args.out = out.mutable_data_ptr();
  if (tokens > 0) kernels().decoder_layer(args);
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ensemble_decode, m) {
  m.def(
      "decoder_layer(Tensor hidden, Tensor cos, Tensor sin, Tensor norm1, Tensor norm2, Tensor qkv, Tensor? qkv_bias, "
      "Tensor o, Tensor? o_bias, Tensor gate_up, Tensor down, Tensor? q_norm, Tensor? k_norm, Tensor[] lora, "
      "Tensor? adapter, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor query_start, Tensor context_len, "
      "Tensor block_table, int num_heads, int num_kv_heads, int head_dim, int intermediate, float eps, "
      "float weight_offset, float scale, int activation, Tensor[] scales) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ensemble_decode, CPU, m) { m.impl("decoder_layer", TORCH_BOX(&decoder_layer)); }
