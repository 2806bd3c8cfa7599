// Where the keys and values of a query block are, tile by tile, and their way to shared memory.
#pragma once

#include "pbs/bitmask.h"
#include "traits.cuh"

namespace pbs::cuda::sm80 {

// The selected blocks of a row of the mask, in ascending order; all lanes of a warp walk together.
class SelectedBlocks {
 public:
  __device__ SelectedBlocks(const uint32_t* words, int num_candidates)
      : words_(words), num_candidates_(num_candidates), lane_(threadIdx.x % 32) {
    ahead_ = load(0);
    take_words();
  }

  // The next one. There must be one.
  __device__ __forceinline__ int next() {
    while (bits_ == 0) {
      while (lanes_ == 0) take_words();
      word_ = __ffs(lanes_) - 1;
      lanes_ &= lanes_ - 1;
      bits_ = __shfl_sync(~0u, own_, word_);
    }
    const int bit = __ffs(bits_) - 1;
    bits_ &= bits_ - 1;
    return (base_ + word_) * 32 + bit;
  }

 private:
  __device__ uint32_t load(int base) const {
    const int w = base + lane_;
    return w * 32 < num_candidates_ ? candidate_bits(words_[w], w, num_candidates_) : 0;
  }

  // The next 32 words, while those behind them are on their way.
  __device__ __forceinline__ void take_words() {
    base_ += 32;
    own_ = ahead_;
    ahead_ = load(base_ + 32);
    lanes_ = __ballot_sync(~0u, own_ != 0);
  }

  const uint32_t* words_;
  int num_candidates_;
  int lane_;
  int base_ = -32;      // the first of the 32 words in work
  int word_ = 0;        // of them, the one in work
  uint32_t own_ = 0;    // the lane's word
  uint32_t ahead_;      // its next one
  uint32_t lanes_ = 0;  // whose words are not empty and still to come
  uint32_t bits_ = 0;   // of the word in work, those still to come
};

// Loads the tiles of one query block, in the order of KeyTiles: the keys of a tile, then its
// values, then the keys of the next one.
template <class Traits>
class TileLoader {
 public:
  using Element = typename Traits::Element;
  using Shared = typename Traits::Shared;
  using Work = typename Traits::Work;

  __device__ TileLoader(const DrawArgs& args, Shared& shared)
      : args_(args),
        work_(shared.work),
        k_(shared.k),
        v_(shared.v),
        blocks_(work_.mask_words, work_.num_candidates),
        parts_per_block_(static_cast<int>(args.params.blocking.kv_block_size) / kPartRows) {}

  // Finds the rows of tile tile_idx and starts to copy its keys.
  __device__ __forceinline__ void start_keys(int tile_idx) {
    const AttendParams& params = args_.params;
    is_own_ = tile_idx < work_.tiles.num_own;
    if (is_own_) {
      find_own(tile_idx);
      copy(k_, params.k, work_.kv_head);
    } else {
      find_selected(tile_idx);
      copy(k_, params.k_perm, work_.perm_head);
    }
  }

  // Starts to copy the values of that tile.
  __device__ __forceinline__ void start_values() {
    const AttendParams& params = args_.params;
    if (is_own_) {
      copy(v_, params.v, work_.kv_head);
    } else {
      copy(v_, params.v_perm, work_.perm_head);
    }
  }

 private:
  // Rows of a tile that follow each other in memory.
  struct Part {
    int b;
    int row;
    int num_rows;
  };

  __device__ __forceinline__ void find_own(int tile_idx) {
    const int first = work_.own_begin + own_tile_begin(work_.tiles, tile_idx, Traits::kKeys);
    const auto num_own = static_cast<int>(args_.params.problem.num_kv - args_.params.first_k_row);
#pragma unroll
    for (int i = 0; i < Traits::kParts; ++i) {
      const int row = first + i * kPartRows;
      parts_[i] = Part{work_.b, min(row, num_own - 1), num_own - row};
    }
  }

  __device__ __forceinline__ void find_selected(int tile_idx) {
    const int num_parts = tile_idx == work_.tiles.num_own
                              ? work_.tiles.first_selected_size / kPartRows
                              : Traits::kParts;
#pragma unroll
    for (int i = 0; i < Traits::kParts; ++i) {
      if (i >= num_parts) {
        parts_[i] = Part{work_.b, 0, 0};
        continue;
      }
      if (parts_left_ == 0) {
        next_row_ = blocks_.next() * parts_per_block_ * kPartRows;
        parts_left_ = parts_per_block_;
      }
      parts_[i] = place(next_row_);
      next_row_ += kPartRows;
      --parts_left_;
    }
  }

  // Of permuted keys from `row` on. A page that does not exist has no rows.
  __device__ __forceinline__ Part place(int row) const {
    const Pages& pages = args_.params.pages;
    if (pages.table == nullptr) return Part{work_.b, row, kPartRows};
    const int page = pages.table[row >> args_.page_shift];
    if (page < 0 || page >= pages.num_pages) return Part{0, 0, 0};
    return Part{page, row & ((1 << args_.page_shift) - 1), kPartRows};
  }

  __device__ __forceinline__ void copy(const typename Traits::KeyCopy& to, const ConstRows& from,
                                       int head) const {
#pragma unroll
    for (int i = 0; i < Traits::kParts; ++i) {
      const Part& part = parts_[i];
      const Element* rows = static_cast<const Element*>(from.data) +
                            row_start(from, RowPlace{part.b, part.row}, head);
      to.template start<kPartRows>(i * kPartRows, rows, from.row_stride, part.num_rows);
    }
    commit_copies();
  }

  const DrawArgs& args_;
  const Work& work_;
  typename Traits::KeyCopy k_;
  typename Traits::KeyCopy v_;
  SelectedBlocks blocks_;
  int parts_per_block_;
  int parts_left_ = 0;  // of the selected block in work
  int next_row_ = 0;    // of it
  bool is_own_ = true;
  Part parts_[Traits::kParts] = {};
};

}  // namespace pbs::cuda::sm80
