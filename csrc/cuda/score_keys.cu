// score_keys on CUDA: two passes over the keys of the complete segments, on tensor cores. The first
// finds each query's maximum and sum over all keys, the second its weights; recomputing the scores
// of at most 128 queries is cheaper than holding 128 x Nkv of them. A CTA keeps a chunk of keys in
// shared memory for all query heads that share them.
#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <limits>

#include "exp2.cuh"
#include "launch.h"
#include "pbs/geometry.h"
#include "score_tile.cuh"

namespace pbs::cuda {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

// The online maximum and sum of exp2(score - max) over some keys of one query.
struct RowState {
  float max = -INFINITY;
  float sum = 0.0f;
};

__device__ RowState merge(const RowState& a, const RowState& b) {
  const float max = fmaxf(a.max, b.max);
  if (max == -INFINITY) return RowState{max, a.sum + b.sum};  // NaN stays NaN
  return RowState{max, a.sum * exp2_approx(a.max - max) + b.sum * exp2_approx(b.max - max)};
}

struct ScoreArgs {
  ScoreKeysParams params;
  float2* state;  // (B, Hq, num_chunks, kMaxRows) of RowState
  int num_rows;
  int num_scored;
  int num_chunks;
};

// What a CTA works on: a chunk of the keys of one KV head.
struct Chunk {
  int idx;
  int begin;
  int end;
  int64_t b;
  int64_t hkv;
  int64_t heads_per_kv;
};

template <class Tile>
__device__ Chunk chunk_of(const ScoreArgs& args) {
  const Problem& problem = args.params.problem;
  Chunk chunk{};
  chunk.idx = static_cast<int>(blockIdx.x % args.num_chunks);
  chunk.begin = chunk.idx * Tile::kChunk;
  chunk.end = static_cast<int>(smaller(chunk.begin + Tile::kChunk, args.num_scored));
  const int64_t head = blockIdx.x / args.num_chunks;
  chunk.b = head / problem.num_kv_heads;
  chunk.hkv = head % problem.num_kv_heads;
  chunk.heads_per_kv = problem.num_q_heads / problem.num_kv_heads;
  return chunk;
}

template <class Tile>
__device__ void load_keys(const Tile& tile, const ScoreArgs& args, const Chunk& chunk) {
  const ConstRows& k = args.params.k;
  const auto* src = static_cast<const typename Tile::Element*>(k.data) + chunk.b * k.batch_stride +
                    chunk.hkv * k.head_stride + chunk.begin * k.row_stride;
  for (int t = 0; t < Tile::kTiles; ++t) {
    const int first = t * kScoreTileKeys;
    Tile::load_tile(src + first * k.row_stride, k.row_stride, chunk.end - chunk.begin - first,
                    tile.keys + t * Tile::kTileSize);
  }
}

// After a barrier behind which nobody reads the queries before.
template <class Tile>
__device__ void load_queries(const Tile& tile, const ScoreArgs& args, int64_t b, int64_t hq) {
  const ConstRows& q = args.params.q;
  const auto* src = static_cast<const typename Tile::Element*>(q.data) + b * q.batch_stride +
                    hq * q.head_stride + (args.params.problem.num_q - args.num_rows) * q.row_stride;
  Tile::load_tile(src, q.row_stride, args.num_rows, tile.queries);
}

// What threads copied to shared memory is there for the tensor cores.
__device__ void publish_tiles() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  cutlass::arch::fence_view_async_shared();
  __syncthreads();
}

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kScoreThreads, ScoreTile<Element, kHeadDim>::kCtasPerSm)
    find_rows_kernel(const ScoreArgs args) {
  using Tile = ScoreTile<Element, kHeadDim>;
  extern __shared__ uint4 raw[];
  const Tile tile(raw);
  const Chunk chunk = chunk_of<Tile>(args);
  load_keys(tile, args, chunk);
  const int lane = threadIdx.x % 32;
  const int num_keys = chunk.end - chunk.begin;
  const float factor = args.params.scale * kLog2e;
  for (int64_t h = 0; h < chunk.heads_per_kv; ++h) {
    const int64_t hq = chunk.hkv * chunk.heads_per_kv + h;
    load_queries(tile, args, chunk.b, hq);
    publish_tiles();
    RowState rows[kThreadRows];
    for (int first = 0; first < num_keys; first += kScoreTileKeys) {
      auto scores = Tile::make_scores();
      Tile::multiply(tile.queries, tile.keys + first * kHeadDim, scores);
      if (num_keys - first < kScoreTileKeys) {
        CUTE_UNROLL
        for (int i = 0; i < cute::size(scores); ++i) {
          if (first + column_of(i, lane) >= num_keys) scores(i) = -INFINITY;
        }
      }
      CUTE_UNROLL
      for (int r = 0; r < kThreadRows; ++r) {
        float top = -INFINITY;
        CUTE_UNROLL
        for (int i = 0; i < cute::size(scores); ++i) {
          if (row_of(i) == r) top = fmaxf(top, scores(i));
        }
        top = fmaxf(rows[r].max, top * factor);
        // All at -inf: weights of 0, or of NaN where a score is NaN.
        const float base = top == -INFINITY ? 0.0f : top;
        float sum = rows[r].sum * exp2_approx(rows[r].max - base);
        CUTE_UNROLL
        for (int i = 0; i < cute::size(scores); ++i) {
          if (row_of(i) == r) sum += exp2_approx(scores(i) * factor - base);
        }
        rows[r] = RowState{top, sum};
      }
    }
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      for (int step = 1; step < 4; step *= 2) {
        rows[r] = merge(rows[r], RowState{__shfl_xor_sync(~0u, rows[r].max, step),
                                          __shfl_xor_sync(~0u, rows[r].sum, step)});
      }
      if (lane % 4 == 0) {
        const int64_t head = chunk.b * args.params.problem.num_q_heads + hq;
        args.state[(head * args.num_chunks + chunk.idx) * kMaxRows + row_of_thread(threadIdx.x) +
                   8 * r] = float2{rows[r].max, rows[r].sum};
      }
    }
    __syncthreads();
  }
}

