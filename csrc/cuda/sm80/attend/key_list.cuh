// The list of the selected keys of a query block, in device memory. One warp writes it while the
// CTA works on the previous block.
#pragma once

#include "args.h"
#include "common/warp_sums.cuh"
#include "pbs/bitmask.h"
#include "traits.cuh"

namespace pbs::cuda::sm80 {

constexpr int kAbsent = -1;  // a part without rows

// The list of a slot: the first row of each part of each tile of selected keys, counted through all
// pages.
__device__ inline int32_t* list_of(const AttendArgs& args, int slot) {
  return args.lists + (static_cast<int64_t>(blockIdx.x) * 2 + slot) * args.list_size;
}

// The row of permuted keys, or kAbsent if its page does not exist.
__device__ inline int row_in_pages(const AttendArgs& args, int row) {
  const Pages& pages = args.params.pages;
  if (pages.table == nullptr) return row;
  const int page = pages.table[row >> args.page_shift];
  if (page < 0 || page >= pages.num_pages) return kAbsent;
  return page << args.page_shift | (row & args.page_mask);
}

// Lists the selected blocks in ascending order. Each lane reads a word of the mask.
template <class Traits>
__device__ void list_keys(const AttendArgs& args, const typename Traits::Work& work,
                          int32_t* list) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto kv_block_size = static_cast<int>(args.params.blocking.kv_block_size);
  const int parts_per_block = kv_block_size / kPartRows;
  // The first tile has the remainder, and is filled up with absent parts.
  const int num_first = work.tiles.first_selected_size / kPartRows;
  if (lane >= num_first && lane < Traits::kParts) list[lane] = kAbsent;
  const int num_words = (work.num_candidates + 31) / 32;
  int num_before = 0;
#pragma unroll 1
  for (int base = 0; base < num_words; base += 32) {
    const int w = base + lane;
    uint32_t bits = w < num_words ? candidate_bits(work.mask_words[w], w, work.num_candidates) : 0;
    const int end = sum_up_to(__popc(bits));
    int place = (num_before + end - __popc(bits)) * parts_per_block;
    num_before += __shfl_sync(~0u, end, 31);
    for (; bits != 0; bits &= bits - 1) {
      const int row = (w * 32 + __ffs(bits) - 1) * kv_block_size;
      for (int i = 0; i < parts_per_block; ++i, ++place) {
        list[place < num_first ? place : place + Traits::kParts - num_first] =
            row_in_pages(args, row + i * kPartRows);
      }
    }
  }
}

}  // namespace pbs::cuda::sm80
