// Copies tiles of rows from device memory to shared memory with cp.async, and addresses their
// operands of products.
//
// A tile is a row of column groups, and a group has its columns of all rows (pbs/key_tiles.h).
// Pieces of 16 bytes are swizzled as in tile_offset (common/fragments.cuh), so that neither copies
// nor ldmatrix have bank conflicts.
#pragma once

#include <cstdint>

#include "common/fragments.cuh"
#include "pbs/key_tiles.h"

namespace pbs::cuda::sm80 {

constexpr int kPieceElements = 8;  // 16 bytes

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Returns the same number and hides its origin from the compiler. Values computed from it are then
// recomputed at each use and occupy no register in between.
__device__ __forceinline__ int renewed(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Starts to copy 16 bytes, or zeros if the source does not exist.
__device__ __forceinline__ void copy_piece(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 16 : 0));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
// Waits until at most kPending groups of this thread are still in flight.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The pieces of a thread in tiles of kHeadDim columns and kTileRows rows, copied by kThreads
// threads.
template <int kHeadDim, int kTileRows, int kThreads>
struct TileCopy {
  static constexpr int kGroupColumns = group_columns(kHeadDim);
  static constexpr int kGroups = kHeadDim / kGroupColumns;
  static constexpr int kLanesPerRow = kGroupColumns / kPieceElements;
  static constexpr int kRowsAtOnce = kThreads / kLanesPerRow;
  static_assert(kRowsAtOnce % 8 == 0, "rows that a thread copies are swizzled alike");

  // Starts to copy kRows rows to rows [first, first + kRows) of the tile. Rows from num_rows on do
  // not exist.
  template <int kRows, class Element>
  __device__ __forceinline__ static void start(int thread, const void* tile, int first,
                                               const Element* rows, int64_t row_stride,
                                               int num_rows) {
    static_assert(kRows % kRowsAtOnce == 0);
    const int own_row = thread / kLanesPerRow;
    const int column = thread % kLanesPerRow * kPieceElements;
    const uint32_t to =
        shared_address(tile) + tile_offset<kGroupColumns>(kTileRows, own_row, column);
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAtOnce) {
      const bool exists = own_row + i < num_rows;
      const Element* from = rows + (exists ? own_row + i : 0) * row_stride + column;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        copy_piece(to + (group * kTileRows + first + i) * kGroupColumns * 2,
                   from + group * kGroupColumns, exists);
      }
    }
  }
};

// The address of a lane for ldmatrix: row `row` of a tile, and piece `piece` of the columns of one
// or two steps of products. Rows may be added in multiples of 8.
template <int kHeadDim, int kTileRows>
class TileRead {
 public:
  static constexpr int kGroupColumns = group_columns(kHeadDim);
  static constexpr int kStepsPerGroup = kGroupColumns / 16;

  __device__ TileRead(const void* tile, int row, int piece)
      : row_(shared_address(tile) + row * kGroupColumns * 2),
        swizzle_((piece ^ (kGroupColumns == 64 ? row % 8 : row / 2 % 4)) * 16) {}

  // Columns from 16 * step on, shifted by `rows` rows.
  __device__ __forceinline__ uint32_t at(int step, int rows) const {
    return row_ + (step / kStepsPerGroup * kTileRows + rows) * kGroupColumns * 2 +
           (swizzle_ ^ (step % kStepsPerGroup * 32));
  }

 private:
  uint32_t row_;
  uint32_t swizzle_;
};

}  // namespace pbs::cuda::sm80
