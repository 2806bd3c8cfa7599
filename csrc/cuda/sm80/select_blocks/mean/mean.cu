// select_blocks with score="mean", in one kernel that reads every query once: the mean of each
// query block, its logits against all mean keys, and the smallest set of key blocks whose softmax
// mass reaches the threshold. While a CTA waits for its queries, another CTA on the same
// multiprocessor computes.
#include <cuda_runtime.h>

#include "common/elements.h"
#include "common/fragments.cuh"
#include "common/launch_kernel.h"
#include "common/select_blocks/find_sink.cuh"
#include "common/select_blocks/mean/cut_row.cuh"
#include "common/select_blocks/mean/mask_row.cuh"
#include "common/select_blocks/mean/mean_args.cuh"
#include "common/select_blocks/mean/mean_rows.cuh"
#include "device.h"
#include "logits.cuh"
#include "pbs/dispatch.h"
#include "sm80/launch.h"

namespace pbs::cuda::sm80 {
namespace {

constexpr int kSelectThreads = 32 * kLogitRows;

struct SelectArgs : MeanArgs {
  SelectTiles tiles;
};

template <int kHeadDim>
struct SelectShared {
  float means[kLogitRows][kHeadDim];  // mean queries, scaled so that the logits are powers of two
  uint32_t scratch[kLogitRows][kCutScratch];
  alignas(16) int sink;
};

// Tiles of heads that share a permutation are adjacent, so that their keys stay in L2. The longest
// rows come first.
__device__ SelectTile tile_of_cta(const SelectArgs& args) {
  const Problem& problem = args.params.problem;
  const auto num_heads = static_cast<int>(heads_per_perm(problem));
  const auto num_q_heads = static_cast<int>(problem.num_q_heads);
  const int tiles_per_head = (args.num_q_blocks + args.tiles.rows - 1) / args.tiles.rows;
  const auto idx = static_cast<int>(blockIdx.x);
  const int nth = idx / num_heads % tiles_per_head;
  const int head = idx / num_heads / tiles_per_head * num_heads + idx % num_heads;
  SelectTile tile{};
  tile.b = head / num_q_heads;
  tile.hq = head % num_q_heads;
  tile.first_block = (tiles_per_head - 1 - nth) * args.tiles.rows;
  tile.num_blocks = min(args.tiles.rows, args.num_q_blocks - tile.first_block);
  return tile;
}

template <class Element, int kHeadDim>
__device__ void average_queries(const SelectArgs& args, const SelectTile& tile, int r,
                                float (&mean)[kHeadDim]) {
  const ConstRows& q = args.params.q;
  const QueryBlock block = block_of(args, tile, r);
  mean_rows(static_cast<const Element*>(q.data) + row_start(q, RowPlace{tile.b, 0}, tile.hq),
            q.row_stride, block.first_row, block.first_row + block.num_rows, kHeadDim,
            args.params.scale * kLog2e, [&](int d, float x) { mean[d] = x; });
}

template <int kHeadDim>
__device__ void find_logits(const SelectArgs& args, const SelectTile& tile, const float* q_means,
                            float* logits) {
  const Problem& problem = args.params.problem;
  const int64_t perm_head = tile.b * problem.num_perm_heads + tile.hq / heads_per_perm(problem);
  const float* k_means = args.params.k_mean + perm_head * args.num_kv_blocks * kHeadDim;
  const auto num_keys = static_cast<int>(block_of(args, tile, tile.num_blocks - 1).num_candidates);
  const auto compute = [&](auto num_rows) {
    compute_logits<kHeadDim, decltype(num_rows)::value>(q_means, k_means, num_keys, tile.num_blocks,
                                                        args.row_stride, logits);
  };
  // With long sequences, few rows fit.
  if (tile.num_blocks <= kLogitRows / 4) {
    compute(std::integral_constant<int, kLogitRows / 4>{});
  } else if (tile.num_blocks <= kLogitRows / 2) {
    compute(std::integral_constant<int, kLogitRows / 2>{});
  } else {
    compute(std::integral_constant<int, kLogitRows>{});
  }
}

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kSelectThreads, kSelectCtasPerSm)
    select_blocks_mean_kernel(const __grid_constant__ SelectArgs args) {
  extern __shared__ __align__(16) char raw[];
  auto& shared = *reinterpret_cast<SelectShared<kHeadDim>*>(raw);
  static_assert(sizeof(shared) == select_fixed_bytes(kHeadDim));
  auto* logits = reinterpret_cast<float*>(raw + sizeof(shared));
  const Problem& problem = args.params.problem;
  const SelectTile tile = tile_of_cta(args);
  const int r = uniform(static_cast<int>(threadIdx.x) / 32);  // index of the warp
  if (r == kLogitRows - 1) {
    const int sink = find_sink(args.params, tile.b, tile.hq / heads_per_perm(problem));
    if (threadIdx.x % 32 == 0) shared.sink = sink;
  }
  if (r < tile.num_blocks) average_queries<Element>(args, tile, r, shared.means[r]);
  __syncthreads();
  find_logits<kHeadDim>(args, tile, shared.means[0], logits);
  __syncthreads();
  if (r >= tile.num_blocks) return;
  const QueryBlock block = block_of(args, tile, r);
  float* row = logits + r * args.row_stride;
  const Cut cut =
      cut_row(args, tile, block, [&](int d) { return shared.means[r][d]; }, row, shared.scratch[r]);
  const auto num_scored = static_cast<int>(num_scored_blocks(
      block, problem, args.params.blocking, args.params.rule, args.params.is_causal));
  write_row(args.params, args.num_words,
            (tile.b * problem.num_q_heads + tile.hq) * args.num_q_blocks + tile.first_block + r,
            num_scored, static_cast<int>(block.num_candidates), shared.sink, row, cut);
}

template <class Element>
cudaError_t run(const SelectArgs& args, cudaStream_t stream) {
  const Problem& problem = args.params.problem;
  const int64_t num_tiles =
      problem.batch * problem.num_q_heads * ceil_div(args.num_q_blocks, args.tiles.rows);
  return dispatch_head_dim(problem.head_dim, [&](auto head_dim) {
    return launch_kernel(select_blocks_mean_kernel<Element, head_dim>, args, num_tiles,
                         kSelectThreads, args.tiles.shared_bytes, stream);
  });
}

}  // namespace

int64_t select_mean_workspace(const SelectBlocksParams& params) { return own_means_bytes(params); }

const char* launch_select_mean(const SelectBlocksParams& params, void* workspace, void* stream) {
  if (num_select_rows(params) == 0) return nullptr;
  SelectArgs args{};
  if (const char* error = fill_mean_args(params, workspace, args)) return error;
  int num_sms = 0;
  if (const char* error = count_sms(&num_sms)) return error;
  int64_t shared_bytes = 0;
  if (const char* error = shared_bytes_per_sm(&shared_bytes)) return error;
  args.tiles = select_tiles(params, num_sms, shared_bytes);
  if (args.tiles.rows == 0) return "too many key blocks for shared memory";
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = launch_own_means(args, cuda_stream);
  if (error == cudaSuccess) {
    error = dispatch_element(params.problem.dtype, [&](auto element) {
      return run<decltype(element)>(args, cuda_stream);
    });
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pbs::cuda::sm80
