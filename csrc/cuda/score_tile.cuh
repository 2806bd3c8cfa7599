// What score_keys holds in shared memory, and multiplies.
#pragma once

#include <cutlass/gemm/collective/builders/sm90_common.inl>

#include "pbs/score_chunks.h"
#include "pbs/tile_shape.h"
#include "warpgroup.cuh"

namespace pbs::cuda {

using cute::Int;
using cute::Shape;

constexpr int kScoreThreads = 256;  // two warpgroups, 64 rows of a tile each
constexpr int kMaxRows = 128;       // queries that score keys

// Tiles of queries and keys in shared memory, and their products.
template <class Element_, int kHeadDim>
struct ScoreTile {
  using Element = Element_;
  static constexpr int kTiles = score_chunk_tiles(kHeadDim);
  static constexpr int kChunk = score_chunk_keys(kHeadDim);
  static constexpr int kGroupColumns = group_columns(kHeadDim);
  static constexpr int kTileSize = kMaxRows * kHeadDim;
  static constexpr int kCtasPerSm = kHeadDim == 256 ? 1 : 2;
  static constexpr int kBytes =
      (kTiles + 1) * kTileSize * static_cast<int>(sizeof(Element)) + kSwizzleBytes;
  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 Shape<Int<kMaxRows>, Int<kScoreTileKeys>, Int<kHeadDim>>>(),
      cute::Layout<Shape<cute::_2, cute::_1, cute::_1>>{}));
  using Atom =
      decltype(cutlass::gemm::collective::detail::ss_smem_selector<cute::GMMA::Major::K, Element,
                                                                   Int<kMaxRows>, Int<kHeadDim>>());
  using Layout = decltype(cute::tile_to_shape(Atom{}, Shape<Int<kMaxRows>, Int<kHeadDim>>{}));

  __device__ explicit ScoreTile(void* raw)
      : queries(reinterpret_cast<Element*>((reinterpret_cast<uintptr_t>(raw) + kSwizzleBytes - 1) /
                                           kSwizzleBytes * kSwizzleBytes)),
        keys(queries + kTileSize) {}

  // Starts to copy the first num_rows of a tile's rows, zeros behind them, by the whole CTA.
  __device__ static void load_tile(const Element* src, int64_t row_stride, int num_rows,
                                   Element* tile) {
    constexpr int kPieces = kHeadDim / 8;
    const uint32_t to = cute::cast_smem_ptr_to_uint(tile);
#pragma unroll 8
    for (int i = threadIdx.x; i < kMaxRows * kPieces; i += kScoreThreads) {
      const int row = i / kPieces;
      const int column = i % kPieces * 8;
      const bool exists = row < num_rows;
      const Element* from = exists ? src + row * row_stride + column : src;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                       to + tile_offset<kGroupColumns>(kMaxRows, row, column)),
                   "l"(from), "r"(exists ? 16 : 0)
                   : "memory");
    }
  }

  // scores = left . right^T, once it is there. Rows of `left` go to warpgroups by 64.
  template <class Scores>
  __device__ static void multiply(Element* left, Element* right, Scores& scores) {
    Mma mma;
    const cute::Tensor sA = cute::make_tensor(cute::make_smem_ptr(left), Layout{});
    const cute::Tensor sB = cute::make_tensor(cute::make_smem_ptr(right), Layout{});
    const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
    auto thread = mma.get_thread_slice(128 * warpgroup);
    start_gemm<true>(mma, thread.partition_fragment_A(sA), thread.partition_fragment_B(sB), scores);
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(scores);
  }

  __device__ static auto make_scores() {
    return cute::partition_fragment_C(Mma{}, Shape<Int<kMaxRows>, Int<kScoreTileKeys>>{});
  }

  Element* queries;
  Element* keys;  // kTiles tiles
};

}  // namespace pbs::cuda
