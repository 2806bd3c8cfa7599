// From checked tensors to the params of each stage, and the checks that more than one operator
// makes. What a backend sets itself, that is the outputs, is left out.
#pragma once

#include "pbs/check.h"

namespace pbs {

inline ScoreKeysParams score_keys_params(const Tensor& q, const Tensor& k, const Problem& problem,
                                         const Blocking& blocking, float scale) {
  ScoreKeysParams params{};
  params.problem = problem;
  params.blocking = blocking;
  params.scale = scale;
  params.q = const_rows(q);
  params.k = const_rows(k);
  return params;
}

inline SortSegmentsParams sort_segments_params(const Tensor& scores, int64_t segment_size,
                                               int64_t num_heavy) {
  SortSegmentsParams params{};
  params.num_heads = scores.size(0) * scores.size(1);
  params.num_kv = scores.size(2);
  params.segment_size = segment_size;
  params.num_heavy = num_heavy;
  params.importance = scores.const_data_ptr<float>();
  return params;
}

inline PermuteKVParams permute_kv_params(const Tensor& k, const Tensor& v, const Tensor& perm,
                                         const Problem& problem, int64_t kv_block_size) {
  PermuteKVParams params{};
  params.problem = problem;
  params.kv_block_size = kv_block_size;
  params.num_copied = problem.num_kv;
  params.k = const_rows(k);
  params.v = const_rows(v);
  params.perm = perm.const_data_ptr<int32_t>();
  return params;
}

inline SelectBlocksParams select_blocks_params(const Tensor& q, const Tensor& k,
                                               const Tensor& k_perm, const Problem& problem,
                                               const Blocking& blocking, float scale,
                                               bool is_causal, const SelectRule& rule) {
  SelectBlocksParams params{};
  params.problem = problem;
  params.blocking = blocking;
  params.scale = scale;
  params.is_causal = is_causal;
  params.rule = rule;
  params.q = const_rows(q);
  params.k = const_rows(k);
  params.k_perm = const_rows(k_perm);
  return params;
}

inline AttendParams attend_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& k_perm, const Tensor& v_perm,
                                  const Tensor& block_mask, const Problem& problem,
                                  const Blocking& blocking, float scale, bool is_causal) {
  AttendParams params{};
  params.problem = problem;
  params.blocking = blocking;
  params.scale = scale;
  params.is_causal = is_causal;
  params.q = const_rows(q);
  params.k = const_rows(k);
  params.v = const_rows(v);
  params.k_perm = const_rows(k_perm);
  params.v_perm = const_rows(v_perm);
  params.block_mask = reinterpret_cast<const uint32_t*>(block_mask.const_data_ptr<int32_t>());
  return params;
}

inline int64_t check_permute_per(const std::string& permute_per, const Problem& problem) {
  return check_choice("permute_per", permute_per, "kv_head", "query_head") ? problem.num_q_heads
                                                                           : problem.num_kv_heads;
}

inline void check_perm(const Tensor& perm, const Tensor& q, const Problem& problem) {
  check_same_device("perm", perm, "q", q);
  check_dtype("perm", perm, ScalarType::Int);
  check_ndim("perm", perm, 3, "(batch, heads, tokens)");
  check_size("perm", perm, 0, problem.batch, "batch of q");
  check_size("perm", perm, 1, problem.num_perm_heads, "heads of k_mean");
  check_size("perm", perm, 2, problem.num_kv, "rows of k");
  check_contiguous("perm", perm);
}

inline void check_permuted(const char* name, const Tensor& t, const Tensor& k,
                           const Problem& problem) {
  check_same_device(name, t, "k", k);
  if (dtype_of(t) != dtype_of(k)) {
    fail(name, " must have the dtype of k (", dtype_text(dtype_of(k)), "), got ",
         dtype_text(dtype_of(t)));
  }
  check_ndim(name, t, 4, "(batch, heads, tokens, head_dim)");
  check_size(name, t, 0, problem.batch, "batch of q");
  check_perm_heads(name, t.size(1), problem);
  check_size(name, t, 2, problem.num_kv, "rows of k");
  check_size(name, t, 3, problem.head_dim, "head_dim of q");
  check_last_dim_contiguous(name, t);
}

}  // namespace pbs
