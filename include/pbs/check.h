// Argument checks that all backends share. A failed check throws std::runtime_error with the
// message "<argument> must <rule>, got <value>". Order: device, dtype, ndim, shape, stride,
// meaning.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <string>

#include "pbs/bitmask.h"
#include "pbs/dispatch.h"
#include "pbs/dtype.h"
#include "pbs/fail.h"
#include "pbs/geometry.h"
#include "pbs/params.h"

namespace pbs {

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i == 0 ? "" : ", ") << t.size(i);
  text << ')';
  return text.str();
}

inline std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  std::ostringstream text;
  text << (t.is_cuda() ? "cuda" : "another device") << ':' << t.get_device_index();
  return text.str();
}

// The dtypes a stage takes for q, k and v.
inline DType check_float_dtype(const char* name, const Tensor& t) {
  switch (dtype_of(t)) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(name, " must be float32, bfloat16 or float16, got ", dtype_text(dtype_of(t)));
  }
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType dtype) {
  if (dtype_of(t) != dtype) {
    fail(name, " must be ", dtype_text(dtype), ", got ", dtype_text(dtype_of(t)));
  }
}

inline void check_same_dtype(const char* name, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  if (dtype_of(t) != dtype_of(other)) {
    fail(name, " must have the dtype of ", other_name, " (", dtype_text(dtype_of(other)), "), got ",
         dtype_text(dtype_of(t)));
  }
}

inline void check_same_shape(const char* name, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  for (int64_t dim = 0; dim < other.dim(); ++dim) {
    if (t.size(dim) != other.size(dim)) {
      fail(name, " must have the shape of ", other_name, " ", shape_text(other), ", got ",
           shape_text(t));
    }
  }
}

// None in Python, which the dispatcher accepts.
inline void check_defined(const char* name, const Tensor& t) {
  if (!t.defined()) fail(name, " must be a tensor, got None");
}

inline void check_same_device(const char* name, const Tensor& t, const char* other_name,
                              const Tensor& other) {
  check_defined(other_name, other);
  check_defined(name, t);
  if (device_text(t) != device_text(other)) {
    fail(name, " must be on the device of ", other_name, " (", device_text(other), "), got ",
         device_text(t));
  }
}

inline void check_ndim(const char* name, const Tensor& t, int64_t ndim, const char* layout) {
  if (t.dim() != ndim) {
    fail(name, " must have ", ndim, " dimensions ", layout, ", got ", t.dim(), " ", shape_text(t));
  }
}

inline void check_size(const char* name, const Tensor& t, int64_t dim, int64_t size,
                       const char* why) {
  if (t.size(dim) != size) {
    fail(name, " must have size ", size, " in dimension ", dim, " (", why, "), got ",
         shape_text(t));
  }
}

inline void check_last_dim_contiguous(const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.numel() > 0 && t.stride(last) != 1) {
    fail(name, " must be contiguous in its last dimension, got stride ", t.stride(last));
  }
}

inline void check_contiguous(const char* name, const Tensor& t) {
  if (!t.is_contiguous()) fail(name, " must be contiguous, got a strided view ", shape_text(t));
}

inline void check_head_dim(const char* name, int64_t head_dim) {
  if (!is_head_dim(head_dim)) {
    fail(name, " must have a head_dim of ", head_dims_text(), ", got ", head_dim);
  }
}

inline void check_head_multiple(int64_t num_q_heads, const char* k_name, int64_t num_kv_heads) {
  if (num_kv_heads == 0 || num_q_heads % num_kv_heads != 0) {
    fail("q must have a multiple of the heads of ", k_name, " (", num_kv_heads, "), got ",
         num_q_heads);
  }
}

inline void check_num_keys(const char* name, int64_t num_kv) {
  if (num_kv > std::numeric_limits<int32_t>::max()) {
    fail(name, " must have fewer than 2^31 rows, got ", num_kv);
  }
}

