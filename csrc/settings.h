// The settings of the whole operator: as a call gives them, and after the checks.
#pragma once

#include <optional>
#include <string>

#include "pbs/check.h"

namespace pbs {

// The keyword arguments of attention (ops.cpp), in the same order.
struct AttentionSettings {
  bool is_causal;
  std::optional<double> scale;
  int64_t block_size;
  std::optional<int64_t> kv_block_size;
  int64_t segment_size;
  std::optional<double> threshold;
  std::string permute_per;
  std::optional<int64_t> num_heavy;
  std::string mass;
  std::string score;
  int64_t num_samples;
  std::string select_per;
  int64_t window;
  int64_t dense_tail;
};

struct AttentionRule {
  bool is_causal;
  float scale;
  Blocking blocking;
  int64_t num_heavy;  // negative: full sort
  SelectRule select;
};

inline int64_t check_permute_per(const std::string& permute_per, const Problem& problem) {
  return check_choice("permute_per", permute_per, "kv_head", "query_head") ? problem.num_q_heads
                                                                           : problem.num_kv_heads;
}

// Sets num_perm_heads of `problem`.
inline AttentionRule check_settings(const AttentionSettings& settings, Problem& problem) {
  AttentionRule rule{};
  rule.is_causal = settings.is_causal;
  rule.num_heavy = check_num_heavy(settings.num_heavy);
  rule.blocking =
      check_blocking(settings.block_size, settings.kv_block_size, settings.segment_size);
  problem.num_perm_heads = check_permute_per(settings.permute_per, problem);
  rule.select = check_rule({settings.score, settings.mass, settings.threshold, settings.num_samples,
                            settings.select_per, settings.window, settings.dense_tail},
                           problem, rule.blocking);
  rule.scale = check_scale(settings.scale, problem.head_dim);
  return rule;
}

// A function of some tensors and the settings, with the signature that the dispatcher calls.
template <auto kRun, class... Tensors>
struct WithSettings {
  static auto call(Tensors... tensors, bool is_causal, std::optional<double> scale,
                   int64_t block_size, std::optional<int64_t> kv_block_size, int64_t segment_size,
                   std::optional<double> threshold, std::string permute_per,
                   std::optional<int64_t> num_heavy, std::string mass, std::string score,
                   int64_t num_samples, std::string select_per, int64_t window,
                   int64_t dense_tail) {
    return kRun(tensors..., AttentionSettings{is_causal, scale, block_size, kv_block_size,
                                              segment_size, threshold, permute_per, num_heavy, mass,
                                              score, num_samples, select_per, window, dense_tail});
  }
};

}  // namespace pbs
