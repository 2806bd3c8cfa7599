// select_blocks on CUDA: a CTA takes a few query blocks of one head, finds their mean queries and
// their logits against all mean keys, and picks the smallest set of key blocks whose softmax mass
// reaches the threshold, all in shared memory.
#include <cuda_runtime.h>
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <limits>

#include "../device.h"
#include "../launch.h"
#include "logits.cuh"
#include "mean_rows.cuh"
#include "pbs/bitmask.h"
#include "top_mass.cuh"

namespace pbs::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kReservedBytes = 1024;  // of each CTA, by the system
constexpr float kLog2e = 1.4426950408889634f;

struct SelectArgs {
  SelectBlocksParams params;
  float* own_means;  // (B, Hkv, num_kv_blocks, D) of keys in their own order; with causal mass
  int num_q_blocks;
  int num_kv_blocks;
  int num_words;
  int row_stride;  // floats from one row of logits to the next
  int tile_rows;   // query blocks of a CTA
};

// One warp a key block.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) mean_keys_kernel(const SelectArgs args) {
  const Problem& problem = args.params.problem;
  const ConstRows& k = args.params.k;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t head = item / args.num_kv_blocks;
  if (head >= problem.batch * problem.num_kv_heads) return;
  const int64_t begin = item % args.num_kv_blocks * args.params.blocking.kv_block_size;
  const T* rows = static_cast<const T*>(k.data) + head / problem.num_kv_heads * k.batch_stride +
                  head % problem.num_kv_heads * k.head_stride;
  mean_rows(rows, k.row_stride, begin,
            smaller(begin + args.params.blocking.kv_block_size, problem.num_kv),
            static_cast<int>(problem.head_dim), 1.0f, args.own_means + item * problem.head_dim);
}

// Sets the bits of a query block's row, and counts them, by one warp.
__device__ void write_row(const SelectArgs& args, int64_t row, int num_candidates, int sink,
                          const float* weights, const Cut& cut) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t* words = args.params.block_mask + row * args.num_words;
  int num_equal = 0;
  int count = 0;
  for (int first = 0; first < args.num_words; first += 32) {
    uint32_t own_word = 0;  // of the lane's place
    const int num_words = min(32, args.num_words - first);
#pragma unroll 4
    for (int w = 0; w < num_words; ++w) {
      const int i = (first + w) * 32 + lane;
      const uint32_t weight = i < num_candidates ? __float_as_uint(weights[i]) : 0;
      bool is_selected = weight >= cut.weight;
      if (!cut.takes_all_equal) {
        const bool is_equal = i < num_candidates && weight == cut.weight;
        const uint32_t equal = __ballot_sync(~0u, is_equal);
        const int rank = num_equal + __popc(equal & ((1u << lane) - 1));
        if (is_equal && rank >= cut.num_equal) is_selected = false;
        num_equal += __popc(equal);
      }
      const uint32_t word = __ballot_sync(~0u, i < num_candidates && (is_selected || i == sink));
      if (lane == w) own_word = word;
    }
    if (lane < num_words) words[first + lane] = own_word;
    count += __popc(own_word);
  }
  count = __reduce_add_sync(~0u, count);
  if (lane == 0) args.params.counts[row] = count;
}

// The permuted key block that holds token 0, by the whole CTA.
__device__ int find_sink(const SelectArgs& args, int64_t b, int64_t hp) {
  __shared__ int sink;
  if (threadIdx.x == 0) sink = 0;
  __syncthreads();
  const int64_t size = smaller(args.params.blocking.segment_size, args.params.problem.num_kv);
  if (args.params.perm != nullptr) {
    const int32_t* perm = args.params.perm + (b * args.params.problem.num_perm_heads + hp) *
                                                 args.params.problem.num_kv;
    for (int i = threadIdx.x; i < size; i += kThreads) {
      if (perm[i] == 0) sink = i / static_cast<int>(args.params.blocking.kv_block_size);
    }
  }
  __syncthreads();
  return sink;
}

