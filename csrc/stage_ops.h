// The operators as every backend runs them. Each has two parts: a check, which throws before
// anything is allocated, and a run, which allocates the outputs, fills the params and launches. The
// whole operator checks its inputs once and then runs all stages.
//
// A Backend is made once for a call, from the name of the operator and its first tensor; its
// constructor throws when this build or this device cannot run the operator. It has a check_<stage>
// and a <stage> for each stage, which take the params, and check_attention for the inputs of the
// whole operator.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>

#include "settings.h"
#include "stage_params.h"

namespace pbs {

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes,
                         ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

template <class Backend>
struct StageOps {
  // score_keys

  static Tensor score_keys(const Tensor& q, const Tensor& k, int64_t block_size,
                           int64_t segment_size, std::optional<double> scale,
                           std::string permute_per) {
    const Backend backend("score_keys", "q", q);
    Problem problem = check_query_key(q, k);
    check_block("block_size", block_size);
    check_segment(segment_size, "block_size", block_size);
    const Blocking blocking{block_size, block_size, segment_size};
    problem.num_perm_heads = check_permute_per(permute_per, problem);
    const ScoreKeysParams params = score_keys_params(
        const_rows(q), const_rows(k), problem, blocking, check_scale(scale, problem.head_dim));
    backend.check_score_keys(params);
    return run_score_keys(backend, params, q);
  }

  static Tensor run_score_keys(const Backend& backend, ScoreKeysParams params, const Tensor& like) {
    const Problem& problem = params.problem;
    Tensor scores = new_tensor(like, {problem.batch, problem.num_perm_heads, problem.num_kv},
                               ScalarType::Float);
    params.importance = scores.mutable_data_ptr<float>();
    backend.score_keys(params);
    return scores;
  }

  // sort_segments

  static Tensor sort_segments(const Tensor& scores, int64_t segment_size,
                              std::optional<int64_t> num_heavy) {
    const Backend backend("sort_segments", "scores", scores);
    check_dtype("scores", scores, ScalarType::Float);
    check_ndim("scores", scores, 3, "(batch, heads, tokens)");
    check_num_keys("scores", scores.size(2));
    check_contiguous("scores", scores);
    if (segment_size <= 0) fail("segment_size must be positive, got ", segment_size);
    const SortSegmentsParams params =
        sort_segments_params(scores, segment_size, check_num_heavy(num_heavy));
    backend.check_sort_segments(params);
    return run_sort_segments(backend, params, scores);
  }

  static Tensor run_sort_segments(const Backend& backend, SortSegmentsParams params,
                                  const Tensor& scores) {
    Tensor perm =
        new_tensor(scores, {scores.size(0), scores.size(1), scores.size(2)}, ScalarType::Int);
    params.perm = perm.mutable_data_ptr<int32_t>();
    backend.sort_segments(params);
    return perm;
  }

  // permute_kv

  static std::tuple<Tensor, Tensor, Tensor> permute_kv(const Tensor& k, const Tensor& v,
                                                       const Tensor& perm, int64_t kv_block_size) {
    const Backend backend("permute_kv", "k", k);
    check_same_device("perm", perm, "k", k);
    Problem problem{};
    problem.dtype = check_float_dtype("k", k);
    check_dtype("perm", perm, ScalarType::Int);
    check_ndim("k", k, 4, "(batch, heads, tokens, head_dim)");
    check_key_value(k, v);
    check_head_dim("k", k.size(3));
    check_ndim("perm", perm, 3, "(batch, heads, tokens)");
    check_size("perm", perm, 0, k.size(0), "batch of k");
    if (k.size(1) == 0 || perm.size(1) % k.size(1) != 0) {
      fail("perm must have a multiple of the heads of k (", k.size(1), "), got ", perm.size(1));
    }
    check_size("perm", perm, 2, k.size(2), "rows of k");
    check_num_keys("k", k.size(2));
    check_last_dim_contiguous("k", k);
    check_contiguous("perm", perm);
    check_block("kv_block_size", kv_block_size);
    problem.batch = k.size(0);
    problem.num_kv_heads = k.size(1);
    problem.num_perm_heads = perm.size(1);
    problem.num_kv = k.size(2);
    problem.head_dim = k.size(3);
    PermuteKVParams params =
        permute_kv_params(const_rows(k), const_rows(v), perm, problem, kv_block_size);
    backend.check_permute_kv(params);
    const Tensor k_mean = new_tensor(k,
                                     {problem.batch, problem.num_perm_heads,
                                      ceil_div(problem.num_kv, kv_block_size), problem.head_dim},
                                     ScalarType::Float);
    const auto [k_perm, v_perm] = run_permute_kv(backend, params, k, &k_mean);
    return {k_perm, v_perm, k_mean};
  }

