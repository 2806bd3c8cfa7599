// select_blocks on CUDA: the mean of each query block, its logits against all mean keys, and the
// smallest set of key blocks whose softmax mass reaches the threshold, in one kernel that reads
// every query once.
#include <cuda_runtime.h>
#include <cutlass/arch/reg_reconfig.h>

#include <limits>

#include "../device.h"
#include "../launch.h"
#include "../launch_kernel.h"
#include "../tma.h"
#include "mask_row.cuh"
#include "query_means.cuh"
#include "rows.cuh"

namespace pbs::cuda {
namespace {

constexpr int kMeanKeysThreads = 256;

// 96 a thread are there at launch (65536 / 640, in steps of 8).
constexpr int kRowRegisters = 104;
constexpr int kMeanRegisters = 64;
static_assert(kRowWarps * kRowRegisters + kMeanWarps * kMeanRegisters ==
              (kRowWarps + kMeanWarps) * 96);

// One warp a key block.
template <class T>
__global__ void __launch_bounds__(kMeanKeysThreads)
    mean_keys_kernel(const __grid_constant__ SelectArgs args) {
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

template <class Element, int kHeadDim>
__device__ void write_means(const SelectArgs& args, const SelectShared<kHeadDim>& shared) {
  const int thread = static_cast<int>(threadIdx.x) - 32 * kRowWarps;
  const int64_t heads_per_perm =
      args.params.problem.num_q_heads / args.params.problem.num_perm_heads;
  QueryMeans<Element, kHeadDim> means(args, shared);
  for (TileWalk walk(args); !walk.is_done(); walk.advance()) {
    const SelectTile tile = walk.tile();
    const int buffer = walk.nth() % kMeanBuffers;
    const uint32_t parity = walk.nth() / kMeanBuffers & 1;
    const int64_t hp = tile.hq / heads_per_perm;
    const int sink = thread < 32 ? find_sink(args.params, tile.b, hp) : 0;
    shared.barriers->means_empty[buffer].wait(parity ^ 1);
    if (thread == 0) shared.barriers->sinks[buffer] = sink;
    means.add_tile(tile, shared.means_of(buffer));
    cutlass::arch::fence_view_async_shared();  // read by the tensor cores
    shared.barriers->means_full[buffer].arrive();
  }
}

template <int kHeadDim>
__device__ void select_rows(const SelectArgs& args, const SelectShared<kHeadDim>& shared) {
  const Problem& problem = args.params.problem;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t heads_per_perm = problem.num_q_heads / problem.num_perm_heads;
  for (TileWalk walk(args); !walk.is_done(); walk.advance()) {
    const SelectTile tile = walk.tile();
    const int buffer = walk.nth() % kMeanBuffers;
    const SplitQueries q_means = shared.means_of(buffer);
    const int64_t perm_head = tile.b * problem.num_perm_heads + tile.hq / heads_per_perm;
    compute_logits<kHeadDim>(
        q_means, args.params.k_mean + perm_head * args.num_kv_blocks * kHeadDim,
        static_cast<int>(describe(args, tile, tile.num_blocks - 1).num_candidates), tile.num_blocks,
        args.row_stride, shared.logits,
        [&] { shared.barriers->means_full[buffer].wait(walk.nth() / kMeanBuffers & 1); });
    const int sink = shared.barriers->sinks[buffer];
    cutlass::arch::NamedBarrier::sync(32 * kRowWarps, 0);
    for (int r = warp; r < tile.num_blocks; r += kRowWarps) {
      const QueryBlock block = describe(args, tile, r);
      float* row = shared.logits + r * args.row_stride;
      const Cut cut =
          cut_row(args, tile, block, q_means, r, row, shared.scratch + warp * kCutScratch);
      write_row(args.params, args.num_words,
                (tile.b * problem.num_q_heads + tile.hq) * args.num_q_blocks + tile.first_block + r,
                static_cast<int>(block.num_candidates), sink, row, cut);
    }
    shared.barriers->means_empty[buffer].arrive();
    cutlass::arch::NamedBarrier::sync(32 * kRowWarps, 0);  // the next tile writes over the logits
  }
}

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kSelectThreads, 1)
    select_kernel(const __grid_constant__ SelectArgs args) {
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
auto kernel_of(int64_t head_dim) {
  switch (head_dim) {
    case 64:
      return select_kernel<Element, 64>;
    case 96:
      return select_kernel<Element, 96>;
    case 128:
      return select_kernel<Element, 128>;
    default:
      return select_kernel<Element, 256>;
  }
}

template <class Element>
const char* launch(SelectArgs& args, cudaStream_t stream) {
  const Problem& problem = args.params.problem;
  int num_sms = 0;
  cudaError_t error = count_sms(&num_sms);
  if (error != cudaSuccess) return cudaGetErrorString(error);
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
  if (args.params.is_mass_causal) {
    const int64_t num_key_blocks = problem.batch * problem.num_kv_heads * args.num_kv_blocks;
    const auto num_ctas = static_cast<unsigned>(ceil_div(32 * num_key_blocks, kMeanKeysThreads));
    mean_keys_kernel<Element><<<num_ctas, kMeanKeysThreads, 0, stream>>>(args);
  }
  const int64_t num_tiles =
      problem.batch * problem.num_q_heads * ceil_div(args.num_q_blocks, args.tiles.rows);
  error = launch_kernel(kernel_of<Element>(problem.head_dim), args, smaller(num_sms, num_tiles),
                        kSelectThreads, args.tiles.shared_bytes, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

int64_t select_workspace_floats(const SelectBlocksParams& params) {
  const Problem& problem = params.problem;
  if (!params.is_mass_causal) return 0;
  return problem.batch * problem.num_kv_heads *
         ceil_div(problem.num_kv, params.blocking.kv_block_size) * problem.head_dim;
}

const char* launch_select_blocks(const SelectBlocksParams& params, float* workspace, void* stream) {
  const Problem& problem = params.problem;
  const Blocking& blocking = params.blocking;
  SelectArgs args{};
  args.params = params;
  args.own_means = workspace;
  args.num_q_blocks = static_cast<int>(ceil_div(problem.num_q, blocking.block_size));
  args.num_kv_blocks = static_cast<int>(ceil_div(problem.num_kv, blocking.kv_block_size));
  args.num_words = static_cast<int>(num_mask_words(args.num_kv_blocks));
  args.row_stride = static_cast<int>(logit_stride(num_mass_entries(params)));
  const int64_t num_rows = problem.batch * problem.num_q_heads * args.num_q_blocks;
  if (num_rows == 0) return nullptr;
  if (num_rows > std::numeric_limits<int32_t>::max()) return "too many query blocks for one grid";
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (problem.dtype) {
    case DType::kFloat32:
      return launch<float>(args, cuda_stream);
    case DType::kBFloat16:
      return launch<cutlass::bfloat16_t>(args, cuda_stream);
    case DType::kFloat16:
      return launch<cutlass::half_t>(args, cuda_stream);
  }
  return "unknown dtype";
}

}  // namespace pbs::cuda
