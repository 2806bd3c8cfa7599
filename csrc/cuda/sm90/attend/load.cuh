// The two producer warps that fill the rings of K and of V.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "pbs/bitmask.h"
#include "sm90/tma.cuh"
#include "work.cuh"

namespace pbs::cuda::sm90 {

template <class Traits, bool kLoadsKeys>
class KeyValueLoader {
 public:
  using Shared = typename Traits::SharedStorage;
  using Work = typename Traits::Work;
  using Element = typename Traits::Element;
  static constexpr int kKeys = Traits::kKeys;
  static constexpr int kMaxChunks = kKeys / 32;

  __device__ KeyValueLoader(const AttendArgs& args, Shared& shared)
      : args_(args), params_(args.params), shared_(shared), lane_(threadIdx.x % 32) {
    chunk_rows_ = static_cast<int>(smaller(params_.blocking.kv_block_size, kKeys));
    chunks_per_tile_ = kKeys / chunk_rows_;
  }

  __device__ void run() {
    WorkReader<Traits> reader(shared_);
    while (true) {
      const Work& work = reader.next();
      if (work.tiles.total < 0) return;
      load_tiles(work);
      reader.free_current();
    }
  }

 private:
  // Loads all tiles of a query block, in the order of KeyTiles.
  __device__ void load_tiles(const Work& work) {
    b_ = work.b;
    head_ = work.kv_head;
    for (int i = 0; i < work.tiles.num_own; ++i) {
      packer_.rows[0] = work.own_begin + own_tile_begin(work.tiles, i, kKeys);
      load_tile(kLoadsKeys ? args_.k : args_.v, kKeys, 31);
    }
    head_ = work.perm_head;
    load_selected(work.mask_words, work.num_candidates,
                  work.tiles.first_selected_size / chunk_rows_);
  }

  // Fills tiles with the selected blocks. The first tile takes `first_chunks`.
  __device__ void load_selected(const uint32_t* words, int num_candidates, int first_chunks) {
    packer_.begin(first_chunks, chunk_rows_);
    const int kv_block_size = static_cast<int>(params_.blocking.kv_block_size);
    for (int base = 0; base * 32 < num_candidates; base += 32) {
      const int w = base + lane_;
      const uint32_t own =
          w * 32 < num_candidates ? candidate_bits(words[w], w, num_candidates) : 0;
      for (uint32_t lanes = __ballot_sync(~0u, own != 0); lanes != 0; lanes &= lanes - 1) {
        const int source = __ffs(lanes) - 1;
        for (uint32_t bits = __shfl_sync(~0u, own, source); bits != 0; bits &= bits - 1) {
          const int block_row = ((base + source) * 32 + __ffs(bits) - 1) * kv_block_size;
          for (int row = block_row; row < block_row + kv_block_size; row += chunk_rows_) {
            if (packer_.add(row_in_pages(row), chunks_per_tile_)) {
              load_tile(kLoadsKeys ? args_.k_perm : args_.v_perm, chunk_rows_, args_.page_shift);
            }
          }
        }
      }
    }
  }

  // The position of a row of the sequence, counted through all pages.
  __device__ int row_in_pages(int row) const {
    const int32_t* table = params_.pages.table;
    if (table == nullptr) return row;
    const int page = table[row >> args_.page_shift];
    return page << args_.page_shift | (row & ((1 << args_.page_shift) - 1));
  }

  // Loads one tile from the rows in packer_, box_rows at a time. Pages are then the batch, and have
  // 2^page_shift rows.
  __device__ void load_tile(const CUtensorMap& map, int box_rows, int page_shift) {
    auto& full = kLoadsKeys ? shared_.k_full[ring_.stage()] : shared_.v_full[ring_.stage()];
    auto& empty = kLoadsKeys ? shared_.k_empty[ring_.stage()] : shared_.v_empty[ring_.stage()];
    empty.wait(ring_.parity() ^ 1);
    if (cute::elect_one_sync()) {
      const int row_mask = static_cast<int>((1u << page_shift) - 1);
      full.arrive_and_expect_tx(kKeys * Traits::kHeadDim * 2);
      Element* dst =
          (kLoadsKeys ? shared_.k : shared_.v) + ring_.stage() * kKeys * Traits::kHeadDim;
      if (box_rows == kKeys) {
        const int row = packer_.rows[0];
        copy_box(map, full, dst, row & row_mask, 0, head_, b_ + (row >> page_shift));
      } else {
#pragma unroll
        for (int chunk = 0; chunk < kMaxChunks; ++chunk) {
          if (chunk * box_rows >= kKeys) break;
          for (int group = 0; group < Traits::kGroups; ++group) {
            const int row = packer_.rows[chunk];
            copy_box(map, full, dst + (group * kKeys + chunk * box_rows) * Traits::kGroupColumns,
                     row & row_mask, group, head_, b_ + (row >> page_shift));
          }
        }
      }
    }
    __syncwarp();
    ring_.advance();
  }

  const AttendArgs& args_;
  const AttendParams& params_;
  Shared& shared_;
  int lane_;
  int chunk_rows_;
  int chunks_per_tile_;
  int b_ = 0;
  int head_ = 0;
  TilePacker<kMaxChunks> packer_;
  RingState<kLoadsKeys ? Traits::kKStages : Traits::kVStages> ring_;
};

}  // namespace pbs::cuda::sm90
