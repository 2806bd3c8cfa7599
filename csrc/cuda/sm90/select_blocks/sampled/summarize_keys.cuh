// The summary of permuted keys, tile by tile: single keys, then means.
#pragma once

#include "layout.cuh"
#include "unit_walk.cuh"

namespace pbs::cuda::sm90 {

constexpr int kPiece = 8;  // elements that a thread handles at once

template <int kHeadDim>
constexpr int kSummarizeThreads = 2 * kHeadDim;

// One CTA a tile. A thread keeps its pieces until the largest element of the tile is known.
template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kSummarizeThreads<kHeadDim>)
    select_blocks_summary_kernel(const __grid_constant__ SampledArgs args) {
  using Source = cutlass::AlignedArray<Element, kPiece, 16>;
  constexpr int kThreads = kSummarizeThreads<kHeadDim>;
  constexpr int kPieces = kHeadDim / kPiece;  // of a column
  constexpr int kItems = (kTileColumns * kPieces + kThreads - 1) / kThreads;
  const cutlass::NumericArrayConverter<float, Element, kPiece> to_floats;
  const int tile = static_cast<int>(blockIdx.x) % args.plan.num_tiles;
  const int perm_head = static_cast<int>(blockIdx.x) / args.plan.num_tiles;
  const auto num_perm = static_cast<int>(args.params.problem.num_perm_heads);
  const ConstRows& keys = args.params.k_perm;
  const Element* rows = static_cast<const Element*>(keys.data) +
                        perm_head / num_perm * keys.batch_stride +
                        perm_head % num_perm * keys.head_stride;

  cutlass::Array<float, kPiece> values[kItems];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int item = static_cast<int>(threadIdx.x) + i * kThreads;
    const int column = item / kPieces;
    values[i].clear();
    const int first = tile * kSummaryKeys + first_key_of(column);
    if (column >= kTileColumns || first >= args.num_candidate_rows) continue;
    const Element* from = rows + first * keys.row_stride + item % kPieces * kPiece;
    if (column < kExactKeys) {
      values[i] = to_floats(*reinterpret_cast<const Source*>(from));
    } else {
      Source pooled[kPoolSize];
#pragma unroll
      for (int j = 0; j < kPoolSize; ++j) {
        pooled[j] = *reinterpret_cast<const Source*>(from + j * keys.row_stride);
      }
#pragma unroll
      for (int j = 0; j < kPoolSize; ++j) {
        const cutlass::Array<float, kPiece> widened = to_floats(pooled[j]);
#pragma unroll
        for (int e = 0; e < kPiece; ++e) values[i][e] += widened[e] * (1.0f / kPoolSize);
      }
    }
#pragma unroll
    for (int e = 0; e < kPiece; ++e) largest = max(largest, magnitude(values[i][e]));
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
    if (item >= kTileColumns * kPieces) continue;
    const auto narrow = narrowed(values[i], scale.inverse);
    const int place =
        typename SampledLayouts<kHeadDim>::Tile{}(item / kPieces, item % kPieces * kPiece);
    *reinterpret_cast<uint2*>(to + place) = reinterpret_cast<const uint2&>(narrow);
  }
  if (threadIdx.x == 0) *reinterpret_cast<float*>(to + kTileColumns * kHeadDim) = scale.scale;
  // Whoever follows waits for this kernel, and needs the one before, too.
  cudaGridDependencySynchronize();
}

}  // namespace pbs::cuda::sm90
