// Loads by TMA.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

namespace pbs::cuda::sm90 {

// Loads one box of a (B, H, N, D) tensor to shared memory. The barrier counts its bytes. Runs in
// one thread.
template <class Element>
__device__ void copy_box(const CUtensorMap& map, cutlass::arch::ClusterTransactionBarrier& full,
                         Element* dst, int row, int group, int head, int b) {
  cute::SM90_TMA_LOAD_5D::copy(&map, reinterpret_cast<uint64_t*>(&full),
                               static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), dst,
                               0, row, group, head, b);
}

}  // namespace pbs::cuda::sm90
