// Attention of sequences of different lengths: packed in one tensor (varlen), or with their keys
// and values in pages. The sequences run through the stages one after the other. The host knows all
// lengths, so nothing waits for a GPU.
#pragma once

#include <vector>

#include "sequence_checks.h"
#include "stage_ops.h"

namespace pbs {

template <class Backend>
struct SequenceOps {
  using Stages = StageOps<Backend>;

  // q (Tq, Hq, D), k and v (Tk, Hkv, D) -> like q.
  static Tensor attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                 const AttentionSettings& settings) {
    const Backend backend("attention_varlen", "q", q);
    Problem problem = check_tokens(q, k, v);
    const std::vector<int64_t> q_begins = check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "q", q);
    const std::vector<int64_t> k_begins = check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "k", k);
    if (k_begins.size() != q_begins.size()) {
      fail("cu_seqlens_k must have the size of cu_seqlens_q (", q_begins.size(), "), got ",
           k_begins.size());
    }
    const AttentionRule rule = check_settings(settings, problem);
    std::vector<Sequence> sequences;
    for (size_t i = 0; i + 1 < q_begins.size(); ++i) {
      const Sequence sequence{static_cast<int64_t>(i), q_begins[i], q_begins[i + 1] - q_begins[i],
                              k_begins[i + 1] - k_begins[i]};
      check_sequence("cu_seqlens_k", sequence);
      if (sequence.num_q > 0) sequences.push_back(sequence);
    }
    const Operands all{token_rows(q), token_rows(k), token_rows(v)};
    check_all(backend, sequences, problem, rule, all, OperandNames{});
    Tensor out = torch::stable::empty_like(q);
    for (const Sequence& sequence : sequences) {
      const int64_t first_k = k_begins[static_cast<size_t>(sequence.idx)];
      const Operands operands{from_row(all.q, sequence.first_q, problem.dtype),
                              from_row(all.k, first_k, problem.dtype),
                              from_row(all.v, first_k, problem.dtype)};
      Stages::run_attention(backend, problem_of(problem, sequence), rule, operands,
                            writable(from_row(token_rows(out), sequence.first_q, problem.dtype)),
                            q);
    }
    return out;
  }

  // q (Tq, Hq, D), k_cache and v_cache (num_pages, page_size, Hkv, D), block_table
  // (num_seqs, pages) -> like q. A sequence's keys and values are copied out of their pages.
  static Tensor attention_paged(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                const Tensor& cu_seqlens_q, const Tensor& seq_lens,
                                const Tensor& block_table, const AttentionSettings& settings) {
    const Backend backend("attention_paged", "q", q);
    Problem problem = check_pages(q, k_cache, v_cache);
    const std::vector<Sequence> sequences =
        check_sequences(q, k_cache, cu_seqlens_q, seq_lens, block_table);
    const AttentionRule rule = check_settings(settings, problem);
    const Operands all{token_rows(q), page_rows(k_cache), page_rows(v_cache)};
    check_all(backend, sequences, problem, rule, all, kInPages);
    Tensor out = torch::stable::empty_like(q);
    for (const Sequence& sequence : sequences) {
      const Problem own = problem_of(problem, sequence);
      const auto [k, v] = copy_rows(backend, own, /*first_row=*/0, all,
                                    pages_of(block_table, k_cache, sequence), q);
      const Operands operands{from_row(all.q, sequence.first_q, problem.dtype), const_rows(k),
                              const_rows(v)};
      Stages::run_attention(backend, own, rule, operands,
                            writable(from_row(token_rows(out), sequence.first_q, problem.dtype)),
                            q);
    }
    return out;
  }

  // The same, causal, with output to `out`. The keys and values of segments that a sequence has
  // completed since its first query here are ordered in their pages. Earlier segments are ordered
  // already. If k and v (Tq, Hkv, D) are given, they are those of the queries' own positions.
  static void attention_paged_in_order(const Tensor& q, const Tensor& k_cache,
                                       const Tensor& v_cache, const Tensor& out,
                                       const Tensor& cu_seqlens_q, const Tensor& seq_lens,
                                       const Tensor& block_table, std::optional<Tensor> k,
                                       std::optional<Tensor> v, const AttentionSettings& settings) {
    const Backend backend("attention_paged_", "q", q);
    Problem problem = check_pages(q, k_cache, v_cache);
    check_out(out, q);
    check_apart("out", out, "q", q);
    check_apart("out", out, "k_cache", k_cache);
    check_apart("out", out, "v_cache", v_cache);
    check_new_tokens(k, v, q, k_cache, v_cache, out, problem);
    const std::vector<Sequence> sequences =
        check_sequences(q, k_cache, cu_seqlens_q, seq_lens, block_table);
    const AttentionRule rule = check_settings(settings, problem);
    check_order_in_pages(k_cache.size(1), rule, problem);
    const Operands all{token_rows(q), page_rows(k_cache), page_rows(v_cache)};
    check_all(backend, sequences, problem, rule, all, kInPages);
    backend.check_aligned_rows("out", token_rows(out), problem.dtype);
    if (k.has_value()) {
      backend.check_aligned_rows("k", token_rows(*k), problem.dtype);
      backend.check_aligned_rows("v", token_rows(*v), problem.dtype);
    }
    for (const Sequence& sequence : sequences) {
      const auto rows = [&](const Tensor& t) {
        return from_row(token_rows(t), sequence.first_q, problem.dtype);
      };
      const Operands operands{rows(q), all.k, all.v};
      const Problem own = problem_of(problem, sequence);
      const Pages pages = pages_of(block_table, k_cache, sequence);
      // Own segments contain every query, and the keys that earlier calls have not ordered.
      const int64_t first_row = round_down(own.num_kv - own.num_q, rule.blocking.segment_size);
      std::tuple<Tensor, Tensor> copied;
      OwnRows own_rows{first_row, {}, {}};
      if (k.has_value() && first_row == own.num_kv - own.num_q) {
        own_rows.k = rows(*k);
        own_rows.v = rows(*v);
      } else {
        copied = copy_rows(backend, own, first_row, operands, pages, q);
        own_rows.k = const_rows(std::get<0>(copied));
        own_rows.v = const_rows(std::get<1>(copied));
      }
      order_pages(backend, own, rule, operands, own_rows, pages, q);
      attend_pages(backend, own, rule, operands, own_rows, pages, writable(rows(out)), q);
    }
  }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    using Varlen = WithSettings<&attention_varlen, const Tensor&, const Tensor&, const Tensor&,
                                const Tensor&, const Tensor&>;
    using Paged = WithSettings<&attention_paged, const Tensor&, const Tensor&, const Tensor&,
                               const Tensor&, const Tensor&, const Tensor&>;
    using InOrder = WithSettings<&attention_paged_in_order, const Tensor&, const Tensor&,
                                 const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                 const Tensor&, std::optional<Tensor>, std::optional<Tensor>>;
    m.impl("attention_varlen", TORCH_BOX(&Varlen::call));
    m.impl("attention_paged", TORCH_BOX(&Paged::call));
    m.impl("attention_paged_", TORCH_BOX(&InOrder::call));
  }

 private:
  static constexpr OperandNames kInPages{"q", "k_cache", "v_cache"};

  // Keys and values from row first_row on, in their original order.
  struct OwnRows {
    int64_t first_row;
    ConstRows k;
    ConstRows v;
  };

  // Runs for every sequence before the first sequence runs through the stages.
  static void check_all(const Backend& backend, const std::vector<Sequence>& sequences,
                        const Problem& problem, const AttentionRule& rule, const Operands& all,
                        const OperandNames& names) {
    for (const Sequence& sequence : sequences) {
      backend.check_attention(all, names, problem_of(problem, sequence), rule.blocking, rule.scale,
                              rule.select);
    }
  }

  // Copies keys and values from first_row on, (1, Hkv, Nkv - first_row, D), out of their pages.
  static std::tuple<Tensor, Tensor> copy_rows(const Backend& backend, const Problem& problem,
                                              int64_t first_row, const Operands& cache,
                                              const Pages& pages, const Tensor& like) {
    const int64_t num_rows = problem.num_kv - first_row;
    const std::initializer_list<int64_t> sizes = {1, problem.num_kv_heads, num_rows,
                                                  problem.head_dim};
    Tensor k = new_tensor(like, sizes, like.scalar_type());
    Tensor v = new_tensor(like, sizes, like.scalar_type());
    CopyPagesParams params =
        copy_pages_params(problem, first_row, num_rows, cache.k, cache.v, pages);
    params.k = mutable_rows(k);
    params.v = mutable_rows(v);
    backend.copy_pages(params);
    return {k, v};
  }

  // Orders the complete segments among the own keys and values in their pages. Token 0 stays first,
  // so the position of its block is always known.
  static void order_pages(const Backend& backend, const Problem& problem, const AttentionRule& rule,
                          const Operands& operands, const OwnRows& own, const Pages& pages,
                          const Tensor& like) {
    Problem of_own = problem;
    of_own.num_kv = problem.num_kv - own.first_row;
    const int64_t num_ordered = round_down(of_own.num_kv, rule.blocking.segment_size);
    if (num_ordered == 0) return;
    const Tensor perm = Stages::run_order(backend, of_own, rule, operands.q, own.k,
                                          /*keeps_first=*/own.first_row == 0, like);
    PermuteKVParams permuting =
        permute_kv_params(own.k, own.v, perm, of_own, rule.blocking.kv_block_size);
    permuting.num_copied = num_ordered;
    permuting.first_page_row = own.first_row;
    permuting.pages = pages;
    permuting.k_perm = writable(operands.k);
    permuting.v_perm = writable(operands.v);
    backend.permute_kv(permuting);
  }

  static void attend_pages(const Backend& backend, const Problem& problem,
                           const AttentionRule& rule, const Operands& operands, const OwnRows& own,
                           const Pages& pages, const MutableRows& out, const Tensor& like) {
    const Blocking& blocking = rule.blocking;
    SelectBlocksParams selecting =
        select_blocks_params(operands.q, own.k, operands.k, problem, blocking, rule.scale,
                             /*is_causal=*/true, rule.select);
    selecting.first_k_row = own.first_row;
    selecting.pages = pages;
    const Tensor block_mask = std::get<0>(Stages::run_select_blocks(backend, selecting, like));
    AttendParams attending =
        attend_params(operands.q, own.k, own.v, operands.k, operands.v, block_mask, problem,
                      blocking, rule.scale, /*is_causal=*/true);
    attending.first_k_row = own.first_row;
    attending.pages = pages;
    attending.out = out;
    Stages::run_attend(backend, attending, like);
  }
};

}  // namespace pbs