  // Writes k_perm and v_perm, as new tensors. `k_mean` may be null.
  static std::tuple<Tensor, Tensor> run_permute_kv(const Backend& backend, PermuteKVParams params,
                                                   const Tensor& like, const Tensor* k_mean) {
    const Problem& problem = params.problem;
    const std::initializer_list<int64_t> sizes = {problem.batch, problem.num_perm_heads,
                                                  problem.num_kv, problem.head_dim};
    Tensor k_perm = new_tensor(like, sizes, like.scalar_type());
    Tensor v_perm = new_tensor(like, sizes, like.scalar_type());
    params.k_perm = mutable_rows(k_perm);
    params.v_perm = mutable_rows(v_perm);
    if (k_mean != nullptr) params.k_mean = k_mean->mutable_data_ptr<float>();
    backend.permute_kv(params);
    return {k_perm, v_perm};
  }

  // select_blocks

  static std::tuple<Tensor, Tensor> select_blocks(
      const Tensor& q, const Tensor& k, const Tensor& k_mean, std::optional<Tensor> perm,
      std::optional<Tensor> k_perm, int64_t block_size, std::optional<int64_t> kv_block_size,
      int64_t segment_size, double threshold, bool is_causal, std::optional<double> scale,
      std::string mass, std::string score, int64_t num_samples, std::string select_per,
      int64_t window, int64_t dense_tail) {
    const Backend backend("select_blocks", "q", q);
    Problem problem = check_query_key(q, k);
    check_same_device("k_mean", k_mean, "q", q);
    check_dtype("k_mean", k_mean, ScalarType::Float);
    check_ndim("k_mean", k_mean, 4, "(batch, heads, key blocks, head_dim)");
    const Blocking blocking = check_blocking(block_size, kv_block_size, segment_size);
    check_size("k_mean", k_mean, 0, problem.batch, "batch of q");
    problem.num_perm_heads = check_perm_heads("k_mean", k_mean.size(1), problem);
    check_size("k_mean", k_mean, 2, num_key_blocks(problem, blocking), "key blocks");
    check_size("k_mean", k_mean, 3, problem.head_dim, "head_dim of q");
    check_contiguous("k_mean", k_mean);
    if (perm.has_value()) check_perm(*perm, q, problem);
    const float factor = check_scale(scale, problem.head_dim);
    const Score score_read = check_score(score);
    if (k_perm.has_value()) {
      check_permuted("k_perm", *k_perm, k, problem);
      check_size("k_perm", *k_perm, 1, problem.num_perm_heads, "heads of k_mean");
    } else if (!reads_means(score_read)) {
      if (perm.has_value()) fail("k_perm must be given with perm where score is \"sampled\"");
      problem.num_perm_heads = problem.num_kv_heads;  // keys in their original order
    }
    const SelectRule rule = check_rule(
        {score, mass, threshold, num_samples, select_per, window, dense_tail}, problem, blocking);
    SelectBlocksParams params =
        select_blocks_params(const_rows(q), const_rows(k), const_rows(k_perm.value_or(k)), problem,
                             blocking, factor, is_causal, rule);
    params.k_mean = k_mean.const_data_ptr<float>();
    if (perm.has_value()) params.perm = perm->const_data_ptr<int32_t>();
    backend.check_select_blocks(params);
    return run_select_blocks(backend, params, q);
  }

