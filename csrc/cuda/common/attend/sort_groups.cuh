// Sorts the query blocks of a group by weight, and the groups by theirs.
#pragma once

#include "common/attend/order.cuh"
#include "pbs/bitmask.h"

namespace pbs::cuda {

constexpr int kOrderThreads = kOrderBins;

__device__ inline QueryBlock block_of(const OrderArgs& args, const WorkTile& tile) {
  return query_block(tile.q_block_idx, args.problem, args.blocking, args.is_causal);
}

// Counts the bits in words first, first + step, ... of the mask of a query block.
__device__ inline int count_selected(const OrderArgs& args, const WorkTile& tile, int first,
                                     int step) {
  if (tile.head >= args.groups.num_heads) return 0;
  const int num_candidates = static_cast<int>(block_of(args, tile).num_candidates);
  const int64_t row = static_cast<int64_t>(tile.head) * args.groups.num_q_blocks + tile.q_block_idx;
  const uint32_t* words = args.block_mask + row * args.num_mask_words;
  int count = 0;
#pragma unroll 8
  for (int w = first; w * static_cast<int>(kBitsPerWord) < num_candidates; w += step) {
    count += __popc(candidate_bits(words[w], w, num_candidates));
  }
  return count;
}

// The number of keys that the query block visits.
__device__ inline int count_keys(const OrderArgs& args, const WorkTile& tile, int num_selected) {
  if (tile.head >= args.groups.num_heads) return 0;
  const QueryBlock block = block_of(args, tile);
  return num_selected * static_cast<int>(args.blocking.kv_block_size) +
         static_cast<int>(block.own_end - block.own_begin);
}

// The exclusive prefix sum over the values of the threads.
__device__ inline int scan(int value, int (&warp_sums)[kOrderThreads / 32]) {
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

__device__ inline void sort_group(const OrderArgs& args, int group_idx) {
  __shared__ int bins[kOrderBins];
  __shared__ int warp_sums[kOrderThreads / 32];
  __shared__ float group_weight;
  const int num_blocks = args.groups.blocks_per_group();
  const int64_t first_block = group_idx * int64_t{num_blocks};
  int32_t* unsorted = args.workspace + args.layout.unsorted + first_block;
  auto* sorted = reinterpret_cast<OrderedBlock*>(args.workspace + args.layout.sorted) + first_block;
  const int most_keys = static_cast<int>(args.problem.num_kv);
  const float bins_per_key = static_cast<float>(kOrderBins - 1) / most_keys;
  bins[threadIdx.x] = 0;
  if (threadIdx.x == 0) group_weight = 0;
  __syncthreads();
  float weight = 0.0f;
  for (int i = threadIdx.x; i < num_blocks; i += kOrderThreads) {
    const WorkTile tile = work_tile(args.groups, group_idx, i);
    const int num_selected =
        args.is_counted ? unsorted[i] : count_selected(args, tile, /*first=*/0, /*step=*/1);
    const int num_keys = count_keys(args, tile, num_selected);
    unsorted[i] = num_selected;
    weight += static_cast<float>(num_keys);
    atomicAdd(&bins[order_bin(num_keys, most_keys, bins_per_key)], 1);
  }
  // One atomic per warp, because atomics on one address in shared memory run one after the other.
  for (int step = 16; step > 0; step /= 2) weight += __shfl_xor_sync(~0u, weight, step);
  if (threadIdx.x % 32 == 0) atomicAdd(&group_weight, weight);
  __syncthreads();
  const int first = scan(bins[threadIdx.x], warp_sums);
  __syncthreads();
  bins[threadIdx.x] = first;
  __syncthreads();
  for (int i = threadIdx.x; i < num_blocks; i += kOrderThreads) {
    const int num_selected = unsorted[i];
    const int num_keys = count_keys(args, work_tile(args.groups, group_idx, i), num_selected);
    const int place = atomicAdd(&bins[order_bin(num_keys, most_keys, bins_per_key)], 1);
    sorted[place] = OrderedBlock{i, num_selected};
  }
  if (threadIdx.x == 0) {
    args.workspace[args.layout.weights + group_idx] = __float_as_int(group_weight);
  }
  __syncthreads();
}

// Writes the rank of a group among all groups. The heaviest is first.
__device__ inline void rank_group(const OrderArgs& args, int group_idx) {
  const int num_groups = args.groups.num_groups();
  const int32_t* weights = args.workspace + args.layout.weights;
  const float weight = __int_as_float(__ldcg(weights + group_idx));
  int rank = 0;
  for (int other = 0; other < num_groups; ++other) {
    const float other_weight = __int_as_float(__ldcg(weights + other));
    rank += other_weight > weight || (other_weight == weight && other < group_idx);
  }
  args.workspace[args.layout.group_at + rank] = group_idx;
}

}  // namespace pbs::cuda
