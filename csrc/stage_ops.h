// The operators as every backend runs them: check, allocate, fill the params, launch.
//
// A Backend has one static function per stage, named after it, that takes the params and the
// tensor whose device it runs on; require(stage, tensor), which throws when this build or this
// device cannot run the stage; and check_attention, which throws for inputs of the whole operator
// that one of its stages would refuse.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "pbs/check.h"

namespace pbs {

template <class Backend>
struct StageOps {
  static Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes,
                           ScalarType dtype) {
    return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
  }

  static Tensor score_keys(const Tensor& q, const Tensor& k, int64_t block_size,
                           int64_t segment_size, std::optional<double> scale,
                           std::string permute_per) {
    Backend::require("score_keys", q);
    ScoreKeysParams params{};
    params.problem = check_query_key(q, k);
    check_block("block_size", block_size);
    check_segment(segment_size, "block_size", block_size);
    params.blocking = Blocking{block_size, block_size, segment_size};
    params.scale = check_scale(scale, params.problem.head_dim);
    if (check_choice("permute_per", permute_per, "kv_head", "query_head")) {
      params.problem.num_perm_heads = params.problem.num_q_heads;
    }
    params.q = const_rows(q);
    params.k = const_rows(k);
    const Problem& problem = params.problem;
    Tensor importance =
        new_tensor(q, {problem.batch, problem.num_perm_heads, problem.num_kv}, ScalarType::Float);
    params.importance = importance.mutable_data_ptr<float>();
    Backend::score_keys(params, q);
    return importance;
  }

  static Tensor sort_segments(const Tensor& scores, int64_t segment_size,
                              std::optional<int64_t> num_heavy) {
    Backend::require("sort_segments", scores);
    check_dtype("scores", scores, ScalarType::Float);
    check_ndim("scores", scores, 3, "(batch, heads, tokens)");
    check_num_keys("scores", scores.size(2));
    check_contiguous("scores", scores);
    if (segment_size <= 0) fail("segment_size must be positive, got ", segment_size);
    SortSegmentsParams params{};
    params.num_heads = scores.size(0) * scores.size(1);
    params.num_kv = scores.size(2);
    params.segment_size = segment_size;
    params.num_heavy = check_num_heavy(num_heavy);
    params.importance = scores.const_data_ptr<float>();
    Tensor perm =
        new_tensor(scores, {scores.size(0), scores.size(1), scores.size(2)}, ScalarType::Int);
    params.perm = perm.mutable_data_ptr<int32_t>();
    Backend::sort_segments(params, scores);
    return perm;
  }

  static std::tuple<Tensor, Tensor, Tensor> permute_kv(const Tensor& k, const Tensor& v,
                                                       const Tensor& perm, int64_t kv_block_size) {
    return permute_first_rows(k, v, perm, kv_block_size, std::nullopt);
  }

  // Leaves the rows from num_copied on unset, where it is given.
  static std::tuple<Tensor, Tensor, Tensor> permute_first_rows(const Tensor& k, const Tensor& v,
                                                               const Tensor& perm,
                                                               int64_t kv_block_size,
                                                               std::optional<int64_t> num_copied) {
    Backend::require("permute_kv", k);
    check_same_device("perm", perm, "k", k);
    PermuteKVParams params{};
    Problem& problem = params.problem;
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
    params.kv_block_size = kv_block_size;
    params.num_copied = num_copied.value_or(problem.num_kv);
    params.k = const_rows(k);
    params.v = const_rows(v);
    params.perm = perm.const_data_ptr<int32_t>();

    const int64_t heads = problem.num_perm_heads;
    Tensor k_perm =
        new_tensor(k, {problem.batch, heads, problem.num_kv, problem.head_dim}, k.scalar_type());
    Tensor v_perm =
        new_tensor(k, {problem.batch, heads, problem.num_kv, problem.head_dim}, k.scalar_type());
    Tensor k_mean = new_tensor(
        k, {problem.batch, heads, ceil_div(problem.num_kv, kv_block_size), problem.head_dim},
        ScalarType::Float);
    params.k_perm = k_perm.mutable_data_ptr();
    params.v_perm = v_perm.mutable_data_ptr();
    params.k_mean = k_mean.mutable_data_ptr<float>();
    Backend::permute_kv(params, k);
    return {k_perm, v_perm, k_mean};
  }

