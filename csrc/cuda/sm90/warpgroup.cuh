// Products of a warpgroup, and their operands in shared memory.
#pragma once

#include <cute/algorithm/gemm.hpp>
#include <cute/arch/util.hpp>
#include <cute/tensor.hpp>

#include "common/fragments.cuh"
#include "pbs/sm90/tile_shape.h"

namespace pbs::cuda::sm90 {

// Where swizzled tiles may start in the dynamic shared memory of a CTA. It is computed as an
// offset, so that the compiler knows that all of it is shared memory.
__device__ inline char* first_swizzled(char* raw) {
  const uint32_t misplaced = cute::cast_smem_ptr_to_uint(raw) % kSwizzleBytes;
  return raw + (misplaced == 0 ? 0 : kSwizzleBytes - misplaced);
}

template <class T, int kSize>
__device__ void fence_operands(T (&operands)[kSize]) {
#pragma unroll
  for (T& operand : operands) cute::warpgroup_fence_operand(operand);
}

// The descriptor of an operand in shared memory. Descriptors of neighbours differ only in the
// address, which the first word has in units of 16 bytes.
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
