// The two kernels of sampled scores: the weights of the sampled queries on their own segments, then
// their sums over all candidates and the selection of blocks.
#pragma once

#include "common/select_blocks/sampled/sample_queries.cuh"
#include "instances.h"
#include "kernel.cuh"

namespace pbs::cuda::sm80 {

// Rows of sampled queries need no copy. The keys of the own segment have a total weight of 1.
struct NoImage {
  __device__ NoImage(const SampledArgs&, int64_t) {}
  __device__ static void begin() {}
  template <class Element, class Query>
  __device__ float write(int, const Query&) const {
    return 1.0f;
  }
  __device__ static void set_own(SampledRow& state, float log2_own, bool has_own) {
    state.offset = -log2_own;
    state.own_sum = has_own ? 1.0f : 0.0f;
    if (!isfinite(log2_own)) state.own_sum = NAN;  // no finite reference: selects everything
  }
};

template <class Element, int kHeadDim>
cudaError_t run_sampled(const SampledArgs& args, cudaStream_t stream) {
  const cudaError_t error = launch_samples<NoImage, Element, kHeadDim>(args, stream);
  if (error != cudaSuccess) return error;
  switch (args.plan.stacks_per_unit) {
    case kFewestStacks:
      return launch_scores<Element, kHeadDim, kFewestStacks>(args, stream);
    case kFewStacks:
      return launch_scores<Element, kHeadDim, kFewStacks>(args, stream);
    case kManyStacks:
      if constexpr (most_stacks(kHeadDim) == kManyStacks) {
        return launch_scores<Element, kHeadDim, kManyStacks>(args, stream);
      }
  }
  return cudaErrorInvalidValue;
}

}  // namespace pbs::cuda::sm80
