// The sm_80 attend kernel and its launch. The warps of a CTA copy tiles of keys and values together
// and share them. Each warp has its own query rows. While a CTA waits or computes exponentials,
// another CTA on the same multiprocessor uses the tensor cores.
#pragma once

#include <cuda_runtime.h>

#include "common/launch_kernel.h"
#include "compute.cuh"
#include "instances.h"
#include "key_list.cuh"
#include "load.cuh"

namespace pbs::cuda::sm80 {

// The first row of a head of permuted keys or values.
template <class Traits>
__device__ const typename Traits::Element* head_of(const ConstRows& rows,
                                                   const typename Traits::Work& work) {
  return static_cast<const typename Traits::Element*>(rows.data) +
         row_start(rows, RowPlace{work.b, 0}, work.perm_head);
}

// Draws the next query block that visits any key, and lists its keys. Runs in one warp.
template <class Traits>
__device__ void draw_work(const AttendArgs& args, typename Traits::Shared& shared, int slot) {
  auto& work = shared.work[slot];
  WorkDrawer drawer(args);
  while (true) {
    if (threadIdx.x % 32 == 0) drawer.fill(drawer.draw(), Traits::kKeys, work);
    __syncwarp();
    if (work.tiles.total != 0) break;
    write_nothing<Traits::kHeadDim>(work, args.params.out.row_stride);
    __syncwarp();  // all lanes have read the work before it is filled in again
  }
  if (work.tiles.total < 0) return;
  if (threadIdx.x % 32 == 0) {
    shared.k_head[slot] = head_of<Traits>(args.params.k_perm, work);
    shared.v_head[slot] = head_of<Traits>(args.params.v_perm, work);
    shared.list[slot] = list_of(args, slot);
  }
  list_keys<Traits>(args, work, list_of(args, slot));
}

// Attends to all keys of the query block of a slot. Meanwhile the next block is drawn and starts to
// load.
template <class Traits>
__device__ __forceinline__ void attend_block(const AttendArgs& args,
                                             typename Traits::Shared& shared, int slot, int thread,
                                             const TileLoader<Traits>& loader) {
  const auto& work = shared.work[slot];
  const KeyTiles& tiles = work.tiles;
  // Waits until the last load is complete and all warps have finished the current tile.
  const auto wait_for_tile = [] {
    wait_for_copies<0>();
    __syncthreads();
  };
  wait_for_tile();
  loader.start_values(slot, 0);
  if (thread < 32) draw_work<Traits>(args, shared, slot ^ 1);
  RowTiles<Traits> rows(shared, thread, args.params.scale * kLog2e);
  int tile_idx = 0;
#pragma unroll 1
  while (true) {
    // Computes any tile.
    const bool is_masked = tile_idx < tiles.num_masked;
    const bool sees_some = !is_masked || rows.sees_some(tiles, tile_idx);
    if (sees_some) rows.multiply_keys();
    wait_for_tile();
    loader.start_next(slot, tile_idx);
    if (sees_some) {
      if (is_masked) rows.mask(tiles, tile_idx);
      rows.weigh();
      rows.multiply_values();
    }
    if (++tile_idx == tiles.total) break;
    wait_for_tile();
    loader.start_values(slot, tile_idx);
    // Computes whole tiles of selected keys, except the last one, without a branch: the products
    // then overlap with the exponentials and the waits.
    if (tile_idx <= tiles.num_own) continue;
#pragma unroll 1
    for (; tile_idx + 1 < tiles.total; ++tile_idx) {
      const int nth = tile_idx - tiles.num_own;
      rows.multiply_keys();
      wait_for_tile();
      loader.start_selected_keys(slot, nth + 1);
      rows.weigh();
      rows.multiply_values();
      wait_for_tile();
      loader.start_selected_values(slot, nth + 1);
    }
  }
  rows.write(work, args.params.out.row_stride);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    attend_kernel(const __grid_constant__ AttendArgs args) {
  extern __shared__ __align__(128) char raw[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(raw);
  if (threadIdx.x < 32) draw_work<Traits>(args, shared, 0);
  __syncthreads();
  if (shared.work[0].tiles.total < 0) return;
  const int thread = read_thread();
  const TileLoader<Traits> loader(args, shared);
  loader.begin(0);
#pragma unroll 1
  for (int slot = 0; shared.work[slot].tiles.total > 0; slot ^= 1) {
    attend_block<Traits>(args, shared, slot, thread, loader);
  }
}

template <class Element, int kHeadDim, int kKeys>
cudaError_t run_attend(const AttendArgs& args, int num_sms, cudaStream_t stream) {
  using Traits = AttendTraits<Element, kHeadDim, kKeys>;
  constexpr int kSharedBytes = sizeof(typename Traits::Shared);
  const int64_t num_ctas = smaller(num_blocks_to_draw(args), num_sms * Traits::kCtasPerSm);
  return launch_kernel(attend_kernel<Traits>, args, num_ctas, Traits::kThreads, kSharedBytes,
                       stream);
}

}  // namespace pbs::cuda::sm80
