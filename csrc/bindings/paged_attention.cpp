#include <torch/csrc/stable/library.h>

#include "layers.h"

namespace ensemble_decode {

Paging check_paging(const char* op, const Tensor& k_cache, const Tensor& v_cache, const Tensor& query_start,
                    const Tensor& context_len, const Tensor& block_table, ScalarType dtype, int64_t tokens,
                    int64_t heads, int64_t kv_heads, int64_t head_dim, double scale) {
  check(kv_heads > 0 && heads % kv_heads == 0, op,
        "there are ", heads, " query heads, it must be a multiple of the ",
            kv_heads, " key and value heads");
  check(head_dim > 0 && head_dim % 2 == 0, op,
        "head_dim is ", head_dim, ", it must be even and positive");
  check_tensor(op, "v_cache", v_cache, dtype, {-1, kv_heads, kBlockSize, head_dim});
  check_contiguous(op, "v_cache", v_cache);
  check(k_cache.is_cpu() && k_cache.scalar_type() == dtype && k_cache.numel() == v_cache.numel(), op,
        "k_cache must have the dtype and the number of elements of v_cache");
  check_contiguous(op, "k_cache", k_cache);
  int64_t sequences = context_len.numel(), blocks = v_cache.size(0);
  check_tensor(op, "context_len", context_len, ScalarType::Int, {sequences});
  check_tensor(op, "query_start", query_start, ScalarType::Int, {sequences + 1});
  check_tensor(op, "block_table", block_table, ScalarType::Int, {sequences, -1});
  check_contiguous(op, "context_len", context_len);
  check_contiguous(op, "query_start", query_start);
  check_last_dense(op, "block_table", block_table);

  Paging paging{};
  paging.k_cache = const_cast<void*>(k_cache.const_data_ptr());
  paging.v_cache = const_cast<void*>(v_cache.const_data_ptr());
  paging.query_start = static_cast<const int32_t*>(query_start.const_data_ptr());
  paging.context_len = static_cast<const int32_t*>(context_len.const_data_ptr());
  paging.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  paging.table_stride = block_table.stride(0);
  paging.num_sequences = sequences;
  paging.num_tokens = tokens;
  paging.num_heads = heads;
  paging.num_kv_heads = kv_heads;
  paging.head_dim = head_dim;
  paging.scale = static_cast<float>(scale);

  // A wrong index would read or write foreign memory: what the tables say is checked before anything is touched.
  check(paging.query_start[0] == 0 && paging.query_start[sequences] == tokens, op,
        "query_start must begin with 0 and end with the number of tokens, ", tokens);
  for (int64_t s = 0; s < sequences; s++) {
    int64_t count = paging.query_start[s + 1] - paging.query_start[s], length = paging.context_len[s];
    int64_t used = (length + kBlockSize - 1) / kBlockSize;
    check(count >= 0, op, "query_start must not decrease");
    if (length < count || used > block_table.size(1))
      fail(op, "context_len[", s, "] is ", length,
           ", it must lie between the sequence's ", count, " new tokens and the ",
           block_table.size(1) * kBlockSize, " that its block table can hold");
    if (count == 0) continue;
    const int32_t* row = paging.block_table + s * paging.table_stride;
    for (int64_t b = 0; b < used; b++)
      if (row[b] < 0 || row[b] >= blocks)
        fail(op, "block_table[", s, ", ", b, "] is ",
             row[b], ", it must be a block below ", blocks);
  }
  return paging;
}

}  // namespace ensemble_decode

namespace {
using namespace ensemble_decode;

Tensor paged_attention(const Tensor& q, const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache,
                       const Tensor& query_start, const Tensor& context_len, const Tensor& block_table, double scale) {
  const char* op = "paged_attention";
  check(q.dim() == 3 && k.dim() == 3, op, "q and k must be [tokens, heads, head_dim]");
  int64_t tokens = q.size(0), heads = q.size(1), kv_heads = k.size(1), head_dim = q.size(2);
  AttentionArgs args{};
  args.dtype = dtype_of(op, "q", q);
  check_tensor(op, "k", k, q.scalar_type(), {tokens, kv_heads, head_dim});
  check_tensor(op, "v", v, q.scalar_type(), {tokens, kv_heads, head_dim});
  check_last_dense(op, "q", q);
  check_last_dense(op, "k", k);
  check_last_dense(op, "v", v);
  args.paging = check_paging(op, k_cache, v_cache, query_start, context_len, block_table, q.scalar_type(), tokens, heads,
                             kv_heads, head_dim, scale);
  Tensor out = torch::stable::new_empty(q, {tokens, heads, head_dim});
  args.q = q.const_data_ptr();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.q_token_stride = q.stride(0);
  args.q_head_stride = q.stride(1);
  args.k_token_stride = k.stride(0);
  args.k_head_stride = k.stride(1);
  args.v_token_stride = v.stride(0);
  args.v_head_stride = v.stride(1);
  args.out = out.mutable_data_ptr();
  if (tokens > 0) kernels().paged_attention(args);
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ensemble_decode, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor query_start, "
      "Tensor context_len, Tensor block_table, float scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ensemble_decode, CPU, m) { m.impl("paged_attention", TORCH_BOX(&paged_attention)); }
