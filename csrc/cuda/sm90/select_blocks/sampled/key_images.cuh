// The permuted keys in e4m3, tile by tile, in the layout of shared memory.
#pragma once

#include "common/pages.cuh"
#include "layout.cuh"
#include "unit_walk.cuh"

namespace pbs::cuda::sm90 {

constexpr int kPiece = 8;  // elements that a thread converts at once

template <int kHeadDim>
constexpr int kImageThreads = 2 * kHeadDim;

// One CTA per tile. A thread keeps its pieces until the largest element of the tile is known.
template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kImageThreads<kHeadDim>)
    select_blocks_key_images_kernel(const __grid_constant__ SampledArgs args) {
  using Source = cutlass::AlignedArray<Element, kPiece, 16>;
  constexpr int kThreads = kImageThreads<kHeadDim>;
  constexpr int kPieces = kHeadDim / kPiece;  // per key
  constexpr int kItems = kSampledKeys * kPieces / kThreads;
  static_assert(kSampledKeys * kPieces % kThreads == 0);
  const cutlass::NumericArrayConverter<float, Element, kPiece> to_floats;
  const int tile = static_cast<int>(blockIdx.x) % args.plan.num_tiles;
  const int perm_head = static_cast<int>(blockIdx.x) / args.plan.num_tiles;
  const auto num_perm = static_cast<int>(args.params.problem.num_perm_heads);
  const ConstRows& keys = args.params.k_perm;
  const Pages& pages = args.params.pages;
  const Element* head_rows =
      static_cast<const Element*>(keys.data) + perm_head % num_perm * keys.head_stride;

  Source pieces[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int item = static_cast<int>(threadIdx.x) + i * kThreads;
    const int key = tile * kSampledKeys + item / kPieces;
    pieces[i].clear();
    if (key < args.num_candidate_rows) {
      const RowPlace place = place_in_pages(pages, perm_head / num_perm, key);
      pieces[i] =
          *reinterpret_cast<const Source*>(head_rows + place.b * keys.batch_stride +
                                           place.row * keys.row_stride + item % kPieces * kPiece);
    }
  }
  uint32_t largest = 0;
#pragma unroll
  for (const Source& piece : pieces) {
    const cutlass::Array<float, kPiece> values = to_floats(piece);
#pragma unroll
    for (int e = 0; e < kPiece; ++e) largest = max(largest, magnitude(values[e]));
  }

  __shared__ uint32_t largest_of_warp[kThreads / 32];
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 == 0) largest_of_warp[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (uint32_t other : largest_of_warp) largest = max(largest, other);
  const NarrowScale scale(largest);
  char* to = args.key_tiles + static_cast<int64_t>(blockIdx.x) * key_tile_bytes(kHeadDim);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int item = static_cast<int>(threadIdx.x) + i * kThreads;
    const auto narrow =
        narrowed(cutlass::Array<float, kPiece>(to_floats(pieces[i])), scale.inverse);
    const int place =
        typename SampledLayouts<kHeadDim>::Tile{}(item / kPieces, item % kPieces * kPiece);
    *reinterpret_cast<uint2*>(to + place) = reinterpret_cast<const uint2&>(narrow);
  }
  if (threadIdx.x == 0) *reinterpret_cast<float*>(to + kSampledKeys * kHeadDim) = scale.scale;
  // The next kernel waits for this one, and also needs the results of the previous one.
  cudaGridDependencySynchronize();
}

}  // namespace pbs::cuda::sm90
