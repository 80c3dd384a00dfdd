// The layer operators of the engine on a CPU: linear, LoRA, RMS norm, paged attention, and the decoder layers of a model.
//
// No framework below this line: raw pointers, sizes, strides in elements. Everything is compiled for three levels of
// instruction set (layers_v4.cpp: AVX-512 with BF16, layers_v3.cpp: AVX2 and FMA, layers_base.cpp: any machine) and
// `kernels()` picks one at run time.
//
// One rule runs through all of it: an output row depends, to the bit, only on its own input row (and on its own
// sequence's cache). Every sum has one order, fixed by the position of its terms; the number of rows, threads, tiles
// or chunks decides who computes a value and when, never how.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ensemble_sample.h"

namespace ensemble_decode {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

enum class DType { float32, bfloat16, float16 };

constexpr int kBlockSize = 16;    // tokens per KV block
constexpr int kGroupColumns = 32; // output columns that lie together in a packed weight

// Elements of a step of a packed weight or key block: bf16 keeps two consecutive k beside each other in every lane.
constexpr int elements_per_step(DType dtype) { return dtype == DType::bfloat16 ? 2 : 1; }

// y[r] = x[r] . W^T + bias, W packed as [ceil(N / 32)][ceil(K / step)][32][step]; or, with a scale for every packed
// column, W = scale * int8, packed as [ceil(N / 32)][K rounded up to 2][32] for every dtype.
struct LinearArgs {
  DType dtype;
  const void* x;
  int64_t rows, x_stride, in_features;
  const void* packed;
  const float* scale;  // [32 * ceil(N / 32)] of int8 weights, or null
  const void* bias;    // [N] or null
  int64_t out_features;
  void* out;  // [rows, N] of dtype, or of float32 if out_float32
  bool out_float32;
};

// One adapter stack of a linear, or of several merged along N. Both factors are packed like a weight, in groups of 16:
// a [A][ceil(segments * rank / 16)][steps of K][16][step], b [A][ceil(N / 16)][steps of rank][16][step].
struct Lora {
  const void* a;
  const void* b;
  int64_t rank;  // a whole number of steps
  int64_t in_features, out_features;
  const int64_t* segment_ends;  // cumulative output widths
  int num_segments;
};

struct LoraArgs {
  DType dtype;
  const void* x;
  void* y;
  int64_t rows, x_stride, y_stride;
  Lora lora;
  const int32_t* adapter;
};

struct RmsNormArgs {
  DType dtype;
  const void* x;
  const void* weight;
  void* out;
  int64_t rows, x_stride, width;
  float eps, weight_offset;
};

// Where the new tokens' keys and values go, and whom they attend to.
struct Paging {
  void* k_cache;  // [blocks, kv heads][head_dim / step][16][step]
  void* v_cache;  // [blocks, kv heads][16][head_dim]
  const int32_t* query_start;  // [sequences + 1]
  const int32_t* context_len;  // [sequences]
  const int32_t* block_table;  // [sequences, ...]
  int64_t table_stride;
  int64_t num_sequences, num_tokens;
  int64_t num_heads, num_kv_heads, head_dim;
  float scale;
};

struct AttentionArgs {
  DType dtype;
  const void *q, *k, *v;
  int64_t q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  void* out;  // [tokens, heads, head_dim]
  Paging paging;
};

enum class Activation { silu, gelu_tanh, gelu };

// One layer of a call, whose layers differ in weights, adapters and caches only; hidden and out are the first one's.
struct LayerArgs {
  const void* hidden;  // [tokens, width]
  void* out;
  int64_t width, intermediate, rotary_dim;
  const void *cos, *sin;  // [tokens, rotary_dim], of float32 if rotary_float32
  int64_t rotary_stride;
  bool rotary_float32;
  const void *norm1, *norm2;
  const void *qkv, *qkv_bias, *o, *o_bias;
  const void* gate_up;  // packed with 16 gate columns and the 16 up columns of the same index in each group
  const void* down;
  const float* scales[4];           // of qkv, o, gate_up, down where they are int8, as LinearArgs has it
  const void *q_norm, *k_norm;      // [head_dim] or null
  const Lora* lora;                 // qkv, o, gate_up, down; or null
  const int32_t* adapter;
  float eps, weight_offset;
  Activation activation;
  Paging paging;
};

struct LayersArgs {
  DType dtype;
  const LayerArgs* layers;
  int64_t count;
};

struct Kernels {
  const char* name;
  void (*linear)(const LinearArgs&);
  void (*lora)(const LoraArgs&);
  void (*rms_norm)(const RmsNormArgs&);
  void (*paged_attention)(const AttentionArgs&);
  void (*decoder_layers)(const LayersArgs&);
  void (*ensemble_sample)(const SampleArgs&);
  void (*combine)(const SampleArgs&);
};

// The best variant this machine runs, or the one ENSEMBLE_DECODE_CPU=base|v3|v4 names.
const Kernels& kernels();
// Switches to the named variant; false when this machine or build has none of that name.
bool use_kernels(const char* name);

// weight [N, K] with row stride -> packed (see LinearArgs), padded with zeros.
void pack_weight(DType dtype, const void* weight, int64_t stride, int64_t n, int64_t k, void* packed);
void pack_int8(const int8_t* weight, int64_t stride, int64_t n, int64_t k, int8_t* packed);

// Scratch memory of the calling thread, 64-byte aligned, kept between calls. A second call invalidates the first.
void* workspace(size_t bytes);

}  // namespace ensemble_decode
