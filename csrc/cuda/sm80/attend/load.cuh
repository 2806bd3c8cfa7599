// Where the keys and values of a query block are, tile by tile, and their way to shared memory.
//
// What is known from one tile to the next lies in shared memory, too: registers are for the
// accumulators.
#pragma once

#include "pbs/bitmask.h"
#include "traits.cuh"

namespace pbs::cuda::sm80 {

// The selected blocks of a row of the mask, in ascending order. Each warp walks for itself; its
// lanes agree on all numbers, and each writes the same.
class SelectedBlocks {
 public:
  __device__ explicit SelectedBlocks(MaskWalk& walk) : walk_(walk) {}

  // Before the first one.
  __device__ __forceinline__ void begin() {
    walk_.bits = walk_.filled = 0;
    walk_.word = -1;
  }

  // The next one. There must be one.
  template <class Work>
  __device__ __forceinline__ int next(const Work& work) {
    uint32_t bits = walk_.bits;
    int word = walk_.word;
    if (bits == 0) {
      uint32_t filled = walk_.filled;
      if (filled == 0) filled = take_words(work, word);
      const int nth = __ffs(filled) - 1;
      walk_.filled = filled & (filled - 1);
      word = word / 32 * 32 + nth;
      bits = walk_.words[nth];
    }
    const int bit = __ffs(bits) - 1;
    __syncwarp();  // all lanes have read
    walk_.bits = bits & (bits - 1);
    walk_.word = word;
    return word * 32 + bit;
  }

 private:
  // The next 32 words that are not all empty. Returns which of them are not.
  template <class Work>
  __device__ __forceinline__ uint32_t take_words(const Work& work, int& word) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int num_candidates = work.num_candidates;
    uint32_t filled = 0;
    do {
      word = word < 0 ? 0 : word / 32 * 32 + 32;
      const int w = word + lane;
      const uint32_t own =
          w * 32 < num_candidates ? candidate_bits(work.mask_words[w], w, num_candidates) : 0;
      walk_.words[lane] = own;
      filled = __ballot_sync(~0u, own != 0);
    } while (filled == 0);
    __syncwarp();
    return filled;
  }

  MaskWalk& walk_;
};

// Loads the tiles of a query block, in the order of KeyTiles: the keys of a tile, then its values,
// then the keys of the next one.
template <class Traits>
class TileLoader {
 public:
  using Element = typename Traits::Element;
  using Shared = typename Traits::Shared;
  using Work = typename Traits::Work;

  __device__ TileLoader(const DrawArgs& args, Shared& shared) : args_(args), shared_(shared) {}

  // Starts to copy the queries of a block and its first keys.
  __device__ __forceinline__ void begin(const Work& work) const {
    start_queries(work);
    start_keys(work, 0);
  }

  // Starts to copy the keys of the tile behind tile_idx: the first one of the next block, together
  // with that block's queries, where it was the last one.
  __device__ __forceinline__ void start_next(const Work& work, int tile_idx,
                                             const Work& next) const {
    const bool is_last = tile_idx + 1 == work.tiles.total;
    if (is_last && next.tiles.total < 0) return;
    if (is_last) start_queries(next);
    start_keys(is_last ? next : work, is_last ? 0 : tile_idx + 1);
  }

  // Starts to copy the values of a tile whose keys were copied last.
  __device__ __forceinline__ void start_values(const Work& work, int tile_idx) const {
    const AttendParams& params = args_.params;
    if (tile_idx < work.tiles.num_own) {
      copy_own(shared_.v, params.v, work);
    } else {
      copy_selected(shared_.v, params.v_perm, work);
    }
  }

 private:
  static constexpr int kAbsent = -1;

  __device__ __forceinline__ MaskWalk& walk() const { return shared_.walks[read_thread() / 32]; }

