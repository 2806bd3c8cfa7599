// The schemas of all operators of torch.ops.pbs, by stage. docs/ops.md explains the arguments. The
// defaults of single stages are the paper's choices, those of the whole operator are those of
// PBSConfig.
#include <torch/csrc/stable/library.h>

#include <string>

STABLE_TORCH_LIBRARY(pbs, m) {
  m.def(
      "score_keys(Tensor q, Tensor k, *, int block_size=128, int segment_size=256, "
      "float? scale=None, str permute_per=\"kv_head\") -> Tensor");
  m.def("sort_segments(Tensor scores, *, int segment_size=256, int? num_heavy=None) -> Tensor");
  m.def(
      "permute_kv(Tensor k, Tensor v, Tensor perm, *, int kv_block_size=128) "
      "-> (Tensor k_perm, Tensor v_perm, Tensor k_mean)");
  m.def(
      "select_blocks(Tensor q, Tensor k, Tensor k_mean, Tensor? perm=None, Tensor? k_perm=None, *, "
      "int block_size=128, int? kv_block_size=None, int segment_size=256, float threshold=0.9, "
      "bool is_causal=True, "
      "float? scale=None, str mass=\"earlier\", str score=\"mean\", "
      "int num_samples=16, str select_per=\"query_head\", int window=0, int dense_tail=0) "
      "-> (Tensor block_mask, Tensor counts)");
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor k_perm, Tensor v_perm, Tensor block_mask, *, "
      "int block_size=128, int? kv_block_size=None, int segment_size=256, bool is_causal=True, "
      "float? scale=None) -> (Tensor out, Tensor lse)");
  const std::string attention =
      "bool is_causal=True, float? scale=None, "
      "int block_size=128, int? kv_block_size=32, int segment_size=256, float? threshold=None, "
      "str permute_per=\"kv_head\", int? num_heavy=32, str mass=\"block\", "
      "str score=\"sampled\", int num_samples=16, str select_per=\"query_head\", "
      "int window=128, int dense_tail=128)";
  const auto define = [&](const std::string& operands, const char* result) {
    m.def((operands + ", *, " + attention + " -> " + result).c_str());
  };
  define("attention(Tensor q, Tensor k, Tensor v", "Tensor");
  // Attention of several sequences. Tensors of lengths are on the CPU.
  define("attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k",
         "Tensor");
  const std::string in_pages = ", Tensor cu_seqlens_q, Tensor seq_lens, Tensor block_table";
  define("attention_paged(Tensor q, Tensor k_cache, Tensor v_cache" + in_pages, "Tensor");
  define("attention_paged_(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) out" +
             in_pages + ", Tensor? k=None, Tensor? v=None",
         "()");
}
