// Loads the tiles of a query block, in the order of KeyTiles: the keys of a tile, then its values,
// then the keys of the next one.
#pragma once

#include <climits>

#include "key_list.cuh"
#include "traits.cuh"

namespace pbs::cuda::sm80 {

template <class Traits>
class TileLoader {
 public:
  using Element = typename Traits::Element;
  using Shared = typename Traits::Shared;
  using Work = typename Traits::Work;

  __device__ TileLoader(const AttendArgs& args, Shared& shared, int thread)
      : args_(args), shared_(shared), thread_(thread) {}

  // Starts to copy the queries of the block of a slot and its first keys.
  __device__ __forceinline__ void begin(int slot) const {
    start_queries(slot);
    start_keys(slot, 0);
  }

  // Starts to copy the keys of the tile behind tile_idx: the first one of the next block, together
  // with that block's queries, where it was the last one.
  __device__ __forceinline__ void start_next(int slot, int tile_idx) const {
    ++tile_idx;
    if (tile_idx == shared_.work[slot].tiles.total) {
      slot ^= 1;
      tile_idx = 0;
      if (shared_.work[slot].tiles.total < 0) return;
      start_queries(slot);
    }
    start_keys(slot, tile_idx);
  }

  __device__ __forceinline__ void start_keys(int slot, int tile_idx) const {
    copy(shared_.k, args_.params.k, args_.params.k_perm, slot, tile_idx);
  }
  __device__ __forceinline__ void start_values(int slot, int tile_idx) const {
    copy(shared_.v, args_.params.v, args_.params.v_perm, slot, tile_idx);
  }

 private:
  __device__ __forceinline__ void start_queries(int slot) const {
    const Work& work = shared_.work[slot];
    const ConstRows& q = args_.params.q;
    const Element* rows = static_cast<const Element*>(q.data) +
                          row_start(q, RowPlace{work.b, work.first_row}, work.q_head);
    Traits::QueryCopy::template start<kTileRows>(renewed(thread_), shared_.q, 0, rows, q.row_stride,
                                                 work.num_rows);
  }

  // Without a branch, so that products run beside it.
  __device__ __forceinline__ void copy(Element* to, const ConstRows& own, const ConstRows& permuted,
                                       int slot, int tile_idx) const {
    const Work& work = shared_.work[slot];
    const bool is_own = tile_idx < work.tiles.num_own;
    const int32_t* found = list_of(args_, slot) + tile_idx * Traits::kParts;
    const ConstRows from{is_own ? own.data : permuted.data,
                         is_own ? own.batch_stride : permuted.batch_stride,
                         is_own ? own.head_stride : permuted.head_stride,
                         is_own ? own.row_stride : permuted.row_stride};
    const int head = is_own ? work.kv_head : work.perm_head;
    // Own rows behind the last one do not exist, and own keys lie in no pages.
    const int end = is_own ? args_.num_own : INT_MAX;
    const int shift = is_own ? 31 : args_.page_shift;
    const int row_mask = static_cast<int>((1u << shift) - 1);
#pragma unroll
    for (int i = 0; i < Traits::kParts; ++i) {
      const int row = max(found[i], 0);
      const RowPlace place{work.b + (row >> shift), row & row_mask};
      Traits::KeyCopy::template start<kPartRows>(
          renewed(thread_), to, i * kPartRows,
          static_cast<const Element*>(from.data) + row_start(from, place, head), from.row_stride,
          found[i] == kAbsent ? 0 : end - row);
    }
    commit_copies();
  }

  const AttendArgs& args_;
  Shared& shared_;
  int thread_;
};

}  // namespace pbs::cuda::sm80