// Checks k and v as a pair: same device, dtype and shape.
inline void check_key_value(const Tensor& k, const Tensor& v) {
  check_same_device("v", v, "k", k);
  check_same_dtype("v", v, "k", k);
  check_ndim("v", v, 4, "(batch, heads, tokens, head_dim)");
  check_same_shape("v", v, "k", k);
  check_last_dim_contiguous("v", v);
}

inline Problem check_query_key(const Tensor& q, const Tensor& k) {
  check_same_device("k", k, "q", q);
  Problem problem{};
  problem.dtype = check_float_dtype("q", q);
  check_same_dtype("k", k, "q", q);
  check_ndim("q", q, 4, "(batch, heads, tokens, head_dim)");
  check_ndim("k", k, 4, "(batch, heads, tokens, head_dim)");
  check_head_dim("q", q.size(3));
  check_size("k", k, 3, q.size(3), "head_dim of q");
  check_size("k", k, 0, q.size(0), "batch of q");
  check_head_multiple(q.size(1), "k", k.size(1));
  if (q.size(2) > k.size(2)) {
    fail("q must have no more rows than k (", k.size(2), "), got ", q.size(2));
  }
  check_num_keys("k", k.size(2));
  check_last_dim_contiguous("q", q);
  check_last_dim_contiguous("k", k);
  problem.batch = q.size(0);
  problem.num_q_heads = q.size(1);
  problem.num_kv_heads = k.size(1);
  problem.num_perm_heads = k.size(1);
  problem.num_q = q.size(2);
  problem.num_kv = k.size(2);
  problem.head_dim = q.size(3);
  return problem;
}

// The heads of a permuted tensor: one per KV head or one per query head.
inline int64_t check_perm_heads(const char* name, int64_t num_heads, const Problem& problem) {
  if (num_heads != problem.num_kv_heads && num_heads != problem.num_q_heads) {
    fail(name, " must have ", problem.num_kv_heads, " heads (one per KV head) or ",
         problem.num_q_heads, " (one per query head), got ", num_heads);
  }
  return num_heads;
}

inline void check_block(const char* name, int64_t size) {
  if (size != 32 && size != 64 && size != 128) fail(name, " must be 32, 64 or 128, got ", size);
}

inline void check_segment(int64_t segment_size, const char* name, int64_t block) {
  if (segment_size <= 0 || segment_size % block != 0) {
    fail("segment_size must be a positive multiple of ", name, " (", block, "), got ",
         segment_size);
  }
}

inline Blocking check_blocking(int64_t block_size, std::optional<int64_t> kv_block_size,
                               int64_t segment_size) {
  check_block("block_size", block_size);
  const int64_t kv_block = kv_block_size.value_or(block_size);
  check_block("kv_block_size", kv_block);
  check_segment(segment_size, "block_size", block_size);
  check_segment(segment_size, "kv_block_size", kv_block);
  return Blocking{block_size, kv_block, segment_size};
}

inline float check_scale(std::optional<double> scale, int64_t head_dim) {
  const double value = scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  if (!std::isfinite(static_cast<float>(value))) fail("scale must be finite, got ", value);
  return static_cast<float>(value);
}

// Whether `value` is the second of two valid words.
inline bool check_choice(const char* name, const std::string& value, const char* first,
                         const char* second) {
  if (value == second) return true;
  if (value == first) return false;
  fail(name, " must be \"", first, "\" or \"", second, "\", got \"", value, "\"");
}

inline int32_t check_num_samples(int64_t num_samples, int64_t block_size) {
  if (num_samples < 1 || num_samples > block_size) {
    fail("num_samples must lie in [1, ", block_size, "], got ", num_samples);
  }
  return static_cast<int32_t>(num_samples);
}

inline Score check_score(const std::string& score) {
  return check_choice("score", score, "mean", "sampled") ? Score::kSampled : Score::kMean;
}

