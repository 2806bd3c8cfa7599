// Sorts query blocks by weight before attend draws them.
#include <cuda_runtime.h>

#include "common/attend/sort_groups.cuh"
#include "instances.h"

namespace pbs::cuda::sm80 {
namespace {

constexpr int kMostSortCtas = 64;
constexpr int kRankThreads = 256;

__global__ void __launch_bounds__(kOrderThreads, 1)
    attend_sort_kernel(const __grid_constant__ OrderArgs args) {
  if (blockIdx.x == 0 && threadIdx.x == 0) args.workspace[args.layout.counter] = 0;
  for (int group_idx = blockIdx.x; group_idx < args.groups.num_groups(); group_idx += gridDim.x) {
    sort_group(args, group_idx);
  }
}

__global__ void __launch_bounds__(kRankThreads)
    attend_rank_kernel(const __grid_constant__ OrderArgs args) {
  const int group_idx = blockIdx.x * kRankThreads + threadIdx.x;
  if (group_idx < args.groups.num_groups()) rank_group(args, group_idx);
}

}  // namespace

cudaError_t launch_order(OrderArgs args, cudaStream_t stream) {
  if (const cudaError_t error = launch_count(args, stream); error != cudaSuccess) return error;
  const int64_t num_groups = args.groups.num_groups();
  const auto num_ctas = static_cast<unsigned>(smaller(num_groups, kMostSortCtas));
  attend_sort_kernel<<<num_ctas, kOrderThreads, 0, stream>>>(args);
  attend_rank_kernel<<<static_cast<unsigned>(ceil_div(num_groups, kRankThreads)), kRankThreads, 0,
                       stream>>>(args);
  return cudaGetLastError();
}

}  // namespace pbs::cuda::sm80
