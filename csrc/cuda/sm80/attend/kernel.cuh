// The sm_80 attend kernel and its launch. Warps share the tiles of keys and values that they copy
// together, and have query rows of their own. While a CTA waits or computes exponentials, another
// one on the same multiprocessor has the tensor cores.
#pragma once

#include <cuda_runtime.h>

#include "common/launch_kernel.h"
#include "compute.cuh"
#include "instances.h"
#include "load.cuh"

namespace pbs::cuda::sm80 {

template <class Traits>
__device__ void start_queries(const DrawArgs& args, typename Traits::Shared& shared) {
  using Element = typename Traits::Element;
  const auto& work = shared.work;
  const ConstRows& q = args.params.q;
  const Element* rows = static_cast<const Element*>(q.data) +
                        row_start(q, RowPlace{work.b, work.first_row}, work.q_head);
  typename Traits::QueryCopy(shared.q).template start<kTileRows>(0, rows, q.row_stride,
                                                                 work.num_rows);
}

// All keys that a query block visits.
template <class Traits>
__device__ __forceinline__ void attend_block(const DrawArgs& args,
                                             typename Traits::Shared& shared) {
  const auto& work = shared.work;
  const KeyTiles tiles = work.tiles;
  start_queries<Traits>(args, shared);
  TileLoader<Traits> loader(args, shared);
  loader.start_keys(0);
  RowTiles<Traits> rows(shared, args.params.scale * kLog2e);
  const auto visit = [&](int tile_idx, auto is_masked) {
    wait_for_copies<0>();
    __syncthreads();  // the keys are there, and all are done with the values before
    loader.start_values();
    rows.multiply_keys();
    wait_for_copies<0>();
    __syncthreads();  // the values are there, and all are done with the keys
    if (tile_idx + 1 < tiles.total) loader.start_keys(tile_idx + 1);
    rows.template weigh<decltype(is_masked)::value>(tiles, tile_idx);
    rows.multiply_values();
  };
  int tile_idx = 0;
#pragma unroll 1
  for (; tile_idx < min(tiles.num_masked, tiles.total); ++tile_idx) {
    visit(tile_idx, std::true_type{});
  }
#pragma unroll 1
  for (; tile_idx < tiles.total; ++tile_idx) visit(tile_idx, std::false_type{});
  rows.write(work, args.params.out.row_stride);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    attend_kernel(const __grid_constant__ DrawArgs args) {
  extern __shared__ __align__(128) char raw[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(raw);
  WorkDrawer drawer(args);
  int draw_idx = threadIdx.x == 0 ? drawer.draw() : 0;
  while (true) {
    if (threadIdx.x == 0) {
      drawer.fill(draw_idx, Traits::kKeys, shared.work);
      draw_idx = drawer.draw();  // on its way while this block is in work
    }
    __syncthreads();
    const int total = shared.work.tiles.total;
    if (total < 0) return;
    if (total > 0) {
      attend_block<Traits>(args, shared);
    } else if (threadIdx.x < 32) {
      write_nothing<Traits::kHeadDim>(shared.work, args.params.out.row_stride);
    }
    __syncthreads();  // all are done with this query block
  }
}

template <class Element, int kHeadDim, int kKeys>
cudaError_t run_attend(const DrawArgs& args, int num_sms, cudaStream_t stream) {
  using Traits = AttendTraits<Element, kHeadDim, kKeys>;
  constexpr int kSharedBytes = sizeof(typename Traits::Shared);
  const int64_t num_ctas = smaller(num_blocks_to_draw(args), num_sms * Traits::kCtasPerSm);
  return launch_kernel(attend_kernel<Traits>, args, num_ctas, Traits::kThreads, kSharedBytes,
                       stream);
}

}  // namespace pbs::cuda::sm80
