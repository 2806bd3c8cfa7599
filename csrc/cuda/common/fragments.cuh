// Which thread holds which accumulators of a product, and where operands are in shared memory.
//
// A thread holds two rows of an accumulator, 8 apart: element i belongs to row i / 2 % 2 and column
// 8 * (i / 4) + 2 * (lane % 4) + i % 2, and the four lanes of a quad share their rows. mma.sync and
// wgmma agree on this.
#pragma once

#include <cstdint>

namespace pbs::cuda {

constexpr int kThreadRows = 2;

__device__ inline int row_of(int i) { return i / 2 % 2; }
__device__ inline int column_of(int i, int lane) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

// The first row of a thread, with 16 rows per warp.
__device__ inline int row_of_thread(int thread) { return thread / 32 * 16 + thread % 32 / 4; }

// The index of this thread, read again. Values computed from it are recomputed at each use and do
// not occupy registers, which a main loop lacks.
__device__ inline int read_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// The value is the same in all lanes already. This tells ptxas, which then keeps values that depend
// on it, such as the descriptors of the products, in uniform registers.
__device__ inline int uniform(int x) { return __shfl_sync(~0u, x, 0); }

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// The byte offset of an element in a swizzled tile of `num_rows` rows of 2-byte elements, in groups
// of kGroupColumns.
template <int kGroupColumns>
__device__ uint32_t tile_offset(int num_rows, int row, int column) {
  const uint32_t linear =
      ((column / kGroupColumns * num_rows + row) * kGroupColumns + column % kGroupColumns) * 2;
  return linear ^ (linear >> 3 & (kGroupColumns == 64 ? 0x70 : 0x30));
}

}  // namespace pbs::cuda
