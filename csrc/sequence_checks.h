// Checks the arguments of sequence_ops.h, and converts checked tensors to rows and pages.
#pragma once

#include <limits>
#include <vector>

#include "settings.h"

namespace pbs {

struct Sequence {
  int64_t idx;
  int64_t first_q;  // row of q
  int64_t num_q;    // positive if the sequence runs
  int64_t num_kv;
};

// The number of rows of a page must be a multiple of this.
constexpr int64_t kPageStep = 16;

// Rows of a (tokens, heads, head_dim) tensor, as one batch.
inline ConstRows token_rows(const Tensor& t) {
  return ConstRows{t.const_data_ptr(), 0, stride_of(t, 1), stride_of(t, 0)};
}

// Pages of a (pages, page_size, heads, head_dim) tensor. The page index is the batch index.
inline ConstRows page_rows(const Tensor& t) {
  return ConstRows{t.const_data_ptr(), stride_of(t, 0), stride_of(t, 2), stride_of(t, 1)};
}

inline ConstRows from_row(ConstRows rows, int64_t row, DType dtype) {
  rows.data = static_cast<const char*>(rows.data) + row * rows.row_stride * element_size(dtype);
  return rows;
}

inline Problem problem_of(Problem problem, const Sequence& sequence) {
  problem.batch = 1;
  problem.num_q = sequence.num_q;
  problem.num_kv = sequence.num_kv;
  return problem;
}

inline Pages pages_of(const Tensor& block_table, const Tensor& k_cache, const Sequence& sequence) {
  const int64_t page_size = k_cache.size(1);
  return Pages{block_table.const_data_ptr<int32_t>() + sequence.idx * block_table.stride(0),
               ceil_div(sequence.num_kv, page_size), page_size, k_cache.size(0)};
}

// Checks q and the keys. k_head_dim is the dimension of the heads of k, in which tensors of tokens
// and pages differ.
inline Problem check_heads(const Tensor& q, const char* k_name, const Tensor& k,
                           int64_t k_head_dim) {
  check_head_dim("q", q.size(2));
  check_size(k_name, k, k_head_dim + 1, q.size(2), "head_dim of q");
  check_head_multiple(q.size(1), k_name, k.size(k_head_dim));
  Problem problem{};
  problem.num_q_heads = q.size(1);
  problem.num_kv_heads = k.size(k_head_dim);
  problem.num_perm_heads = problem.num_kv_heads;
  problem.head_dim = q.size(2);
  return problem;
}

struct NamedKeys {
  const char* name;
  const Tensor& tensor;
};

// Checks keys and values of the same layout.
inline Problem check_sequence_operands(const Tensor& q, const NamedKeys& k, const NamedKeys& v,
                                       int64_t ndim, const char* layout) {
  check_same_device(k.name, k.tensor, "q", q);
  check_same_device(v.name, v.tensor, "q", q);
  const DType dtype = check_float_dtype("q", q);
  check_same_dtype(k.name, k.tensor, "q", q);
  check_same_dtype(v.name, v.tensor, "q", q);
  check_ndim("q", q, 3, "(tokens, heads, head_dim)");
  check_ndim(k.name, k.tensor, ndim, layout);
  check_ndim(v.name, v.tensor, ndim, layout);
  Problem problem = check_heads(q, k.name, k.tensor, ndim - 2);
  problem.dtype = dtype;
  check_same_shape(v.name, v.tensor, k.name, k.tensor);
  check_last_dim_contiguous("q", q);
  check_last_dim_contiguous(k.name, k.tensor);
  check_last_dim_contiguous(v.name, v.tensor);
  return problem;
}

inline Problem check_tokens(const Tensor& q, const Tensor& k, const Tensor& v) {
  const Problem problem =
      check_sequence_operands(q, {"k", k}, {"v", v}, 3, "(tokens, heads, head_dim)");
  check_num_keys("k", k.size(0));
  return problem;
}

inline Problem check_pages(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache) {
  const Problem problem = check_sequence_operands(q, {"k_cache", k_cache}, {"v_cache", v_cache}, 4,
                                                  "(pages, page_size, heads, head_dim)");
  const int64_t page_size = k_cache.size(1);
  if (page_size == 0 || page_size % kPageStep != 0) {
    fail("k_cache must have a page_size that is a multiple of ", kPageStep, ", got ", page_size);
  }
  check_num_keys("k_cache", k_cache.size(0) * page_size);
  return problem;
}

inline void check_out(const Tensor& out, const Tensor& q) {
  check_same_device("out", out, "q", q);
  check_same_dtype("out", out, "q", q);
  check_ndim("out", out, 3, "(tokens, heads, head_dim)");
  check_same_shape("out", out, "q", q);
  check_last_dim_contiguous("out", out);
  for (int64_t dim = 0; dim < 2; ++dim) {
    if (out.size(dim) > 1 && out.stride(dim) == 0) {
      fail("out must have memory for each row, got stride 0 in dimension ", dim);
    }
  }
}

// The memory from the first to the last element of a tensor. Strides are not negative.
struct Memory {
  const char* begin;
  const char* end;
};

inline Memory memory_of(const Tensor& t) {
  int64_t last = 0;
  for (int64_t dim = 0; dim < t.dim(); ++dim) last += (t.size(dim) - 1) * t.stride(dim);
  const auto* begin = static_cast<const char*>(t.const_data_ptr());
  return Memory{begin, begin + (last + 1) * element_size(check_float_dtype("q", t))};
}

// Memory that a call writes must not overlap memory that it reads.
inline void check_apart(const char* name, const Tensor& t, const char* other_name,
                        const Tensor& other) {
  if (t.numel() == 0 || other.numel() == 0) return;
  const Memory own = memory_of(t);
  const Memory its = memory_of(other);
  if (own.begin < its.end && its.begin < own.end) {
    fail(name, " must share no memory with ", other_name, ", got ", its.begin - own.begin,
         " bytes from its start to that of ", other_name);
  }
}

// Checks the keys and values of the queries' own positions. Both must be given, or none.
inline void check_new_tokens(const std::optional<Tensor>& k, const std::optional<Tensor>& v,
                             const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                             const Tensor& out, const Problem& problem) {
  if (!k.has_value() && !v.has_value()) return;
  if (!v.has_value()) fail("k and v must be given together, got k alone");
  if (!k.has_value()) fail("k and v must be given together, got v alone");
  check_sequence_operands(q, {"k", *k}, {"v", *v}, 3, "(tokens, heads, head_dim)");
  check_size("k", *k, 0, q.size(0), "rows of q");
  check_size("k", *k, 1, problem.num_kv_heads, "heads of k_cache");
  // Pages are written while the own keys of the queries are still read.
  check_apart("k", *k, "k_cache", k_cache);
  check_apart("k", *k, "v_cache", v_cache);
  check_apart("v", *v, "k_cache", k_cache);
  check_apart("v", *v, "v_cache", v_cache);
  check_apart("out", out, "k", *k);
  check_apart("out", out, "v", *v);
}

// One-dimensional tensors that the host reads.
inline std::vector<int64_t> check_lengths(const char* name, const Tensor& t) {
  check_defined(name, t);
  if (!t.is_cpu()) fail(name, " must be on the CPU, got ", device_text(t));
  const ScalarType dtype = dtype_of(t);
  if (dtype != ScalarType::Int && dtype != ScalarType::Long) {
    fail(name, " must be int32 or int64, got ", dtype_text(dtype));
  }
  check_ndim(name, t, 1, "(sequences)");
  check_contiguous(name, t);
  const auto size = t.size(0);
  if (dtype == ScalarType::Long) {
    const int64_t* values = t.const_data_ptr<int64_t>();
    return {values, values + size};
  }
  const int32_t* values = t.const_data_ptr<int32_t>();
  return {values, values + size};
}

// Returns where each sequence begins among the rows of t, and where the last one ends.
inline std::vector<int64_t> check_cu_seqlens(const char* name, const Tensor& cu_seqlens,
                                             const char* t_name, const Tensor& t) {
  std::vector<int64_t> begins = check_lengths(name, cu_seqlens);
  if (begins.empty() || begins.front() != 0) {
    const std::string first = begins.empty() ? "nothing" : std::to_string(begins.front());
    fail(name, " must begin with 0, got ", first);
  }
  for (size_t i = 1; i < begins.size(); ++i) {
    if (begins[i] < begins[i - 1]) {
      fail(name, " must not decrease, got ", begins[i], " after ", begins[i - 1]);
    }
  }
  if (begins.back() != t.size(0)) {
    fail(name, " must end with the rows of ", t_name, " (", t.size(0), "), got ", begins.back());
  }
  return begins;
}

// `name` is the argument with the number of keys of each sequence.
inline void check_sequence(const char* name, const Sequence& sequence) {
  if (sequence.num_kv > std::numeric_limits<int32_t>::max()) {
    fail(name, " must give sequence ", sequence.idx, " fewer than 2^31 keys, got ",
         sequence.num_kv);
  }
  if (sequence.num_kv < sequence.num_q) {
    fail(name, " must give sequence ", sequence.idx, " as many keys as queries (", sequence.num_q,
         ") or more, got ", sequence.num_kv);
  }
}

// Checks the pages that sequences need. Page numbers are checked on the CPU only, where the host
// can read them.
inline void check_block_table(const Tensor& block_table, const Tensor& k_cache,
                              const std::vector<Sequence>& sequences) {
  if (!sequences.empty() && k_cache.size(0) == 0) {
    fail("k_cache must have a page, got ", shape_text(k_cache));
  }
  for (const Sequence& sequence : sequences) {
    const Pages pages = pages_of(block_table, k_cache, sequence);
    if (pages.num_entries > block_table.size(1)) {
      fail("block_table must have ", pages.num_entries, " pages for the ", sequence.num_kv,
           " keys of sequence ", sequence.idx, ", got ", block_table.size(1));
    }
    for (int64_t i = 0; block_table.is_cpu() && i < pages.num_entries; ++i) {
      const int32_t page = pages.table[i];
      if (page < 0 || page >= pages.num_pages) {
        fail("block_table must hold pages from 0 to ", pages.num_pages - 1, ", got ", page);
      }
    }
  }
}

// Checks all arguments, and returns the sequences that have queries.
inline std::vector<Sequence> check_sequences(const Tensor& q, const Tensor& k_cache,
                                             const Tensor& cu_seqlens_q, const Tensor& seq_lens,
                                             const Tensor& block_table) {
  const std::vector<int64_t> begins = check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "q", q);
  const std::vector<int64_t> lengths = check_lengths("seq_lens", seq_lens);
  const int64_t num_sequences = static_cast<int64_t>(begins.size()) - 1;
  check_size("seq_lens", seq_lens, 0, num_sequences, "sequences of cu_seqlens_q");
  check_same_device("block_table", block_table, "q", q);
  check_dtype("block_table", block_table, ScalarType::Int);
  check_ndim("block_table", block_table, 2, "(sequences, pages)");
  check_size("block_table", block_table, 0, num_sequences, "sequences of cu_seqlens_q");
  check_last_dim_contiguous("block_table", block_table);
  std::vector<Sequence> sequences;
  for (int64_t i = 0; i < num_sequences; ++i) {
    const auto at = static_cast<size_t>(i);
    const Sequence sequence{i, begins[at], begins[at + 1] - begins[at], lengths[at]};
    check_sequence("seq_lens", sequence);
    if (sequence.num_q > 0) sequences.push_back(sequence);
  }
  check_block_table(block_table, k_cache, sequences);
  return sequences;
}

// Keys can only be ordered in their pages if no page border cuts a segment, if all query heads
// share an order, and if the scores need no means.
inline void check_order_in_pages(int64_t page_size, const AttentionRule& rule,
                                 const Problem& problem) {
  const int64_t segment_size = rule.blocking.segment_size;
  if (!rule.is_causal) fail("is_causal must be true for pages that are put in order, got false");
  if (reads_means(rule.select.score)) {
    fail("score must be \"sampled\" for pages that are put in order, got \"mean\"");
  }
  if (problem.num_perm_heads != problem.num_kv_heads) {
    fail("permute_per must be \"kv_head\" for pages that are put in order, got \"query_head\"");
  }
  if (page_size % segment_size != 0 || (page_size & (page_size - 1)) != 0) {
    fail("k_cache must have a page_size that is a power of two and a multiple of segment_size (",
         segment_size, ") for pages that are put in order, got ", page_size);
  }
}

}  // namespace pbs
