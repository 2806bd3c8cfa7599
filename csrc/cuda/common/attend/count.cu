// Counts the key blocks that each query block selects, before the query blocks are sorted.
#include <cuda_runtime.h>

#include "common/attend/sort_groups.cuh"

namespace pbs::cuda {
namespace {

// With at least this many mask words, they are counted by more CTAs than those that sort.
constexpr int64_t kMostWordsToCount = 1 << 19;
constexpr int kCountThreads = 256;

// One warp per query block.
__global__ void __launch_bounds__(kCountThreads)
    attend_count_kernel(const __grid_constant__ OrderArgs args) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int num_blocks = args.groups.blocks_per_group();
  const auto idx = static_cast<int>(blockIdx.x * (kCountThreads / 32) + threadIdx.x / 32);
  if (idx >= args.groups.num_groups() * num_blocks) return;
  const WorkTile tile = work_tile(args.groups, idx / num_blocks, idx % num_blocks);
  const int count = __reduce_add_sync(~0u, count_selected(args, tile, lane, 32));
  if (lane == 0) args.workspace[args.layout.unsorted + idx] = count;
}

}  // namespace

cudaError_t launch_count(OrderArgs& args, cudaStream_t stream) {
  const int64_t num_blocks =
      static_cast<int64_t>(args.groups.num_groups()) * args.groups.blocks_per_group();
  args.is_counted = num_blocks * args.num_mask_words > kMostWordsToCount;
  if (!args.is_counted) return cudaSuccess;
  const auto num_ctas = static_cast<unsigned>(ceil_div(num_blocks, kCountThreads / 32));
  attend_count_kernel<<<num_ctas, kCountThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace pbs::cuda