  static std::tuple<Tensor, Tensor> select_blocks(
      const Tensor& q, const Tensor& k, const Tensor& k_mean, std::optional<Tensor> perm,
      std::optional<Tensor> k_perm, int64_t block_size, std::optional<int64_t> kv_block_size,
      int64_t segment_size, double threshold, bool is_causal, std::optional<double> scale,
      std::string mass, std::string score, int64_t num_samples) {
    Backend::require("select_blocks", q);
    SelectBlocksParams params{};
    Problem& problem = params.problem;
    problem = check_query_key(q, k);
    check_same_device("k_mean", k_mean, "q", q);
    check_dtype("k_mean", k_mean, ScalarType::Float);
    check_ndim("k_mean", k_mean, 4, "(batch, heads, key blocks, head_dim)");
    params.blocking = check_blocking(block_size, kv_block_size, segment_size);
    const int64_t num_kv_blocks = ceil_div(problem.num_kv, params.blocking.kv_block_size);
    check_size("k_mean", k_mean, 0, problem.batch, "batch of q");
    problem.num_perm_heads = check_perm_heads("k_mean", k_mean.size(1), problem);
    check_size("k_mean", k_mean, 2, num_kv_blocks, "key blocks");
    check_size("k_mean", k_mean, 3, problem.head_dim, "head_dim of q");
    check_contiguous("k_mean", k_mean);
    if (perm.has_value()) {
      check_same_device("perm", *perm, "q", q);
      check_dtype("perm", *perm, ScalarType::Int);
      check_ndim("perm", *perm, 3, "(batch, heads, tokens)");
      check_size("perm", *perm, 0, problem.batch, "batch of q");
      check_size("perm", *perm, 1, problem.num_perm_heads, "heads of k_mean");
      check_size("perm", *perm, 2, problem.num_kv, "rows of k");
      check_contiguous("perm", *perm);
      params.perm = perm->const_data_ptr<int32_t>();
    }
    params.scale = check_scale(scale, problem.head_dim);
    params.is_causal = is_causal;
    params.num_samples = static_cast<int32_t>(check_score(score, num_samples, block_size));
    const MassRule rule = check_mass(mass, params.num_samples);
    params.threshold = check_threshold(threshold, rule);
    params.is_mass_causal = rule != MassRule::kEarlier;
    params.is_by_block = rule == MassRule::kBlock && threshold < 1.0;
    params.q = const_rows(q);
    params.k = const_rows(k);
    params.k_perm = params.k;
    if (k_perm.has_value()) {
      check_permuted("k_perm", *k_perm, k, problem);
      check_size("k_perm", *k_perm, 1, problem.num_perm_heads, "heads of k_mean");
      params.k_perm = const_rows(*k_perm);
    } else if (params.num_samples > 0) {
      if (perm.has_value()) fail("k_perm must be given with perm where score is \"sampled\"");
      problem.num_perm_heads = problem.num_kv_heads;  // of the keys as they are
    }
    params.k_mean = k_mean.const_data_ptr<float>();

    const int64_t num_q_blocks = ceil_div(problem.num_q, block_size);
    Tensor block_mask = new_tensor(
        q, {problem.batch, problem.num_q_heads, num_q_blocks, num_mask_words(num_kv_blocks)},
        ScalarType::Int);
    Tensor counts =
        new_tensor(q, {problem.batch, problem.num_q_heads, num_q_blocks}, ScalarType::Int);
    params.block_mask = reinterpret_cast<uint32_t*>(block_mask.mutable_data_ptr<int32_t>());
    params.counts = counts.mutable_data_ptr<int32_t>();
    Backend::select_blocks(params, q);
    return {block_mask, counts};
  }