// The states of all chunks of one head, merged into those of its first chunk.
__global__ void __launch_bounds__(1024) merge_rows_kernel(const ScoreArgs args) {
  constexpr int kSlices = 1024 / kMaxRows;
  __shared__ RowState slices[kSlices][kMaxRows];
  const int row = threadIdx.x % kMaxRows;
  const int slice = threadIdx.x / kMaxRows;
  float2* state = args.state + static_cast<int64_t>(blockIdx.x) * args.num_chunks * kMaxRows + row;
  RowState own;
#pragma unroll 4
  for (int chunk = slice; chunk < args.num_chunks; chunk += kSlices) {
    const float2 other = state[static_cast<int64_t>(chunk) * kMaxRows];
    own = merge(own, RowState{other.x, other.y});
  }
  slices[slice][row] = own;
  __syncthreads();
  if (slice != 0) return;
  for (int s = 1; s < kSlices; ++s) own = merge(own, slices[s][row]);
  // A query that sees nothing but -inf weighs nothing.
  *state = float2{own.max == -INFINITY ? 0.0f : own.max, own.sum == 0.0f ? 0.0f : 1.0f / own.sum};
}

// Here keys are the rows of the product, and queries its columns.
template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kScoreThreads, ScoreTile<Element, kHeadDim>::kCtasPerSm)
    average_kernel(const ScoreArgs args) {
  using Tile = ScoreTile<Element, kHeadDim>;
  extern __shared__ uint4 raw[];
  __shared__ float4 shared_rows[kMaxRows / 2];  // maximum and 1 / sum of two queries
  const Tile tile(raw);
  const Problem& problem = args.params.problem;
  const Chunk chunk = chunk_of<Tile>(args);
  load_keys(tile, args, chunk);
  const int lane = threadIdx.x % 32;
  const int num_keys = chunk.end - chunk.begin;
  const float factor = args.params.scale * kLog2e;
  const int64_t heads_per_perm = problem.num_q_heads / problem.num_perm_heads;
  float totals[Tile::kTiles][kThreadRows] = {};
  for (int64_t h = 0; h < chunk.heads_per_kv; ++h) {
    const int64_t hq = chunk.hkv * chunk.heads_per_kv + h;
    load_queries(tile, args, chunk.b, hq);
    for (int row = threadIdx.x; row < kMaxRows; row += kScoreThreads) {
      const int64_t head = chunk.b * problem.num_q_heads + hq;
      reinterpret_cast<float2*>(shared_rows)[row] =
          row < args.num_rows ? args.state[head * args.num_chunks * kMaxRows + row] : float2{};
    }
    publish_tiles();
    CUTE_UNROLL
    for (int t = 0; t < Tile::kTiles; ++t) {
      if (t * kScoreTileKeys >= num_keys) break;
      auto scores = Tile::make_scores();
      Tile::multiply(tile.keys + t * Tile::kTileSize, tile.queries, scores);
      CUTE_UNROLL
      for (int i = 0; i < cute::size(scores); i += 4) {
        const float4 two = shared_rows[column_of(i, lane) / 2];
        CUTE_UNROLL
        for (int r = 0; r < kThreadRows; ++r) {
          totals[t][r] += exp2_approx(scores(i + 2 * r) * factor - two.x) * two.y;
          totals[t][r] += exp2_approx(scores(i + 2 * r + 1) * factor - two.z) * two.w;
        }
      }
    }
    __syncthreads();
    if ((h + 1) % heads_per_perm != 0) continue;
    const float share = 1.0f / static_cast<float>(args.num_rows * heads_per_perm);
    const int64_t head = chunk.b * problem.num_perm_heads + hq / heads_per_perm;
    float* importance = args.params.importance + head * problem.num_kv;
    CUTE_UNROLL
    for (int t = 0; t < Tile::kTiles; ++t) {
      CUTE_UNROLL
      for (int r = 0; r < kThreadRows; ++r) {
        const int key = t * kScoreTileKeys + row_of_thread(threadIdx.x) + 8 * r;
        const float total = quad_sum(totals[t][r]);
        if (lane % 4 == 0 && key < num_keys) importance[chunk.begin + key] = total * share;
        totals[t][r] = 0.0f;
      }
    }
    if (chunk.idx == args.num_chunks - 1) {
      for (int64_t i = args.num_scored + threadIdx.x; i < problem.num_kv; i += kScoreThreads) {
        importance[i] = 0.0f;
      }
    }
  }
}