inline MassRule check_mass(const std::string& mass, Score score) {
  if (mass != "earlier" && mass != "causal" && mass != "block") {
    fail("mass must be \"earlier\", \"causal\" or \"block\", got \"", mass, "\"");
  }
  switch (score) {
    case Score::kMean:
      if (mass != "block") return mass == "causal" ? MassRule::kCausal : MassRule::kEarlier;
      fail("mass must be \"earlier\" or \"causal\" with score \"mean\", got \"block\"");
    case Score::kSampled:
      if (mass == "block") return MassRule::kBlock;
      fail("mass must be \"block\" with score \"sampled\", got \"", mass, "\"");
  }
  fail("score must be one with a rule of mass");
}

// The default thresholds of PBSConfig (pbs_attn/config.py).
inline double default_threshold(MassRule rule) {
  switch (rule) {
    case MassRule::kEarlier:
      return 0.9;
    case MassRule::kCausal:
      return 0.95;
    case MassRule::kBlock:
      return 0.005;
  }
  fail("mass must be one with a default threshold");
}

// 1 visits everything. With kBlock, thresholds that only make sense for a sum are refused: hardly
// any block reaches them by itself. The message has the range of the rule.
inline double check_threshold(std::optional<double> threshold, MassRule rule) {
  constexpr double kMostOfBlock = 0.5;
  const double value = threshold.value_or(default_threshold(rule));
  const double most = rule == MassRule::kBlock ? kMostOfBlock : 1.0;
  if ((value > 0.0 && value <= most) || value == 1.0) return value;
  if (rule != MassRule::kBlock) fail("threshold must lie in (0, 1], got ", value);
  fail("threshold must lie in (0, ", kMostOfBlock, "] or be 1 with mass \"block\", got ", value);
}

inline bool check_select_per(const std::string& select_per, Score score, const Problem& problem) {
  if (!check_choice("select_per", select_per, "query_head", "kv_head")) return false;
  if (score != Score::kSampled) {
    fail("select_per must be \"query_head\" with score \"mean\", got \"kv_head\"");
  }
  if (problem.num_perm_heads != problem.num_kv_heads) {
    fail("select_per must be \"query_head\" with an order per query head, got \"kv_head\"");
  }
  return true;
}

inline int64_t check_rows(const char* name, int64_t rows) {
  if (rows < 0) fail(name, " must not be negative, got ", rows);
  return rows;
}

// The settings of select_blocks, as a call gives them.
struct RuleSettings {
  const std::string& score;
  const std::string& mass;
  std::optional<double> threshold;
  int64_t num_samples;
  const std::string& select_per;
  int64_t window;
  int64_t dense_tail;
};

// `problem` already has its num_perm_heads.
inline SelectRule check_rule(const RuleSettings& settings, const Problem& problem,
                             const Blocking& blocking) {
  SelectRule rule{};
  rule.num_samples = check_num_samples(settings.num_samples, blocking.block_size);
  rule.score = check_score(settings.score);
  rule.mass = check_mass(settings.mass, rule.score);
  rule.threshold = check_threshold(settings.threshold, rule.mass);
  rule.shares_heads = check_select_per(settings.select_per, rule.score, problem);
  rule.window = check_rows("window", settings.window);
  rule.dense_tail = check_rows("dense_tail", settings.dense_tail);
  return rule;
}

inline int64_t check_num_heavy(std::optional<int64_t> num_heavy) {
  if (num_heavy.has_value() && *num_heavy < 0) {
    fail("num_heavy must not be negative, got ", *num_heavy);
  }
  return num_heavy.value_or(-1);
}

// In torch a dimension of size 1 may have any stride, and nothing is read with it.
inline int64_t stride_of(const Tensor& t, int64_t dim) {
  return t.size(dim) == 1 ? 0 : t.stride(dim);
}

inline ConstRows const_rows(const Tensor& t) {
  return ConstRows{t.const_data_ptr(), stride_of(t, 0), stride_of(t, 1), stride_of(t, 2)};
}

inline MutableRows mutable_rows(Tensor& t) {
  return MutableRows{t.mutable_data_ptr(), stride_of(t, 0), stride_of(t, 1), stride_of(t, 2)};
}

}  // namespace pbs
