#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <vector>

#include "layers.h"

namespace {
using namespace ensemble_decode;
using Tensors = std::vector<Tensor>;

const char* const op = "decoder_layers";

int64_t groups_of(int64_t columns) { return (columns + kGroupColumns - 1) / kGroupColumns; }

void check_count(const char* name, const Tensors& tensors, int64_t count, bool optional) {
  auto size = static_cast<int64_t>(tensors.size());
  check(size == count || (optional && size == 0), op, name, " has ", size, " tensors, it must have ",
        optional ? "0 or " : "", count);
}

// The vector of layer i, or null where a model has none.
const void* vector_data(const char* name, const Tensors& tensors, size_t i, ScalarType dtype, int64_t size) {
  if (tensors.empty()) return nullptr;
  check_tensor(op, name, tensors[i], dtype, {size});
  check_contiguous(op, name, tensors[i]);
  return tensors[i].const_data_ptr();
}

// The cache of a layer, which is like the first one's.
void* cache_data(const char* name, const Tensor& cache, const Tensor& first) {
  auto sizes = first.sizes();
  check(cache.dim() == 4, op, name, " is ", cache, ", it must be ", first);
  check_tensor(op, name, cache, first.scalar_type(), {sizes[0], sizes[1], sizes[2], sizes[3]});
  check_contiguous(op, name, cache);
  return const_cast<void*>(cache.const_data_ptr());
}

Tensor decoder_layers(const Tensor& hidden, const Tensor& cos, const Tensor& sin, Tensors norm1, Tensors norm2,
                      Tensors qkv, Tensors qkv_bias, Tensors o, Tensors o_bias, Tensors gate_up, Tensors down,
                      Tensors q_norm, Tensors k_norm, Tensors lora, const std::optional<Tensor>& adapter,
                      Tensors k_cache, Tensors v_cache, const Tensor& query_start, const Tensor& context_len,
                      const Tensor& block_table, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                      int64_t intermediate, double eps, double weight_offset, double scale, int64_t activation,
                      Tensors scales) {
  check(hidden.dim() == 2, op, "hidden is ", hidden, ", it must be [tokens, width]");
  int64_t tokens = hidden.size(0), width = hidden.size(1), q_width = num_heads * head_dim, kv_width = num_kv_heads * head_dim;
  auto count = static_cast<int64_t>(norm1.size());
  ScalarType dtype = hidden.scalar_type();
  check(count > 0, op, "norm1 has 0 tensors, it must have one for each layer");
  for (auto [name, tensors] : {std::pair{"norm2", &norm2}, {"qkv", &qkv}, {"o", &o}, {"gate_up", &gate_up},
                               {"down", &down}, {"k_cache", &k_cache}, {"v_cache", &v_cache}})
    check_count(name, *tensors, count, false);
  for (auto [name, tensors] :
       {std::pair{"qkv_bias", &qkv_bias}, {"o_bias", &o_bias}, {"q_norm", &q_norm}, {"k_norm", &k_norm}})
    check_count(name, *tensors, count, true);
  check_count("scales", scales, 4 * count, true);
  check_count("lora", lora, 8 * count, true);

  LayerArgs common{};
  DType element = dtype_of(op, "hidden", hidden);
  check_contiguous(op, "hidden", hidden);
  check(activation >= 0 && activation <= 2, op,
        "activation is ", activation, ", it must be 0 (silu), 1 (gelu_tanh) or 2 (gelu)");
  check(head_dim <= 1024, op, "head_dim is ", head_dim, ", it must be at most 1024");

  check(cos.dim() == 2 && cos.size(1) <= head_dim && cos.size(1) % 2 == 0, op,
        "cos is ", cos, ", it must be [tokens, rotary_dim], rotary_dim even and at most head_dim");
  ScalarType rotary = cos.scalar_type();
  check(rotary == dtype || rotary == ScalarType::Float, op, "cos and sin must be of hidden's dtype or float32");
  check_tensor(op, "cos", cos, rotary, {tokens, cos.size(1)});
  check_tensor(op, "sin", sin, rotary, {tokens, cos.size(1)});
  check_last_dense(op, "cos", cos);
  check(sin.stride(1) == cos.stride(1) && (tokens <= 1 || sin.stride(0) == cos.stride(0)), op,
        "cos and sin must have the same strides");
  common.cos = cos.const_data_ptr();
  common.sin = sin.const_data_ptr();
  common.rotary_dim = cos.size(1);
  common.rotary_stride = cos.stride(0);
  common.rotary_float32 = rotary == ScalarType::Float;
  common.hidden = hidden.const_data_ptr();
  common.width = width;
  common.intermediate = intermediate;
  common.eps = static_cast<float>(eps);
  common.weight_offset = static_cast<float>(weight_offset);
  common.activation = static_cast<Activation>(activation);
  Tensor out = torch::stable::new_empty(hidden, {tokens, width});
  common.out = out.mutable_data_ptr();

  bool adapted = adapter && !lora.empty();
  int64_t qkv_ends[] = {q_width, q_width + kv_width, q_width + 2 * kv_width}, o_ends[] = {width};
  int64_t gate_up_ends[] = {intermediate, 2 * intermediate}, down_ends[] = {width};
  std::vector<std::array<Lora, 4>> adapters(adapted ? norm1.size() : 0);
  int64_t num_adapters = -1;
  // What the tables say is checked once: every layer's cache has as many blocks as the first one's.
  common.paging = check_paging(op, k_cache[0], v_cache[0], query_start, context_len, block_table, dtype, tokens, num_heads,
                               num_kv_heads, head_dim, scale);
  std::vector<LayerArgs> layers(norm1.size(), common);
  for (size_t i = 0; i < layers.size(); i++) {
    LayerArgs& layer = layers[i];
    layer.paging.k_cache = cache_data("k_cache", k_cache[i], k_cache[0]);
    layer.paging.v_cache = cache_data("v_cache", v_cache[i], v_cache[0]);
    auto weight = [&](const char* name, const Tensor& packed, size_t linear, int64_t in_features, int64_t groups) {
      const Tensor* by = scales.empty() ? nullptr : &scales[4 * i + linear];
      return check_packed(op, name, packed, by, dtype, in_features, groups, layer.scales[linear]);
    };
    layer.norm1 = vector_data("norm1", norm1, i, dtype, width);
    layer.norm2 = vector_data("norm2", norm2, i, dtype, width);
    layer.qkv = weight("qkv", qkv[i], 0, width, groups_of(q_width + 2 * kv_width));
    layer.qkv_bias = vector_data("qkv_bias", qkv_bias, i, dtype, q_width + 2 * kv_width);
    layer.o = weight("o", o[i], 1, q_width, groups_of(width));
    layer.o_bias = vector_data("o_bias", o_bias, i, dtype, width);
    layer.gate_up = weight("gate_up", gate_up[i], 2, width, (intermediate + 15) / 16);
    layer.down = weight("down", down[i], 3, intermediate, groups_of(width));
    layer.q_norm = vector_data("q_norm", q_norm, i, dtype, head_dim);
    layer.k_norm = vector_data("k_norm", k_norm, i, dtype, head_dim);
    if (!adapted) continue;
    const Tensor* pairs = &lora[8 * i];
    Lora* own = adapters[i].data();
    int64_t counts[] = {check_lora(op, pairs[0], pairs[1], dtype, width, qkv_ends, 3, own[0]),
                        check_lora(op, pairs[2], pairs[3], dtype, q_width, o_ends, 1, own[1]),
                        check_lora(op, pairs[4], pairs[5], dtype, width, gate_up_ends, 2, own[2]),
                        check_lora(op, pairs[6], pairs[7], dtype, intermediate, down_ends, 1, own[3])};
    if (num_adapters < 0) num_adapters = counts[0];
    for (int64_t other : counts)
      check(other == num_adapters, op, "the tensors of lora must hold the same number of adapters");
    layer.lora = own;
  }
  if (adapted) {
    const int32_t* rows = check_adapter(op, *adapter, tokens, num_adapters);
    for (LayerArgs& layer : layers) layer.adapter = rows;
  }
  if (tokens > 0) kernels().decoder_layers({element, layers.data(), count});
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ensemble_decode, m) {
  m.def(
      "decoder_layers(Tensor hidden, Tensor cos, Tensor sin, Tensor[] norm1, Tensor[] norm2, Tensor[] qkv, "
      "Tensor[] qkv_bias, Tensor[] o, Tensor[] o_bias, Tensor[] gate_up, Tensor[] down, Tensor[] q_norm, "
      "Tensor[] k_norm, Tensor[] lora, Tensor? adapter, Tensor(a!)[] k_cache, Tensor(b!)[] v_cache, "
      "Tensor query_start, Tensor context_len, Tensor block_table, int num_heads, int num_kv_heads, int head_dim, "
      "int intermediate, float eps, float weight_offset, float scale, int activation, Tensor[] scales) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ensemble_decode, CPU, m) { m.impl("decoder_layers", TORCH_BOX(&decoder_layers)); }