  __device__ __forceinline__ void start_queries(const Work& work) const {
    const ConstRows& q = args_.params.q;
    SelectedBlocks(walk()).begin();
    walk().next_row = 0;
    __syncwarp();
    const Element* rows = static_cast<const Element*>(q.data) +
                          row_start(q, RowPlace{work.b, work.first_row}, work.q_head);
    Traits::QueryCopy::template start<kTileRows>(shared_.q, 0, rows, q.row_stride, work.num_rows);
  }

  // Finds the rows of tile tile_idx and starts to copy its keys.
  __device__ __forceinline__ void start_keys(const Work& work, int tile_idx) const {
    const AttendParams& params = args_.params;
    if (tile_idx < work.tiles.num_own) {
      find_own(work, tile_idx);
      copy_own(shared_.k, params.k, work);
    } else {
      find_selected(work, tile_idx);
      copy_selected(shared_.k, params.k_perm, work);
    }
  }

  __device__ __forceinline__ void find_own(const Work& work, int tile_idx) const {
    const int first = work.own_begin + own_tile_begin(work.tiles, tile_idx, Traits::kKeys);
    MaskWalk& walk = this->walk();
#pragma unroll
    for (int i = 0; i < Traits::kParts; ++i) walk.rows[i] = first + i * kPartRows;
    __syncwarp();
  }

  __device__ __forceinline__ void find_selected(const Work& work, int tile_idx) const {
    const int num_parts = tile_idx == work.tiles.num_own
                              ? work.tiles.first_selected_size / kPartRows
                              : Traits::kParts;
    const auto kv_block_size = static_cast<int>(args_.params.blocking.kv_block_size);
    MaskWalk& walk = this->walk();
    int row = walk.next_row;
#pragma unroll 1
    for (int i = 0; i < Traits::kParts; ++i) {
      if (i >= num_parts) {
        walk.rows[i] = kAbsent;
        continue;
      }
      if (row % kv_block_size == 0) row = SelectedBlocks(walk).next(work) * kv_block_size;
      walk.rows[i] = in_pages(row);
      row += kPartRows;
    }
    __syncwarp();
    walk.next_row = row;
  }

  // A row of permuted keys, counted through all pages. A page that does not exist has none.
  __device__ __forceinline__ int in_pages(int row) const {
    const Pages& pages = args_.params.pages;
    if (pages.table == nullptr) return row;
    const int page = pages.table[row >> args_.page_shift];
    if (page < 0 || page >= pages.num_pages) return kAbsent;
    return page << args_.page_shift | (row & ((1 << args_.page_shift) - 1));
  }

  // Rows behind the last one do not exist.
  __device__ __forceinline__ void copy_own(Element* to, const ConstRows& from,
                                           const Work& work) const {
    const auto num_own = static_cast<int>(args_.params.problem.num_kv - args_.params.first_k_row);
    const MaskWalk& walk = this->walk();
#pragma unroll
    for (int i = 0; i < Traits::kParts; ++i) {
      const int row = walk.rows[i];
      copy_part(to, i, from, work.b, work.kv_head, min(row, num_own - 1), num_own - row);
    }
    commit_copies();
  }

  __device__ __forceinline__ void copy_selected(Element* to, const ConstRows& from,
                                                const Work& work) const {
    const int row_mask = static_cast<int>((1u << args_.page_shift) - 1);
    const MaskWalk& walk = this->walk();
#pragma unroll
    for (int i = 0; i < Traits::kParts; ++i) {
      const int found = walk.rows[i];
      const int row = max(found, 0);
      copy_part(to, i, from, work.b + (row >> args_.page_shift), work.perm_head, row & row_mask,
                found == kAbsent ? 0 : kPartRows);
    }
    commit_copies();
  }

  __device__ __forceinline__ void copy_part(Element* to, int part, const ConstRows& from, int b,
                                            int head, int row, int num_rows) const {
    const Element* rows =
        static_cast<const Element*>(from.data) + row_start(from, RowPlace{b, row}, head);
    Traits::KeyCopy::template start<kPartRows>(to, part * kPartRows, rows, from.row_stride,
                                               num_rows);
  }

  const DrawArgs& args_;
  Shared& shared_;
};

}  // namespace pbs::cuda::sm80