// What a CTA works on: some query blocks of one head, the longest rows of all heads first.
struct Tile {
  int64_t b;
  int64_t hq;
  int first_block;
  int num_blocks;
};

__device__ Tile tile_of(const SelectArgs& args) {
  const Problem& problem = args.params.problem;
  const auto num_heads = static_cast<int>(problem.batch * problem.num_q_heads);
  const int head = static_cast<int>(blockIdx.x) % num_heads;
  const int idx = static_cast<int>(blockIdx.x) / num_heads;
  const int num_tiles = (args.num_q_blocks + args.tile_rows - 1) / args.tile_rows;
  Tile tile{};
  tile.b = head / static_cast<int>(problem.num_q_heads);
  tile.hq = head % static_cast<int>(problem.num_q_heads);
  tile.first_block = (num_tiles - 1 - idx) * args.tile_rows;
  tile.num_blocks = min(args.tile_rows, args.num_q_blocks - tile.first_block);
  return tile;
}

// Logits of the own segment's key blocks behind those of the candidates, by one warp. Returns how
// many there are in all.
__device__ int add_own_logits(const SelectArgs& args, const Tile& tile, const QueryBlock& block,
                              const float* q_mean, float* logits) {
  const Problem& problem = args.params.problem;
  const int head_dim = static_cast<int>(problem.head_dim);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t hkv = tile.hq / (problem.num_q_heads / problem.num_kv_heads);
  const float* own_means =
      args.own_means + (tile.b * problem.num_kv_heads + hkv) * args.num_kv_blocks * head_dim;
  const int64_t first = block.own_begin / args.params.blocking.kv_block_size;
  const int64_t last = ceil_div(block.own_end, args.params.blocking.kv_block_size);
  auto n = static_cast<int>(block.num_candidates);
  for (int64_t j = first; j < last; ++j, ++n) {
    float sum = 0.0f;
    for (int d = lane; d < head_dim; d += 32) sum += q_mean[d] * own_means[j * head_dim + d];
    sum = warp_sum(sum);
    if (lane == 0) logits[n] = sum;
  }
  __syncwarp();
  return n;
}

// The cut of one query block's row, by one warp. Leaves weights of candidates in `logits`.
__device__ Cut cut_row(const SelectArgs& args, const Tile& tile, const QueryBlock& block,
                       const float* q_mean, float* logits) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto num_candidates = static_cast<int>(block.num_candidates);
  const int n = args.params.is_mass_causal ? add_own_logits(args, tile, block, q_mean, logits)
                                           : num_candidates;
  const float total = weigh(logits, n);
  float own = 0.0f;
  for (int i = num_candidates + lane; i < n; i += 32) {
    own += logits[i];
    logits[i] = 0.0f;
  }
  __syncwarp();
  // With a NaN among the inputs no order means anything: visit everything, as dense would.
  if (args.params.threshold >= 1.0 || !(total >= 0.0f)) return Cut{0, num_candidates, true};
  const float needed = static_cast<float>(args.params.threshold) * total - warp_sum(own);
  const float of_candidates =
      n == num_candidates ? total : part_from(logits, num_candidates, 1).mass;
  return find_cut(logits, num_candidates, of_candidates, needed);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) select_kernel(const SelectArgs args) {
  extern __shared__ float4 raw[];
  const SelectBlocksParams& params = args.params;
  const Problem& problem = params.problem;
  const Blocking& blocking = params.blocking;
  const int head_dim = static_cast<int>(problem.head_dim);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  float* q_means = reinterpret_cast<float*>(raw);                 // (kLogitRows, query_stride)
  float* logits = q_means + kLogitRows * query_stride(head_dim);  // (tile_rows, row_stride)
  const Tile tile = tile_of(args);
  const int64_t hp = tile.hq / (problem.num_q_heads / problem.num_perm_heads);
  const auto describe = [&](int r) {
    return query_block(tile.first_block + r, problem.num_q, problem.num_kv, blocking.block_size,
                       blocking.kv_block_size, blocking.segment_size, params.is_causal);
  };

  const T* q = static_cast<const T*>(params.q.data) + tile.b * params.q.batch_stride +
               tile.hq * params.q.head_stride;
  for (int r = warp; r < tile.num_blocks; r += kWarps) {
    const QueryBlock block = describe(r);
    mean_rows(q, params.q.row_stride, block.first_row, block.first_row + block.num_rows, head_dim,
              params.scale * kLog2e, q_means + r * query_stride(head_dim));
  }
  const int sink = find_sink(args, tile.b, hp);  // its barriers are also those of q_means
  compute_logits(
      q_means,
      params.k_mean + (tile.b * problem.num_perm_heads + hp) * args.num_kv_blocks * head_dim,
      head_dim, static_cast<int>(describe(tile.num_blocks - 1).num_candidates), tile.num_blocks,
      args.row_stride, logits);
  __syncthreads();

  for (int r = warp; r < tile.num_blocks; r += kWarps) {
    const QueryBlock block = describe(r);
    float* row = logits + r * args.row_stride;
    const Cut cut = cut_row(args, tile, block, q_means + r * query_stride(head_dim), row);
    write_row(args,
              (tile.b * problem.num_q_heads + tile.hq) * args.num_q_blocks + tile.first_block + r,
              static_cast<int>(block.num_candidates), sink, row, cut);
  }
}

