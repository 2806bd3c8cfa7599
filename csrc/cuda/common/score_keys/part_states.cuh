// Merges the softmax states of the parts of the keys.
#pragma once

#include "common/row_state.cuh"
#include "pbs/score_rows.h"

namespace pbs::cuda {

// The merged states of every step-th part, for one query.
__device__ inline RowState merge_parts(const float2* states, int num_parts, int step) {
  RowState all;
#pragma unroll 8
  for (int p = 0; p < num_parts; p += step) {
    const float2 state = states[p * kScoreTileRows];
    all = merge(all, RowState{state.x, state.y});
  }
  return all;
}

constexpr int kMergeThreads = 1024;
constexpr int kMergeSlices = kMergeThreads / kScoreTileRows;
using MergeSlices = float2[kMergeSlices][kScoreTileRows];

// Merges all parts of the queries of a head, in a CTA of kMergeThreads. `states` are those of query
// `row`. A thread merges every kMergeSlices-th part, and the threads of slice 0 get the result.
__device__ inline RowState merge_slices(const float2* states, int num_parts, int slice, int row,
                                        MergeSlices& slices) {
  const RowState own =
      merge_parts(states + slice * kScoreTileRows, num_parts - slice, kMergeSlices);
  slices[slice][row] = float2{own.max, own.sum};
  __syncthreads();
  return slice == 0 ? merge_parts(&slices[0][row], kMergeSlices, 1) : RowState{};
}

}  // namespace pbs::cuda
