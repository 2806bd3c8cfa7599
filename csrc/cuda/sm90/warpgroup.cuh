// Products of a warpgroup, and who holds what of them.
//
// A thread of the warpgroup holds two rows of an accumulator, 8 apart: element i belongs to row
// i / 2 % 2 and column 8 * (i / 4) + 2 * (lane % 4) + i % 2, and the four lanes of a quad share
// their rows.
#pragma once

#include <cute/algorithm/gemm.hpp>
#include <cute/arch/util.hpp>
#include <cute/tensor.hpp>

#include "pbs/sm90/tile_shape.h"

namespace pbs::cuda::sm90 {

constexpr int kThreadRows = 2;

__device__ inline int row_of(int i) { return i / 2 % 2; }
__device__ inline int column_of(int i, int lane) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

// The first row of a thread, in 64 rows a warpgroup.
__device__ inline int row_of_thread(int thread) { return thread / 32 * 16 + thread % 32 / 4; }

// The same in all lanes already; but ptxas now sees it, and keeps what follows from it, such as the
// descriptors of the products, in uniform registers.
__device__ inline int uniform(int x) { return __shfl_sync(~0u, x, 0); }

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Where in a CTA's dynamic shared memory swizzled tiles may start. By an offset: the compiler then
// knows that all of it is shared memory.
__device__ inline char* first_swizzled(char* raw) {
  const uint32_t misplaced = cute::cast_smem_ptr_to_uint(raw) % kSwizzleBytes;
  return raw + (misplaced == 0 ? 0 : kSwizzleBytes - misplaced);
}

// Bytes from the start of a swizzled tile of `num_rows` rows of 2-byte elements, in groups of
// kGroupColumns, to an element of it.
template <int kGroupColumns>
__device__ uint32_t tile_offset(int num_rows, int row, int column) {
  const uint32_t linear =
      ((column / kGroupColumns * num_rows + row) * kGroupColumns + column % kGroupColumns) * 2;
  return linear ^ (linear >> 3 & (kGroupColumns == 64 ? 0x70 : 0x30));
}

template <class T, int kSize>
__device__ void fence_operands(T (&operands)[kSize]) {
#pragma unroll
  for (T& operand : operands) cute::warpgroup_fence_operand(operand);
}

// A descriptor of an operand in shared memory. Its neighbours' differ in the address only, which
// the first word holds in units of 16 bytes.
struct OperandDescriptor {
  uint32_t first;
  uint32_t second;

  __device__ explicit OperandDescriptor(const cute::GmmaDescriptor& whole)
      : first(uniform(static_cast<int>(whole.reg32_[0]))), second(whole.reg32_[1]) {}

  __device__ uint64_t at(uint32_t bytes) const {
    return static_cast<uint64_t>(second) << 32 | (first + bytes / 16);
  }
};

// Starts acc (+)= a . b on the tensor cores and returns at once.
template <bool kClears, class Mma, class A, class B, class Acc>
__device__ void start_gemm(Mma& mma, const A& a, const B& b, Acc& acc) {
  cute::warpgroup_fence_operand(acc);
  cute::warpgroup_arrive();
  mma.accumulate_ = kClears ? cute::GMMA::ScaleOut::Zero : cute::GMMA::ScaleOut::One;
  CUTE_UNROLL
  for (int i = 0; i < cute::size<2>(a); ++i) {
    cute::gemm(mma, a(cute::_, cute::_, i), b(cute::_, cute::_, i), acc);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
}

}  // namespace pbs::cuda::sm90
