// select_blocks with score="mean", in one kernel that reads every query once: the mean of each
// query block, its logits against all mean keys, and the smallest set of key blocks whose softmax
// mass reaches the threshold.
#include <cuda_runtime.h>
#include <cutlass/arch/reg_reconfig.h>

#include "common/elements.h"
#include "common/launch_kernel.h"
#include "common/select_blocks/find_sink.cuh"
#include "common/select_blocks/mean/cut_row.cuh"
#include "common/select_blocks/mean/mask_row.cuh"
#include "common/select_blocks/mean/mean_args.cuh"
#include "device.h"
#include "pbs/dispatch.h"
#include "query_means.cuh"
#include "sm90/launch.h"
#include "sm90/tma.h"

namespace pbs::cuda::sm90 {
namespace {

// The launch gives 96 registers per thread (65536 / 640, in steps of 8).
constexpr int kRowRegisters = 104;
constexpr int kMeanRegisters = 64;
static_assert(kRowWarps * kRowRegisters + kMeanWarps * kMeanRegisters ==
              (kRowWarps + kMeanWarps) * 96);

template <class Element, int kHeadDim>
__device__ void write_means(const SelectArgs& args, const SelectShared<kHeadDim>& shared) {
  const int thread = static_cast<int>(threadIdx.x) - 32 * kRowWarps;
  const int64_t num_heads = heads_per_perm(args.params.problem);
  QueryMeans<Element, kHeadDim> means(args, shared);
  for (TileWalk walk(args); !walk.is_done(); walk.advance()) {
    const SelectTile tile = walk.tile();
    const int buffer = walk.nth() % kMeanBuffers;
    const uint32_t parity = walk.nth() / kMeanBuffers & 1;
    const int64_t hp = tile.hq / num_heads;
    const int sink = thread < 32 ? find_sink(args.params, tile.b, hp) : 0;
    shared.barriers->means_empty[buffer].wait(parity ^ 1);
    if (thread == 0) shared.barriers->sinks[buffer] = sink;
    means.add_tile(tile, shared.means_of(buffer));
    cutlass::arch::fence_view_async_shared();  // the tensor cores read it
    shared.barriers->means_full[buffer].arrive();
  }
}

template <int kHeadDim>
__device__ void select_rows(const SelectArgs& args, const SelectShared<kHeadDim>& shared) {
  const Problem& problem = args.params.problem;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t num_heads = heads_per_perm(problem);
  for (TileWalk walk(args); !walk.is_done(); walk.advance()) {
    const SelectTile tile = walk.tile();
    const int buffer = walk.nth() % kMeanBuffers;
    const SplitQueries q_means = shared.means_of(buffer);
    const int64_t perm_head = tile.b * problem.num_perm_heads + tile.hq / num_heads;
    compute_logits<kHeadDim>(
        q_means, args.params.k_mean + perm_head * args.num_kv_blocks * kHeadDim,
        static_cast<int>(block_of(args, tile, tile.num_blocks - 1).num_candidates), tile.num_blocks,
        args.row_stride, shared.logits,
        [&] { shared.barriers->means_full[buffer].wait(walk.nth() / kMeanBuffers & 1); });
    const int sink = shared.barriers->sinks[buffer];
    cutlass::arch::NamedBarrier::sync(32 * kRowWarps, 0);
    for (int r = warp; r < tile.num_blocks; r += kRowWarps) {
      const QueryBlock block = block_of(args, tile, r);
      float* row = shared.logits + r * args.row_stride;
      const Cut cut = cut_row(
          args, tile, block, [&](int d) { return q_means.read(r, d); }, row,
          shared.scratch + warp * kCutScratch);
      const auto num_scored = static_cast<int>(num_scored_blocks(
          block, problem, args.params.blocking, args.params.rule, args.params.is_causal));
      write_row(args.params, args.num_words,
                (tile.b * problem.num_q_heads + tile.hq) * args.num_q_blocks + tile.first_block + r,
                num_scored, static_cast<int>(block.num_candidates), sink, row, cut);
    }
    shared.barriers->means_empty[buffer].arrive();
    cutlass::arch::NamedBarrier::sync(32 * kRowWarps, 0);  // the next tile overwrites the logits
  }
}

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kSelectThreads, 1)
    select_blocks_mean_kernel(const __grid_constant__ SelectArgs args) {
  extern __shared__ char raw[];
  const SelectShared<kHeadDim> shared(args, raw);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < args.tiles.num_slots; ++slot) {
      shared.barriers->slot_full[slot].init(1);
      shared.barriers->slot_empty[slot].init(kMeanWarps);
    }
    for (int buffer = 0; buffer < kMeanBuffers; ++buffer) {
      shared.barriers->means_full[buffer].init(32 * kMeanWarps);
      shared.barriers->means_empty[buffer].init(32 * kRowWarps);
    }
    cutlass::arch::fence_barrier_init();
  }
  if constexpr (!std::is_same_v<Element, float>) {
    for (int i = threadIdx.x; i < kOnesBytes / 2; i += kSelectThreads) {
      static_cast<Element*>(shared.ones)[i] = Element(1.0f);
    }
    cutlass::arch::fence_view_async_shared();
  }
  __syncthreads();
  if (warp < kRowWarps) {
    cutlass::arch::warpgroup_reg_alloc<kRowRegisters>();
    select_rows(args, shared);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<kMeanRegisters>();
    write_means<Element>(args, shared);
  }
}

template <class Element>
const char* launch(SelectArgs& args, cudaStream_t stream) {
  const Problem& problem = args.params.problem;
  int num_sms = 0;
  if (const char* error = count_sms(&num_sms)) return error;
  args.tiles = select_tiles(args.params, num_sms);
  if (args.tiles.rows == 0) return "too many key blocks for shared memory";
  if (args.tiles.num_slots > 0) {
    if (const char* encode_error =
            encode_rows(&args.q, args.params.q, problem, problem.num_q_heads, problem.num_q,
                        args.params.blocking.block_size,
                        query_slot_columns(static_cast<int>(problem.head_dim)))) {
      return encode_error;
    }
  }
  const int64_t num_tiles =
      problem.batch * problem.num_q_heads * ceil_div(args.num_q_blocks, args.tiles.rows);
  cudaError_t error = launch_own_means(args, stream);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  error = dispatch_head_dim(problem.head_dim, [&](auto head_dim) {
    return launch_kernel(select_blocks_mean_kernel<Element, head_dim>, args,
                         smaller(num_sms, num_tiles), kSelectThreads, args.tiles.shared_bytes,
                         stream);
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

int64_t select_mean_workspace(const SelectBlocksParams& params) { return own_means_bytes(params); }

const char* launch_select_mean(const SelectBlocksParams& params, void* workspace, void* stream) {
  if (num_select_rows(params) == 0) return nullptr;
  SelectArgs args{};
  if (const char* error = fill_mean_args(params, workspace, args)) return error;
  return dispatch_element(params.problem.dtype, [&](auto element) {
    return launch<decltype(element)>(args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace pbs::cuda::sm90
