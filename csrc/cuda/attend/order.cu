// Sorts query blocks by weight before attend draws them.
#include <cuda_runtime.h>

#include <cute/arch/cluster_sm90.hpp>

#include "order.cuh"
#include "pbs/bitmask.h"
#include "pbs/key_tiles.h"

namespace pbs::cuda {
namespace {

constexpr int kClusterCtas = 8;  // all there are: they wait for each other before groups are ranked
constexpr int kThreads = kOrderBins;

__device__ QueryBlock describe(const OrderArgs& args, const WorkTile& tile) {
  return query_block(tile.q_block_idx, args.problem.num_q, args.problem.num_kv,
                     args.blocking.block_size, args.blocking.kv_block_size,
                     args.blocking.segment_size, args.is_causal);
}

__device__ int count_selected(const OrderArgs& args, const WorkTile& tile) {
  const int num_candidates = static_cast<int>(describe(args, tile).num_candidates);
  const int64_t row = static_cast<int64_t>(tile.head) * args.groups.num_q_blocks + tile.q_block_idx;
  const uint32_t* words = args.block_mask + row * args.num_mask_words;
  int count = 0;
#pragma unroll 8
  for (int w = 0; w * kBitsPerWord < num_candidates; ++w) {
    count += __popc(candidate_bits(words[w], w, num_candidates));
  }
  return count;
}

// Exclusive sum over the threads' values.
__device__ int scan(int value, int (&warp_sums)[kThreads / 32]) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int sum = value;
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += left;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int before = 0;
  for (int w = 0; w < warp; ++w) before += warp_sums[w];
  return before + sum - value;
}

__device__ void sort_group(const OrderArgs& args, int group_idx) {
  __shared__ int bins[kOrderBins];
  __shared__ int warp_sums[kThreads / 32];
  __shared__ unsigned long long weight;
  const int num_blocks = args.groups.blocks_per_group();
  const int most_tiles =
      static_cast<int>(ceil_div(args.problem.num_kv, args.tile_keys) + 2);  // two may be part full
  int32_t* sorted = args.workspace + args.layout.sorted + group_idx * int64_t{num_blocks};
  int32_t* num_selected =
      args.workspace + args.layout.num_selected + group_idx * int64_t{num_blocks};
  const auto count_tiles = [&](int i) {
    const WorkTile tile = work_tile(args.groups, group_idx, i);
    if (tile.head >= args.groups.num_heads) return 0;
    return key_tiles(describe(args, tile), num_selected[i], args.blocking.kv_block_size,
                     args.tile_keys, args.is_causal)
        .total;
  };
  bins[threadIdx.x] = 0;
  if (threadIdx.x == 0) weight = 0;
  __syncthreads();
  unsigned long long own_weight = 0;
  for (int i = threadIdx.x; i < num_blocks; i += kThreads) {
    const WorkTile tile = work_tile(args.groups, group_idx, i);
    num_selected[i] = tile.head < args.groups.num_heads ? count_selected(args, tile) : 0;
    const int num_tiles = count_tiles(i);
    own_weight += num_tiles;
    atomicAdd(&bins[order_bin(num_tiles, most_tiles)], 1);
  }
  atomicAdd(&weight, own_weight);
  __syncthreads();
  const int first = scan(bins[threadIdx.x], warp_sums);
  __syncthreads();
  bins[threadIdx.x] = first;
  __syncthreads();
  for (int i = threadIdx.x; i < num_blocks; i += kThreads) {
    sorted[atomicAdd(&bins[order_bin(count_tiles(i), most_tiles)], 1)] = i;
  }
  if (threadIdx.x == 0) {
    args.workspace[args.layout.weights + group_idx] = __float_as_int(static_cast<float>(weight));
  }
  __syncthreads();
}

__global__ void __cluster_dims__(kClusterCtas) __launch_bounds__(kThreads)
    order_kernel(const __grid_constant__ OrderArgs args) {
  const int num_groups = args.groups.num_groups();
  if (blockIdx.x == 0 && threadIdx.x == 0) args.workspace[args.layout.counter] = 0;
  for (int group_idx = blockIdx.x; group_idx < num_groups; group_idx += kClusterCtas) {
    sort_group(args, group_idx);
  }
  cute::cluster_arrive();
  cute::cluster_wait();
  const int32_t* weights = args.workspace + args.layout.weights;
  for (int group_idx = blockIdx.x * kThreads + threadIdx.x; group_idx < num_groups;
       group_idx += kClusterCtas * kThreads) {
    const float weight = __int_as_float(__ldcg(weights + group_idx));
    int rank = 0;
    for (int other = 0; other < num_groups; ++other) {
      const float other_weight = __int_as_float(__ldcg(weights + other));
      rank += other_weight > weight || (other_weight == weight && other < group_idx);
    }
    args.workspace[args.layout.group_at + rank] = group_idx;
  }
}

}  // namespace

cudaError_t launch_order(const OrderArgs& args, cudaStream_t stream) {
  order_kernel<<<kClusterCtas, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace pbs::cuda
