// select_blocks on CUDA: a CTA takes a few query blocks of one head, finds their mean queries and
// their logits against all mean keys, and picks the smallest set of key blocks whose softmax mass
// reaches the threshold, all in shared memory.
#include <cuda_runtime.h>
#include <cutlass/array.h>
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>
#include <cutlass/numeric_conversion.h>

#include <limits>

#include "launch.h"
#include "pbs/bitmask.h"
#include "pbs/geometry.h"
#include "top_mass.cuh"

namespace pbs::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxQueryBlocks = 16;
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kGoodSharedBytes = 113 * 1024;  // two CTAs to an SM
constexpr int kTileKeys = 64;                 // most mean keys in shared memory at a time,
constexpr int kTileFloats = 64 * 128;         // and most floats of them
constexpr float kLog2e = 1.4426950408889634f;

template <class T>
using Piece = cutlass::AlignedArray<T, 16 / sizeof(T), 16>;

// The mean of rows [begin, end) of one head, times `factor`, by one warp: its lanes hold pieces of
// as many rows as they can.
template <class T>
__device__ void mean_rows(const T* rows, int64_t row_stride, int64_t begin, int64_t end,
                          int head_dim, float factor, float* mean) {
  constexpr int kPiece = 16 / sizeof(T);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const cutlass::NumericArrayConverter<float, T, kPiece> to_floats;
  const float share = factor / static_cast<float>(end - begin);
  // A row of few pieces leaves lanes for others; those of one piece are summed at the end.
  const int num_pieces = head_dim / kPiece;
  const int lanes_per_row = num_pieces <= 8 ? 8 : num_pieces <= 16 ? 16 : 32;
  for (int first = 0; first < num_pieces; first += lanes_per_row) {
    const int piece = first + lane % lanes_per_row;
    cutlass::Array<float, kPiece> total;
    total.clear();
    if (piece < num_pieces) {
      const T* src = rows + piece * kPiece;
      constexpr int kAtOnce = 8;  // loads in flight
      const int step = 32 / lanes_per_row;
      for (int64_t row = begin + lane / lanes_per_row; row < end; row += kAtOnce * step) {
        Piece<T> values[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          values[i].clear();
          if (row + i * step < end) {
            values[i] = *reinterpret_cast<const Piece<T>*>(src + (row + i * step) * row_stride);
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const cutlass::Array<float, kPiece> widened = to_floats(values[i]);
#pragma unroll
          for (int e = 0; e < kPiece; ++e) total[e] += widened[e];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      for (int step = lanes_per_row; step < 32; step *= 2) {
        total[i] += __shfl_xor_sync(~0u, total[i], step);
      }
      if (piece < num_pieces && lane < lanes_per_row) mean[piece * kPiece + i] = total[i] * share;
    }
  }
}

struct SelectArgs {
  SelectBlocksParams params;
  float* own_means;  // (B, Hkv, num_kv_blocks, D) of keys in their own order; with causal mass
  int num_q_blocks;
  int num_kv_blocks;
  int num_words;
  int num_entries;  // of a row of logits
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
                          const float* shares, const Cut& cut) {
  const int lane = threadIdx.x % 32;
  uint32_t* words = args.params.block_mask + row * args.num_words;
  int num_equal = 0;
  int count = 0;
  for (int w = 0; w < args.num_words; ++w) {
    const int i = w * 32 + lane;
    const uint32_t share = i < num_candidates ? __float_as_uint(shares[i]) : 0;
    const bool is_equal = i < num_candidates && share == cut.share;
    const uint32_t equal = __ballot_sync(~0u, is_equal);
    const int rank = num_equal + __popc(equal & ((1u << lane) - 1));
    const bool is_selected = i < num_candidates &&
                             (share > cut.share || i == sink || (is_equal && rank < cut.num_equal));
    const uint32_t word = __ballot_sync(~0u, is_selected);
    num_equal += __popc(equal);
    count += __popc(word);
    if (lane == 0) words[w] = word;
  }
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

// logits[r][j] of all candidates j < num_candidates, some of them at a time: a thread takes
// one mean key and every kThreads / kTileKeys-th mean query.
template <int kQueryBlocks>
__device__ void score_candidates(const float* q_means, const float* k_means, int head_dim,
                                 int num_candidates, int num_entries, float* keys, float* logits) {
  constexpr int kGroups = kThreads / kTileKeys;
  constexpr int kRows = (kQueryBlocks + kGroups - 1) / kGroups;
  const int stride = head_dim + 4;  // rows begin 4 banks apart
  const int own_key = static_cast<int>(threadIdx.x) % kTileKeys;
  const int group = static_cast<int>(threadIdx.x) / kTileKeys;
  // The next tile is on its way, in registers, while this one is worked on.
  const int tile_keys = min(kTileKeys, kTileFloats / head_dim);
  constexpr int kPieces = kTileFloats / 4 / kThreads;
  float4 next[kPieces];
  const auto fetch = [&](int first) {
    const int num_values = min(tile_keys, num_candidates - first) * head_dim;
    const float* src = k_means + static_cast<int64_t>(first) * head_dim;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int i = (p * kThreads + static_cast<int>(threadIdx.x)) * 4;
      if (i < num_values) next[p] = *reinterpret_cast<const float4*>(src + i);
    }
  };
  fetch(0);
  for (int first = 0; first < num_candidates; first += tile_keys) {
    const int num_keys = min(tile_keys, num_candidates - first);
    __syncthreads();
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int i = (p * kThreads + static_cast<int>(threadIdx.x)) * 4;
      if (i < num_keys * head_dim) {
        *reinterpret_cast<float4*>(keys + i / head_dim * stride + i % head_dim) = next[p];
      }
    }
    __syncthreads();
    if (first + tile_keys < num_candidates) fetch(first + tile_keys);
    float sums[kRows] = {};
#pragma unroll 4
    for (int d = 0; d < head_dim; d += 4) {
      const float4 key = *reinterpret_cast<const float4*>(keys + own_key * stride + d);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = min(r * kGroups + group, kQueryBlocks - 1);
        const float4 query = *reinterpret_cast<const float4*>(q_means + row * head_dim + d);
        sums[r] += key.x * query.x + key.y * query.y + key.z * query.z + key.w * query.w;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = r * kGroups + group;
      if (row < kQueryBlocks && own_key < num_keys) {
        logits[row * num_entries + first + own_key] = sums[r];
      }
    }
  }
}

template <class T, int kQueryBlocks>
__global__ void __launch_bounds__(kThreads, 2) select_kernel(const SelectArgs args) {
  extern __shared__ float4 raw[];
  const SelectBlocksParams& params = args.params;
  const Problem& problem = params.problem;
  const Blocking& blocking = params.blocking;
  const int head_dim = static_cast<int>(problem.head_dim);
  float* q_means = reinterpret_cast<float*>(raw);     // (kQueryBlocks, D)
  float* keys = q_means + kQueryBlocks * head_dim;    // (kTileKeys, D + 4)
  float* logits = keys + kTileKeys * (head_dim + 4);  // (kQueryBlocks, num_entries)

  const int64_t num_tiles = ceil_div(args.num_q_blocks, kQueryBlocks);
  const int64_t head = blockIdx.x / num_tiles;
  const int first_block = static_cast<int>(blockIdx.x % num_tiles) * kQueryBlocks;
  const int num_blocks = static_cast<int>(smaller(kQueryBlocks, args.num_q_blocks - first_block));
  const int64_t b = head / problem.num_q_heads;
  const int64_t hq = head % problem.num_q_heads;
  const int64_t hp = hq / (problem.num_q_heads / problem.num_perm_heads);
  const int64_t hkv = hq / (problem.num_q_heads / problem.num_kv_heads);
  const auto describe = [&](int r) {
    return query_block(first_block + r, problem.num_q, problem.num_kv, blocking.block_size,
                       blocking.kv_block_size, blocking.segment_size, params.is_causal);
  };

  const T* q =
      static_cast<const T*>(params.q.data) + b * params.q.batch_stride + hq * params.q.head_stride;
  for (int r = static_cast<int>(threadIdx.x) / 32; r < num_blocks; r += kWarps) {
    const QueryBlock block = describe(r);
    mean_rows(q, params.q.row_stride, block.first_row, block.first_row + block.num_rows, head_dim,
              params.scale * kLog2e, q_means + r * head_dim);
  }
  const int sink = find_sink(args, b, hp);
  score_candidates<kQueryBlocks>(
      q_means, params.k_mean + (b * problem.num_perm_heads + hp) * args.num_kv_blocks * head_dim,
      head_dim, static_cast<int>(describe(num_blocks - 1).num_candidates), args.num_entries, keys,
      logits);
  __syncthreads();

  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < num_blocks; r += kWarps) {
    const QueryBlock block = describe(r);
    const int num_candidates = static_cast<int>(block.num_candidates);
    const int64_t row = head * args.num_q_blocks + first_block + r;
    float* shares = logits + r * args.num_entries;
    int n = num_candidates;
    if (params.is_mass_causal) {
      const float* own_means =
          args.own_means + (b * problem.num_kv_heads + hkv) * args.num_kv_blocks * head_dim;
      const int64_t first = block.own_begin / blocking.kv_block_size;
      const int64_t last = ceil_div(block.own_end, blocking.kv_block_size);
      for (int64_t j = first; j < last; ++j, ++n) {
        float sum = 0.0f;
        for (int d = lane; d < head_dim; d += 32) {
          sum += q_means[r * head_dim + d] * own_means[j * head_dim + d];
        }
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (lane == 0) shares[n] = sum;
      }
      __syncwarp();
    }
    softmax_base2(shares, n);
    float own_mass = 0.0f;
    for (int i = num_candidates + lane; i < n; i += 32) own_mass += shares[i];
    bool is_ordered = true;
    for (int i = lane; i < n; i += 32) is_ordered &= shares[i] >= 0.0f;
    // With a NaN among the inputs no order means anything: visit everything, as dense would.
    const bool takes_all = params.threshold >= 1.0 || !__all_sync(~0u, is_ordered);
    if (takes_all) {
      for (int i = lane; i < num_candidates; i += 32) shares[i] = 0.0f;
      __syncwarp();
    }
    const Cut cut = takes_all ? Cut{0, num_candidates}
                              : find_cut(shares, num_candidates,
                                         static_cast<float>(params.threshold - warp_sum(own_mass)));
    write_row(args, row, num_candidates, sink, shares, cut);
  }
}

int shared_bytes(const SelectArgs& args, int num_query_blocks) {
  return static_cast<int>(sizeof(float) *
                          (num_query_blocks * (args.params.problem.head_dim + args.num_entries) +
                           kTileKeys * (args.params.problem.head_dim + 4)));
}

template <class T, int kQueryBlocks>
cudaError_t launch_tiles(const SelectArgs& args, cudaStream_t stream) {
  // Smaller tiles where rows are long.
  const int bytes = shared_bytes(args, kQueryBlocks);
  if constexpr (kQueryBlocks > 1) {
    if (bytes > kGoodSharedBytes) return launch_tiles<T, kQueryBlocks / 2>(args, stream);
  }
  const auto kernel = select_kernel<T, kQueryBlocks>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int64_t num_heads = args.params.problem.batch * args.params.problem.num_q_heads;
  const int64_t num_ctas = num_heads * ceil_div(args.num_q_blocks, kQueryBlocks);
  kernel<<<static_cast<unsigned>(num_ctas), kThreads, bytes, stream>>>(args);
  return cudaGetLastError();
}

template <class T>
const char* launch(const SelectArgs& args, cudaStream_t stream) {
  const Problem& problem = args.params.problem;
  if (shared_bytes(args, 1) > kMaxSharedBytes) return "too many key blocks for shared memory";
  if (args.params.is_mass_causal) {
    const int64_t num_key_blocks = problem.batch * problem.num_kv_heads * args.num_kv_blocks;
    mean_keys_kernel<T>
        <<<static_cast<unsigned>(ceil_div(num_key_blocks, kWarps)), kThreads, 0, stream>>>(args);
  }
  const cudaError_t error = launch_tiles<T, kMaxQueryBlocks>(args, stream);
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
  args.num_entries = static_cast<int>(num_mass_entries(params));
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
