// Query blocks on their way from the scheduler to everybody else in the CTA.
#pragma once

#include "traits.cuh"

namespace pbs::cuda {

// One thread's view of the ring of drawn query blocks.
template <class Traits>
class WorkReader {
 public:
  using Work = typename Traits::Work;

  __device__ explicit WorkReader(typename Traits::SharedStorage& shared) : shared_(shared) {}

  __device__ void wait() const { shared_.work_full[ring_.stage()].wait(ring_.parity()); }

  // The query block, in place from wait() to advance().
  __device__ const Work& current() const { return shared_.work[ring_.stage()]; }

  // Every thread that read frees the place itself; the order of reads and reuse is then plain.
  __device__ void advance() {
    shared_.work_empty[ring_.stage()].arrive();
    ring_.advance();
  }

 private:
  typename Traits::SharedStorage& shared_;
  RingState<Traits::kWorkStages> ring_;
};

}  // namespace pbs::cuda