  static std::tuple<Tensor, Tensor> run_select_blocks(const Backend& backend,
                                                      SelectBlocksParams params,
                                                      const Tensor& like) {
    const Problem& problem = params.problem;
    const int64_t num_q_blocks = num_query_blocks(problem, params.blocking);
    const int64_t num_words = num_mask_words(num_key_blocks(problem, params.blocking));
    Tensor block_mask = new_tensor(
        like, {problem.batch, problem.num_q_heads, num_q_blocks, num_words}, ScalarType::Int);
    Tensor counts =
        new_tensor(like, {problem.batch, problem.num_q_heads, num_q_blocks}, ScalarType::Int);
    params.block_mask = reinterpret_cast<uint32_t*>(block_mask.mutable_data_ptr<int32_t>());
    params.counts = counts.mutable_data_ptr<int32_t>();
    backend.select_blocks(params);
    return {block_mask, counts};
  }

  // attend

  static std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const Tensor& k_perm, const Tensor& v_perm,
                                           const Tensor& block_mask, int64_t block_size,
                                           std::optional<int64_t> kv_block_size,
                                           int64_t segment_size, bool is_causal,
                                           std::optional<double> scale) {
    const Backend backend("attend", "q", q);
    Problem problem = check_query_key(q, k);
    check_key_value(k, v);
    check_permuted("k_perm", k_perm, k, problem);
    check_permuted("v_perm", v_perm, k, problem);
    check_size("v_perm", v_perm, 1, k_perm.size(1), "heads of k_perm");
    problem.num_perm_heads = k_perm.size(1);
    const Blocking blocking = check_blocking(block_size, kv_block_size, segment_size);
    check_same_device("block_mask", block_mask, "q", q);
    check_dtype("block_mask", block_mask, ScalarType::Int);
    check_ndim("block_mask", block_mask, 4, "(batch, heads, query blocks, words)");
    check_size("block_mask", block_mask, 0, problem.batch, "batch of q");
    check_size("block_mask", block_mask, 1, problem.num_q_heads, "heads of q");
    check_size("block_mask", block_mask, 2, num_query_blocks(problem, blocking), "query blocks");
    check_size("block_mask", block_mask, 3, num_mask_words(num_key_blocks(problem, blocking)),
               "words of 32 key blocks");
    check_contiguous("block_mask", block_mask);
    AttendParams params = attend_params(const_rows(q), const_rows(k), const_rows(v),
                                        const_rows(k_perm), const_rows(v_perm), block_mask, problem,
                                        blocking, check_scale(scale, problem.head_dim), is_causal);
    backend.check_attend(params);
    Tensor out = torch::stable::empty_like(q);
    params.out = mutable_rows(out);
    return {out, run_attend(backend, params, q)};
  }

  // Writes params.out, returns the LSE.
  static Tensor run_attend(const Backend& backend, AttendParams params, const Tensor& like) {
    const Problem& problem = params.problem;
    Tensor lse =
        new_tensor(like, {problem.batch, problem.num_q_heads, problem.num_q}, ScalarType::Float);
    params.lse = lse.mutable_data_ptr<float>();
    backend.attend(params);
    return lse;
  }

  // attention

