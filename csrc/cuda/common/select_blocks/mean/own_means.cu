// Means of key blocks in original order, whose mass counts with MassRule::kCausal.
#include <cuda_runtime.h>

#include "common/elements.h"
#include "common/launch_kernel.h"
#include "mean_args.cuh"
#include "mean_rows.cuh"

namespace pbs::cuda {
namespace {

constexpr int kMeanKeysThreads = 256;

// One warp per key block.
template <class T>
__global__ void __launch_bounds__(kMeanKeysThreads)
    select_blocks_mean_keys_kernel(const __grid_constant__ MeanArgs args) {
  const Problem& problem = args.params.problem;
  const ConstRows& k = args.params.k;
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kMeanKeysThreads + threadIdx.x) / 32;
  const int64_t head = item / args.num_kv_blocks;
  if (head >= problem.batch * problem.num_kv_heads) return;
  const int64_t begin = item % args.num_kv_blocks * args.params.blocking.kv_block_size;
  const T* rows = static_cast<const T*>(k.data) + head / problem.num_kv_heads * k.batch_stride +
                  head % problem.num_kv_heads * k.head_stride;
  mean_rows(rows, k.row_stride, begin,
            smaller(begin + args.params.blocking.kv_block_size, problem.num_kv),
            static_cast<int>(problem.head_dim), 1.0f,
            [to = args.own_means + item * problem.head_dim](int d, float x) { to[d] = x; });
}

}  // namespace

cudaError_t launch_own_means(const MeanArgs& args, cudaStream_t stream) {
  const Problem& problem = args.params.problem;
  if (!counts_own_mass(args.params.rule)) return cudaSuccess;
  const int64_t num_warps = problem.batch * problem.num_kv_heads * args.num_kv_blocks;
  if (num_warps == 0) return cudaSuccess;
  return dispatch_element(problem.dtype, [&](auto element) {
    return launch_kernel(select_blocks_mean_keys_kernel<decltype(element)>, args,
                         ceil_div(32 * num_warps, kMeanKeysThreads), kMeanKeysThreads, 0, stream);
  });
}

}  // namespace pbs::cuda