template <class Element, int kHeadDim>
cudaError_t launch(const ScoreArgs& args, cudaStream_t stream) {
  constexpr int kBytes = ScoreTile<Element, kHeadDim>::kBytes;
  const Problem& problem = args.params.problem;
  const auto num_ctas =
      static_cast<unsigned>(problem.batch * problem.num_kv_heads * args.num_chunks);
  const auto find = find_rows_kernel<Element, kHeadDim>;
  const auto average = average_kernel<Element, kHeadDim>;
  cudaError_t error =
      cudaFuncSetAttribute(find, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(average, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  }
  if (error != cudaSuccess) return error;
  find<<<num_ctas, kScoreThreads, kBytes, stream>>>(args);
  merge_rows_kernel<<<static_cast<unsigned>(problem.batch * problem.num_q_heads), 1024, 0,
                      stream>>>(args);
  average<<<num_ctas, kScoreThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

template <class Element>
cudaError_t launch_head_dim(const ScoreArgs& args, cudaStream_t stream) {
  switch (args.params.problem.head_dim) {
    case 64:
      return launch<Element, 64>(args, stream);
    case 96:
      return launch<Element, 96>(args, stream);
    case 128:
      return launch<Element, 128>(args, stream);
    default:
      return launch<Element, 256>(args, stream);
  }
}

int64_t num_chunks(const ScoreKeysParams& params) {
  const int64_t num_scored = round_down(params.problem.num_kv, params.blocking.segment_size);
  return ceil_div(num_scored, score_chunk_keys(static_cast<int>(params.problem.head_dim)));
}

}  // namespace

int64_t score_workspace_floats(const ScoreKeysParams& params) {
  return 2 * params.problem.batch * params.problem.num_q_heads * num_chunks(params) * kMaxRows;
}

const char* launch_score_keys(const ScoreKeysParams& params, float* workspace, void* stream) {
  const Problem& problem = params.problem;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t num_heads = problem.batch * problem.num_perm_heads;
  if (num_heads == 0 || problem.num_kv == 0) return nullptr;
  ScoreArgs args{};
  args.params = params;
  args.state = reinterpret_cast<float2*>(workspace);
  args.num_rows = static_cast<int>(num_score_rows(problem, params.blocking));
  args.num_scored = static_cast<int>(round_down(problem.num_kv, params.blocking.segment_size));
  args.num_chunks = static_cast<int>(num_chunks(params));
  cudaError_t error = cudaSuccess;
  if (args.num_chunks == 0 || args.num_rows == 0) {
    error = cudaMemsetAsync(params.importance, 0, num_heads * problem.num_kv * sizeof(float),
                            cuda_stream);
  } else if (problem.batch * problem.num_kv_heads * args.num_chunks >
             std::numeric_limits<int32_t>::max()) {
    return "too many keys for one grid";
  } else {
    error = problem.dtype == DType::kBFloat16
                ? launch_head_dim<cutlass::bfloat16_t>(args, cuda_stream)
                : launch_head_dim<cutlass::half_t>(args, cuda_stream);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pbs::cuda