  static Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v,
                          const AttentionSettings& settings) {
    const Backend backend("attention", "q", q);
    Problem problem = check_query_key(q, k);
    check_key_value(k, v);
    const AttentionRule rule = check_settings(settings, problem);
    const Operands operands{const_rows(q), const_rows(k), const_rows(v)};
    backend.check_attention(operands, OperandNames{}, problem, rule.blocking, rule.scale,
                            rule.select);
    const Selected selected = run_selection(backend, problem, rule, operands, q);
    Tensor out = torch::stable::empty_like(q);  // now that the memory of the other stages is free
    attend_selected(backend, problem, rule, operands, selected, mutable_rows(out), q);
    return out;
  }

  // The outputs of the earlier stages that attend needs.
  struct Selected {
    Tensor k_perm;
    Tensor v_perm;
    Tensor block_mask;
  };

  // New tensors have the dtype and the device of `like`.
  static void run_attention(const Backend& backend, const Problem& problem,
                            const AttentionRule& rule, const Operands& operands,
                            const MutableRows& out, const Tensor& like) {
    const Selected selected = run_selection(backend, problem, rule, operands, like);
    attend_selected(backend, problem, rule, operands, selected, out, like);
  }

  static Selected run_selection(const Backend& backend, const Problem& problem,
                                const AttentionRule& rule, const Operands& operands,
                                const Tensor& like) {
    const Blocking& blocking = rule.blocking;
    const auto& [q, k, v] = operands;
    const Tensor perm = run_order(backend, problem, rule, q, k, /*keeps_first=*/false, like);
    PermuteKVParams permuting = permute_kv_params(k, v, perm, problem, blocking.kv_block_size);
    permuting.num_copied = num_candidate_rows(problem, blocking, rule.is_causal);
    std::optional<Tensor> k_mean;
    if (reads_means(rule.select.score)) {
      k_mean = new_tensor(like,
                          {problem.batch, problem.num_perm_heads, num_key_blocks(problem, blocking),
                           problem.head_dim},
                          ScalarType::Float);
    }
    const auto [k_perm, v_perm] =
        run_permute_kv(backend, permuting, like, k_mean.has_value() ? &*k_mean : nullptr);
    SelectBlocksParams selecting = select_blocks_params(q, k, const_rows(k_perm), problem, blocking,
                                                        rule.scale, rule.is_causal, rule.select);
    if (k_mean.has_value()) selecting.k_mean = k_mean->const_data_ptr<float>();
    selecting.perm = perm.const_data_ptr<int32_t>();
    return {k_perm, v_perm, std::get<0>(run_select_blocks(backend, selecting, like))};
  }

  static void attend_selected(const Backend& backend, const Problem& problem,
                              const AttentionRule& rule, const Operands& operands,
                              const Selected& selected, const MutableRows& out,
                              const Tensor& like) {
    AttendParams attending =
        attend_params(operands.q, operands.k, operands.v, const_rows(selected.k_perm),
                      const_rows(selected.v_perm), selected.block_mask, problem, rule.blocking,
                      rule.scale, rule.is_causal);
    attending.out = out;
    run_attend(backend, attending, like);
  }

  // The permutation of the keys. With keeps_first, the first key keeps its place.
  static Tensor run_order(const Backend& backend, const Problem& problem, const AttentionRule& rule,
                          const ConstRows& q, const ConstRows& k, bool keeps_first,
                          const Tensor& like) {
    const Tensor scores =
        run_score_keys(backend, score_keys_params(q, k, problem, rule.blocking, rule.scale), like);
    if (keeps_first) {
      Tensor first = scores;
      first = torch::stable::narrow(first, 2, 0, 1);
      torch::stable::fill_(first, std::numeric_limits<double>::infinity());
    }
    return run_sort_segments(
        backend, sort_segments_params(scores, rule.blocking.segment_size, rule.num_heavy), scores);
  }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("score_keys", TORCH_BOX(&score_keys));
    m.impl("sort_segments", TORCH_BOX(&sort_segments));
    m.impl("permute_kv", TORCH_BOX(&permute_kv));
    m.impl("select_blocks", TORCH_BOX(&select_blocks));
    m.impl("attend", TORCH_BOX(&attend));
    using Attention = WithSettings<&attention, const Tensor&, const Tensor&, const Tensor&>;
    m.impl("attention", TORCH_BOX(&Attention::call));
  }
};

}  // namespace pbs
