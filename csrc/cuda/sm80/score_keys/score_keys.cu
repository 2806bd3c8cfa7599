// score_keys on CUDA: two passes over the keys of the complete segments, on tensor cores.
#include <cuda_runtime.h>

#include <limits>

#include "common/elements.h"
#include "common/launch_kernel.h"
#include "common/score_keys/clear_importance.h"
#include "common/score_keys/part_states.cuh"
#include "device.h"
#include "importance.cuh"
#include "pbs/dispatch.h"
#include "row_sums.cuh"
#include "sm80/launch.h"

namespace pbs::cuda::sm80 {
namespace {

template <class Traits>
__global__ void __launch_bounds__(kScoreThreads, kScoreCtasPerSm)
    score_keys_sums_kernel(const __grid_constant__ ScoreArgs args) {
  extern __shared__ __align__(128) char raw[];
  sum_rows<Traits>(args, raw);
}

// Merges the parts, with one CTA per query head.
__global__ void __launch_bounds__(kMergeThreads)
    score_keys_merge_kernel(const __grid_constant__ ScoreArgs args) {
  __shared__ MergeSlices slices;
  const int64_t head = blockIdx.x;
  const int row = static_cast<int>(threadIdx.x) % kScoreTileRows;
  const int slice = static_cast<int>(threadIdx.x) / kScoreTileRows;
  const int num_parts = args.sums.num_parts;
  const float2* states = args.state + head * num_parts * kScoreTileRows + row;
  const RowState all = merge_slices(states, num_parts, slice, row, slices);
  if (slice != 0) return;
  args.shifts[head * kScoreTileRows + place_of_shift(row)] = shift_of(all, row < args.num_rows);
}

template <class Traits>
__global__ void __launch_bounds__(kScoreThreads, kScoreCtasPerSm)
    score_keys_importance_kernel(const __grid_constant__ ScoreArgs args) {
  extern __shared__ __align__(128) char raw[];
  add_importance<Traits>(args, raw);
}

int64_t num_sums_ctas(const ScoreArgs& args) {
  const Problem& problem = args.params.problem;
  return problem.batch * problem.num_q_heads * args.sums.num_parts;
}

int64_t num_importance_ctas(const ScoreArgs& args) {
  const Problem& problem = args.params.problem;
  return problem.batch * problem.num_kv_heads * args.importance.num_parts;
}

template <class Element, int kHeadDim>
cudaError_t launch(const ScoreArgs& args, cudaStream_t stream) {
  using Traits = ScoreTraits<Element, kHeadDim>;
  const Problem& problem = args.params.problem;
  constexpr int kBytes = score_shared_bytes(kHeadDim);
  cudaError_t error = launch_kernel(score_keys_sums_kernel<Traits>, args, num_sums_ctas(args),
                                    kScoreThreads, kBytes, stream);
  if (error != cudaSuccess) return error;
  error = launch_kernel(score_keys_merge_kernel, args, problem.batch * problem.num_q_heads,
                        kMergeThreads, 0, stream);
  if (error != cudaSuccess) return error;
  return launch_kernel(score_keys_importance_kernel<Traits>, args, num_importance_ctas(args),
                       kScoreThreads, kBytes, stream);
}

ScoreArgs plan_passes(const ScoreKeysParams& params, void* workspace, int num_sms) {
  const Problem& problem = params.problem;
  const int64_t num_scored = num_scored_keys(params);
  const int64_t num_heads = problem.batch * problem.num_q_heads;
  ScoreArgs args{};
  args.params = params;
  args.sums = score_parts(num_scored, num_heads, num_sms);
  args.importance = score_parts(num_scored, problem.batch * problem.num_kv_heads, num_sms);
  args.state = static_cast<float2*>(workspace);
  args.shifts =
      reinterpret_cast<float*>(args.state + num_heads * args.sums.num_parts * kScoreTileRows);
  args.num_rows = static_cast<int>(num_score_rows(problem, params.blocking));
  args.num_scored = static_cast<int>(num_scored);
  return args;
}

}  // namespace

int64_t score_keys_workspace(const ScoreKeysParams& params) {
  const int num_sms = sms_of_workspace();
  const Problem& problem = params.problem;
  const int64_t num_heads = problem.batch * problem.num_q_heads;
  const int64_t num_parts = score_parts(num_scored_keys(params), num_heads, num_sms).num_parts;
  return num_heads * kScoreTileRows *
         (num_parts * static_cast<int64_t>(sizeof(float2)) + static_cast<int64_t>(sizeof(float)));
}

const char* launch_score_keys(const ScoreKeysParams& params, void* workspace, void* stream) {
  const Problem& problem = params.problem;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (problem.batch * problem.num_perm_heads == 0 || problem.num_kv == 0) return nullptr;
  int num_sms = 0;
  if (const char* sms_error = count_sms(&num_sms)) return sms_error;
  if (num_scored_keys(params) == 0 || problem.num_q == 0) {
    return clear_importance(params, cuda_stream);
  }
  const ScoreArgs args = plan_passes(params, workspace, num_sms);
  if (larger(num_sums_ctas(args), num_importance_ctas(args)) >
      std::numeric_limits<int32_t>::max()) {
    return "too many heads for one grid";
  }
  const cudaError_t error = dispatch_half(problem.dtype, [&](auto element) {
    return dispatch_head_dim(problem.head_dim, [&](auto head_dim) {
      return launch<decltype(element), head_dim>(args, cuda_stream);
    });
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pbs::cuda::sm80