int shared_bytes(const SelectArgs& args, int64_t num_rows) {
  return static_cast<int>(sizeof(float)) *
         (kLogitRows * query_stride(static_cast<int>(args.params.problem.head_dim)) +
          static_cast<int>(num_rows) * args.row_stride);
}

// As many rows as a product has, or as many as fit.
int64_t fitting_rows(const SelectArgs& args, int64_t bytes) {
  const int64_t row_bytes = args.row_stride * static_cast<int64_t>(sizeof(float));
  return smaller(kLogitRows, (bytes - shared_bytes(args, 0)) / row_bytes);
}

// Two CTAs to an SM, unless rows are so long that products would be mostly empty; and on a short
// sequence fewer rows, so that every SM has its two.
int64_t tile_rows(const SelectArgs& args, int num_sms) {
  const int64_t in_half = fitting_rows(args, kMaxSharedBytes / 2 - kReservedBytes);
  if (in_half < kLogitRows / 2) return fitting_rows(args, kMaxSharedBytes);
  const int64_t num_heads = args.params.problem.batch * args.params.problem.num_q_heads;
  return larger(1, smaller(in_half, num_heads * args.num_q_blocks / (2 * num_sms)));
}

template <class T>
const char* launch(SelectArgs& args, cudaStream_t stream) {
  const Problem& problem = args.params.problem;
  int num_sms = 0;
  cudaError_t error = count_sms(&num_sms);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t num_rows = tile_rows(args, num_sms);
  if (num_rows <= 0) return "too many key blocks for shared memory";
  args.tile_rows = static_cast<int>(num_rows);
  if (args.params.is_mass_causal) {
    const int64_t num_key_blocks = problem.batch * problem.num_kv_heads * args.num_kv_blocks;
    mean_keys_kernel<T>
        <<<static_cast<unsigned>(ceil_div(num_key_blocks, kWarps)), kThreads, 0, stream>>>(args);
  }
  const int bytes = shared_bytes(args, num_rows);
  const auto kernel = select_kernel<T>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t num_ctas =
      problem.batch * problem.num_q_heads * ceil_div(args.num_q_blocks, num_rows);
  kernel<<<static_cast<unsigned>(num_ctas), kThreads, bytes, stream>>>(args);
  error = cudaGetLastError();
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
  // Rows start 8 banks apart, and have room for three zeros at the end.
  args.row_stride = static_cast<int>(ceil_div(num_mass_entries(params) + 3, 32) * 32 + 8);
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
