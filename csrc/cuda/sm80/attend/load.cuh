// Loads the tiles of a query block in the order of KeyTiles: first the keys of a tile, then its
// values, then the keys of the next tile.
#pragma once

#include "key_list.cuh"
#include "traits.cuh"

namespace pbs::cuda::sm80 {

template <class Traits>
class TileLoader {
 public:
  using Element = typename Traits::Element;
  using Shared = typename Traits::Shared;
  using Work = typename Traits::Work;

  __device__ TileLoader(const AttendArgs& args, Shared& shared) : args_(args), shared_(shared) {}

  // Starts to copy the queries and the first keys of the block of a slot.
  __device__ __forceinline__ void begin(int slot) const {
    start_queries(slot);
    start_keys(slot, 0);
  }

  // Starts to copy the keys of the tile after tile_idx. After the last tile, these are the first
  // keys of the next block, together with its queries.
  __device__ __forceinline__ void start_next(int slot, int tile_idx) const {
    const bool is_last = tile_idx + 1 == shared_.work[slot].tiles.total;
    if (is_last) slot ^= 1;
    if (is_last && shared_.work[slot].tiles.total < 0) return;
    if (is_last) start_queries(slot);
    start_keys(slot, is_last ? 0 : tile_idx + 1);
  }

  __device__ __forceinline__ void start_keys(int slot, int tile_idx) const {
    copy(keys(slot), slot, tile_idx);
  }
  __device__ __forceinline__ void start_values(int slot, int tile_idx) const {
    copy(values(slot), slot, tile_idx);
  }

  // Starts to copy the keys or values of the nth tile of selected keys.
  __device__ __forceinline__ void start_selected_keys(int slot, int nth) const {
    copy_selected(keys(slot), slot, nth);
    commit_copies();
  }
  __device__ __forceinline__ void start_selected_values(int slot, int nth) const {
    copy_selected(values(slot), slot, nth);
    commit_copies();
  }

 private:
  // The keys or the values of a query block, and their tile in shared memory.
  struct Source {
    const ConstRows& own;
    const ConstRows& permuted;
    const Element* head;  // its first row in `permuted`: shorter addresses need fewer registers
    Element* tile;
  };

  __device__ __forceinline__ Source keys(int slot) const {
    return Source{args_.params.k, args_.params.k_perm, shared_.k_head[slot], shared_.k};
  }
  __device__ __forceinline__ Source values(int slot) const {
    return Source{args_.params.v, args_.params.v_perm, shared_.v_head[slot], shared_.v};
  }

  __device__ __forceinline__ void start_queries(int slot) const {
    const Work& work = shared_.work[slot];
    const ConstRows& q = args_.params.q;
    const Element* rows = static_cast<const Element*>(q.data) +
                          row_start(q, RowPlace{work.b, work.first_row}, work.q_head);
    Traits::QueryCopy::template start<kTileRows>(read_thread(), shared_.q, 0, rows, q.row_stride,
                                                 work.num_rows);
  }

  __device__ __forceinline__ void copy(const Source& from, int slot, int tile_idx) const {
    const Work& work = shared_.work[slot];
    if (tile_idx < work.tiles.num_own) {
      copy_own(from, work, tile_idx);
    } else {
      copy_selected(from, slot, tile_idx - work.tiles.num_own);
    }
    commit_copies();
  }

  // Rows after the last one do not exist.
  __device__ __forceinline__ void copy_own(const Source& from, const Work& work,
                                           int tile_idx) const {
    const auto num_own = static_cast<int>(args_.params.problem.num_kv - args_.params.first_k_row);
    const int first = work.own_begin + own_tile_begin(work.tiles, tile_idx, Traits::kKeys);
    const Element* rows = static_cast<const Element*>(from.own.data) +
                          row_start(from.own, RowPlace{work.b, first}, work.kv_head);
    Traits::KeyCopy::template start<Traits::kKeys>(read_thread(), from.tile, 0, rows,
                                                   from.own.row_stride, num_own - first);
  }

  // With 256 columns, the address is read again for each tile, so that it occupies no registers in
  // between. With fewer columns, ptxas needs fewer registers if it is computed.
  __device__ __forceinline__ const int32_t* list(int slot) const {
    if constexpr (Traits::kHeadDim == 256) return shared_.list[slot];
    return list_of(args_, slot);
  }

  __device__ __forceinline__ void copy_selected(const Source& from, int slot, int nth) const {
    const int32_t* found = list(slot) + nth * Traits::kParts;
#pragma unroll
    for (int i = 0; i < Traits::kParts; ++i) {
      const int row = max(found[i], 0);
      const RowPlace place{row >> args_.page_shift, row & args_.page_mask};
      Traits::KeyCopy::template start<kPartRows>(
          read_thread(), from.tile, i * kPartRows, from.head + row_start(from.permuted, place, 0),
          from.permuted.row_stride, found[i] == kAbsent ? 0 : kPartRows);
    }
  }

  const AttendArgs& args_;
  Shared& shared_;
};

}  // namespace pbs::cuda::sm80
