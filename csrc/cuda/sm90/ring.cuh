// Rings of stages in shared memory.
#pragma once

#include <cstdint>

namespace pbs::cuda::sm90 {

// A place in a ring of stages, and the parity of its barriers there, in one register: places
// [kStages, 2 * kStages) are the same stages with the other parity.
template <int kStages>
struct RingState {
  int32_t place = 0;

  __device__ int stage() const { return place < kStages ? place : place - kStages; }
  __device__ uint32_t parity() const { return place >= kStages; }
  __device__ void advance() { *this = next(); }
  __device__ RingState next() const { return RingState{place == 2 * kStages - 1 ? 0 : place + 1}; }
  __device__ RingState previous() const {
    return RingState{place == 0 ? 2 * kStages - 1 : place - 1};
  }
};

// The same with a number of stages that is known only at run time.
struct DynamicRingState {
  int num_stages;
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance(int steps) {
    for (stage += steps; stage >= num_stages; stage -= num_stages) parity ^= 1;
  }
};

// Signals a barrier that counts warps that this warp is done.
template <class Barrier>
__device__ void release(Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier.arrive();
}

}  // namespace pbs::cuda::sm90
