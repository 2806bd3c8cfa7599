// Fills the params of each stage from checked tensors, and has the checks that several operators
// share. The outputs are left out: the backend sets them.
#pragma once

#include "pbs/check.h"

namespace pbs {

// The names that a call uses for its operands.
struct OperandNames {
  const char* q = "q";
  const char* k = "k";
  const char* v = "v";
};

inline ScoreKeysParams score_keys_params(const ConstRows& q, const ConstRows& k,
                                         const Problem& problem, const Blocking& blocking,
                                         float scale) {
  ScoreKeysParams params{};
  params.problem = problem;
  params.blocking = blocking;
  params.scale = scale;
  params.q = q;
  params.k = k;
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

inline PermuteKVParams permute_kv_params(const ConstRows& k, const ConstRows& v, const Tensor& perm,
                                         const Problem& problem, int64_t kv_block_size) {
  PermuteKVParams params{};
  params.problem = problem;
  params.kv_block_size = kv_block_size;
  params.num_copied = problem.num_kv;
  params.k = k;
  params.v = v;
  params.perm = perm.const_data_ptr<int32_t>();
  return params;
}

inline SelectBlocksParams select_blocks_params(const ConstRows& q, const ConstRows& k,
                                               const ConstRows& k_perm, const Problem& problem,
                                               const Blocking& blocking, float scale,
                                               bool is_causal, const SelectRule& rule) {
  SelectBlocksParams params{};
  params.problem = problem;
  params.blocking = blocking;
  params.scale = scale;
  params.is_causal = is_causal;
  params.rule = rule;
  params.q = q;
  params.k = k;
  params.k_perm = k_perm;
  return params;
}

inline CopyPagesParams copy_pages_params(const Problem& problem, int64_t first_row,
                                         int64_t num_rows, const ConstRows& k_pages,
                                         const ConstRows& v_pages, const Pages& pages) {
  CopyPagesParams params{};
  params.dtype = problem.dtype;
  params.head_dim = problem.head_dim;
  params.num_heads = problem.num_kv_heads;
  params.first_row = first_row;
  params.num_rows = num_rows;
  params.pages = pages;
  params.k_pages = k_pages;
  params.v_pages = v_pages;
  return params;
}

inline AttendParams attend_params(const ConstRows& q, const ConstRows& k, const ConstRows& v,
                                  const ConstRows& k_perm, const ConstRows& v_perm,
                                  const Tensor& block_mask, const Problem& problem,
                                  const Blocking& blocking, float scale, bool is_causal) {
  AttendParams params{};
  params.problem = problem;
  params.blocking = blocking;
  params.scale = scale;
  params.is_causal = is_causal;
  params.q = q;
  params.k = k;
  params.v = v;
  params.k_perm = k_perm;
  params.v_perm = v_perm;
  params.block_mask = reinterpret_cast<const uint32_t*>(block_mask.const_data_ptr<int32_t>());
  return params;
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
  check_same_dtype(name, t, "k", k);
  check_ndim(name, t, 4, "(batch, heads, tokens, head_dim)");
  check_size(name, t, 0, problem.batch, "batch of q");
  check_perm_heads(name, t.size(1), problem);
  check_size(name, t, 2, problem.num_kv, "rows of k");
  check_size(name, t, 3, problem.head_dim, "head_dim of q");
  check_last_dim_contiguous(name, t);
}

}  // namespace pbs