  static std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const Tensor& k_perm, const Tensor& v_perm,
                                           const Tensor& block_mask, int64_t block_size,
                                           std::optional<int64_t> kv_block_size,
                                           int64_t segment_size, bool is_causal,
                                           std::optional<double> scale) {
    Backend::require("attend", q);
    AttendParams params{};
    Problem& problem = params.problem;
    problem = check_query_key(q, k);
    check_key_value(k, v);
    check_permuted("k_perm", k_perm, k, problem);
    check_permuted("v_perm", v_perm, k, problem);
    check_size("v_perm", v_perm, 1, k_perm.size(1), "heads of k_perm");
    problem.num_perm_heads = k_perm.size(1);
    params.blocking = check_blocking(block_size, kv_block_size, segment_size);
    check_same_device("block_mask", block_mask, "q", q);
    check_dtype("block_mask", block_mask, ScalarType::Int);
    check_ndim("block_mask", block_mask, 4, "(batch, heads, query blocks, words)");
    check_size("block_mask", block_mask, 0, problem.batch, "batch of q");
    check_size("block_mask", block_mask, 1, problem.num_q_heads, "heads of q");
    check_size("block_mask", block_mask, 2, ceil_div(problem.num_q, block_size), "query blocks");
    check_size("block_mask", block_mask, 3,
               num_mask_words(ceil_div(problem.num_kv, params.blocking.kv_block_size)),
               "words of 32 key blocks");
    check_contiguous("block_mask", block_mask);
    params.scale = check_scale(scale, problem.head_dim);
    params.is_causal = is_causal;
    params.q = const_rows(q);
    params.k = const_rows(k);
    params.v = const_rows(v);
    params.k_perm = const_rows(k_perm);
    params.v_perm = const_rows(v_perm);
    params.block_mask = reinterpret_cast<const uint32_t*>(block_mask.const_data_ptr<int32_t>());

    Tensor out = torch::stable::empty_like(q);
    Tensor lse =
        new_tensor(q, {problem.batch, problem.num_q_heads, problem.num_q}, ScalarType::Float);
    params.out = MutableRows{out.mutable_data_ptr(), out.stride(0), out.stride(1), out.stride(2)};
    params.lse = lse.mutable_data_ptr<float>();
    Backend::attend(params, q);
    return {out, lse};
  }

  static Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, bool is_causal,
                          std::optional<double> scale, int64_t block_size,
                          std::optional<int64_t> kv_block_size, int64_t segment_size,
                          std::optional<double> threshold, std::string permute_per,
                          std::optional<int64_t> num_heavy, std::string mass, std::string score,
                          int64_t num_samples) {
    Backend::require("attention", q);
    // Everything is checked before the first stage starts, so that no error comes late.
    const Problem problem = check_query_key(q, k);
    check_key_value(k, v);
    check_num_heavy(num_heavy);
    const Blocking blocking = check_blocking(block_size, kv_block_size, segment_size);
    const int64_t samples = check_score(score, num_samples, block_size);
    const double share = check_threshold(threshold, check_mass(mass, samples));
    Backend::check_attention(q, k, v, check_scale(scale, q.size(3)), problem, blocking, samples);

    const Tensor scores = score_keys(q, k, block_size, segment_size, scale, permute_per);
    const Tensor perm = sort_segments(scores, segment_size, num_heavy);
    const auto [k_perm, v_perm, k_mean] = permute_first_rows(
        k, v, perm, blocking.kv_block_size, num_candidate_rows(problem, blocking, is_causal));
    const auto [block_mask, counts] =
        select_blocks(q, k, k_mean, perm, k_perm, block_size, kv_block_size, segment_size, share,
                      is_causal, scale, mass, score, num_samples);
    return std::get<0>(attend(q, k, v, k_perm, v_perm, block_mask, block_size, kv_block_size,
                              segment_size, is_causal, scale));
  }

  // Permuted keys that any query block may select: those of the last one.
  static int64_t num_candidate_rows(const Problem& problem, const Blocking& blocking,
                                    bool is_causal) {
    if (problem.num_q == 0) return 0;
    const QueryBlock last =
        query_block((problem.num_q - 1) / blocking.block_size, problem.num_q, problem.num_kv,
                    blocking.block_size, blocking.kv_block_size, blocking.segment_size, is_causal);
    return last.num_candidates * blocking.kv_block_size;
  }

  static void check_permuted(const char* name, const Tensor& t, const Tensor& k,
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

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("score_keys", TORCH_BOX(&score_keys));
    m.impl("sort_segments", TORCH_BOX(&sort_segments));
    m.impl("permute_kv", TORCH_BOX(&permute_kv));
    m.impl("select_blocks", TORCH_BOX(&select_blocks));
    m.impl("attend", TORCH_BOX(&attend));
    m.impl("attention", TORCH_BOX(&attention));
  }
};

}  // namespace pbs
