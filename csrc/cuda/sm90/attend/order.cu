// Sorts query blocks by weight before attend draws them.
#include <cuda_runtime.h>

#include <cute/arch/cluster_sm90.hpp>

#include "common/attend/sort_groups.cuh"
#include "instances.h"

namespace pbs::cuda::sm90 {
namespace {

constexpr int kClusterCtas = 8;  // all CTAs: they wait for each other before groups are ranked

__global__ void __cluster_dims__(kClusterCtas) __launch_bounds__(kOrderThreads, 1)
    attend_order_kernel(const __grid_constant__ OrderArgs args) {
  cudaTriggerProgrammaticLaunchCompletion();  // attend may start; it waits before it uses this
  const int num_groups = args.groups.num_groups();
  if (blockIdx.x == 0 && threadIdx.x == 0) args.workspace[args.layout.counter] = 0;
  for (int group_idx = blockIdx.x; group_idx < num_groups; group_idx += kClusterCtas) {
    sort_group(args, group_idx);
  }
  cute::cluster_arrive();
  cute::cluster_wait();
  for (int group_idx = blockIdx.x * kOrderThreads + threadIdx.x; group_idx < num_groups;
       group_idx += kClusterCtas * kOrderThreads) {
    rank_group(args, group_idx);
  }
}

}  // namespace

cudaError_t launch_order(OrderArgs args, cudaStream_t stream) {
  if (const cudaError_t error = launch_count(args, stream); error != cudaSuccess) return error;
  attend_order_kernel<<<kClusterCtas, kOrderThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace pbs::cuda::sm90
