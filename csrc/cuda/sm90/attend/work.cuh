// Passes query blocks from the scheduler to the other warps of the CTA.
#pragma once

#include "sm90/ring.cuh"
#include "traits.cuh"

namespace pbs::cuda::sm90 {

// One thread's view of the ring of drawn query blocks.
template <class Traits>
class WorkReader {
 public:
  using Work = typename Traits::Work;

  __device__ explicit WorkReader(typename Traits::SharedStorage& shared) : shared_(shared) {}

  // Waits for the next query block, which is valid until the next call.
  __device__ const Work& next() {
    ring_.advance();
    shared_.work_full[ring_.stage()].wait(ring_.parity());
    return current();
  }

  __device__ const Work& current() const { return shared_.work[ring_.stage()]; }
  // Valid until free_previous().
  __device__ const Work& previous() const { return shared_.work[ring_.previous().stage()]; }

  // Every thread that read the slot frees it itself, so that reads come before reuse.
  __device__ void free_current() { shared_.work_empty[ring_.stage()].arrive(); }
  __device__ void free_previous() { shared_.work_empty[ring_.previous().stage()].arrive(); }

 private:
  typename Traits::SharedStorage& shared_;
  RingState<Traits::kWorkStages> ring_{2 * Traits::kWorkStages - 1};  // one before the first
};

}  // namespace pbs::cuda::sm90
