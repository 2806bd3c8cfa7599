// score_keys on CUDA: two passes over the keys of the complete segments, on tensor cores. The first
// finds each query's maximum and sum over all keys, the second its weights; recomputing the scores
// of at most 128 queries is cheaper than holding 128 x Nkv of them. A CTA keeps a chunk of keys in
// shared memory for all query heads that share them.
#include <cuda_runtime.h>
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/util/type_traits.hpp>
#include <limits>
#include <type_traits>

#include "exp2.cuh"
#include "launch.h"
#include "pbs/geometry.h"
#include "pbs/score_chunks.h"

namespace pbs::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowGroups = 4;  // warps side by side over the queries, 32 rows each
constexpr int kKeyGroups = kThreads / 32 / kRowGroups;
constexpr int kMaxRows = 128;
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

template <class Element, int kHeadDim>
class ScoreTile {
 public:
  static constexpr int kChunk = score_chunk_keys(kHeadDim);
  static constexpr int kSteps = kHeadDim / 16;
  // Keys whose scores a warp has in registers. Segments are a multiple of it: no tile is part full.
  static constexpr int kTileKeys = 32;
  static constexpr int kTileColumns = kTileKeys / 8;
  using Scores = float[2][kTileColumns][4];
  // Rows 16 bytes apart from a multiple of 128: eight of them are in different banks.
  static constexpr int kStride = kHeadDim + 8;
  static constexpr int kCtasPerSm = kHeadDim == 256 ? 1 : 2;
  static constexpr int kBytes = (kChunk + kMaxRows) * kStride * static_cast<int>(sizeof(Element));
  using Mma =
      std::conditional_t<std::is_same_v<Element, cutlass::half_t>,
                         cute::SM80_16x8x16_F32F16F16F32_TN, cute::SM80_16x8x16_F32BF16BF16F32_TN>;

  // This lane's rows are row0() + 8 * i, i < 4.
  __device__ explicit ScoreTile(Element* keys)
      : keys_(keys), lane_(threadIdx.x % 32), row_group_(threadIdx.x / 32 % kRowGroups) {}

  __device__ int row0() const { return row_group_ * 32 + lane_ / 4; }

  // Keys [begin, end) of one head to shared memory, by the whole CTA; zeros behind them.
  __device__ void load_keys(const ConstRows& rows, int64_t head_offset, int begin, int end) {
    load_rows<kChunk>(rows, head_offset + begin * rows.row_stride, end - begin, keys_);
  }

  // `num_rows` rows of one head from `first_row` on to registers, zeros behind them. By the whole
  // CTA, after a barrier behind which nobody reads queries from shared memory.
  __device__ void load_queries(const ConstRows& rows, int64_t head_offset, int first_row,
                               int num_rows) {
    Element* shared = keys_ + kChunk * kStride;
    load_rows<kMaxRows>(rows, head_offset + first_row * rows.row_stride, num_rows, shared);
    __syncthreads();
    const Element* from = shared + (row_group_ * 32 + lane_ % 16) * kStride + lane_ / 16 * 8;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t (&a)[4] = queries_[m][step];
        cute::SM75_U32x4_LDSM_N::copy(
            *reinterpret_cast<const cute::uint128_t*>(from + m * 16 * kStride + step * 16), a[0],
            a[1], a[2], a[3]);
      }
    }
  }

  // scores[m][n][e]: row row0() + 16 * m + 8 * (e / 2), key 8 * n + lane % 4 * 2 + e % 2 of the
  // tile that begins at `key`.
  __device__ void score(int key, Scores& scores) const {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kTileColumns; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[m][n][e] = 0.0f;
      }
    }
    const Element* from = keys_ + (key + lane_ % 8) * kStride + lane_ / 8 * 8;
    // Four accumulators in turn, so that a product does not wait for the one before it.
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
#pragma unroll
      for (int pair = 0; pair < kTileColumns; pair += 2) {
        uint32_t b[2][4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(
                                            from + (pair + n) * 8 * kStride + step * 16),
                                        b[n][0], b[n][1], b[n][2], b[n][3]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int m = 0; m < 2; ++m) {
              float (&s)[4] = scores[m][pair + n];
              const uint32_t (&a)[4] = queries_[m][step + half];
              Mma::fma(s[0], s[1], s[2], s[3], a[0], a[1], a[2], a[3], b[n][2 * half],
                       b[n][2 * half + 1], s[0], s[1], s[2], s[3]);
            }
          }
        }
      }
    }
  }

 private:
  // The first num_rows of kRows rows to shared memory, zeros behind them, by the whole CTA.
  template <int kRows>
  __device__ static void load_rows(const ConstRows& rows, int64_t offset, int num_rows,
                                   Element* shared) {
    constexpr int kPieces = kHeadDim / 8;
    const Element* src = static_cast<const Element*>(rows.data) + offset;
#pragma unroll 8
    for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
      const int row = i / kPieces;
      const int column = i % kPieces * 8;
      uint4 piece{};
      if (row < num_rows) {
        piece = *reinterpret_cast<const uint4*>(src + row * rows.row_stride + column);
      }
      *reinterpret_cast<uint4*>(shared + row * kStride + column) = piece;
    }
  }

  Element* keys_;
  int lane_;
  int row_group_;
  uint32_t queries_[2][kSteps][4];
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
__device__ void load_queries(Tile& tile, const ScoreArgs& args, int64_t b, int64_t hq) {
  const ConstRows& q = args.params.q;
  tile.load_queries(q, b * q.batch_stride + hq * q.head_stride,
                    static_cast<int>(args.params.problem.num_q) - args.num_rows, args.num_rows);
}

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kThreads, ScoreTile<Element, kHeadDim>::kCtasPerSm)
    find_rows_kernel(const ScoreArgs args) {
  using Tile = ScoreTile<Element, kHeadDim>;
  extern __shared__ uint4 raw[];
  __shared__ RowState shared_rows[kKeyGroups][kMaxRows];
  Tile tile(reinterpret_cast<Element*>(raw));
  const Chunk chunk = chunk_of<Tile>(args);
  const ConstRows& k = args.params.k;
  tile.load_keys(k, chunk.b * k.batch_stride + chunk.hkv * k.head_stride, chunk.begin, chunk.end);
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int key_group = threadIdx.x / 32 / kRowGroups;
  const int num_keys = chunk.end - chunk.begin;
  const float factor = args.params.scale * kLog2e;
  for (int64_t h = 0; h < chunk.heads_per_kv; ++h) {
    const int64_t hq = chunk.hkv * chunk.heads_per_kv + h;
    load_queries(tile, args, chunk.b, hq);
    RowState rows[4];
    for (int key = key_group * Tile::kTileKeys; key < num_keys;
         key += kKeyGroups * Tile::kTileKeys) {
      typename Tile::Scores scores;
      tile.score(key, scores);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        RowState& row = rows[i];
        float top = -INFINITY;
#pragma unroll
        for (int j = 0; j < 2 * Tile::kTileColumns; ++j) {
          top = fmaxf(top, scores[i / 2][j / 2][i % 2 * 2 + j % 2]);
        }
        top = fmaxf(row.max, top * factor);
        // All at -inf: weights of 0, or of NaN where a score is NaN.
        const float base = top == -INFINITY ? 0.0f : top;
        float sum = row.sum * exp2_approx(row.max - base);
#pragma unroll
        for (int j = 0; j < 2 * Tile::kTileColumns; ++j) {
          sum += exp2_approx(scores[i / 2][j / 2][i % 2 * 2 + j % 2] * factor - base);
        }
        row = RowState{top, sum};
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      for (int step = 1; step < 4; step *= 2) {
        rows[i] = merge(rows[i], RowState{__shfl_xor_sync(~0u, rows[i].max, step),
                                          __shfl_xor_sync(~0u, rows[i].sum, step)});
      }
      if (lane % 4 == 0) shared_rows[key_group][tile.row0() + 8 * i] = rows[i];
    }
    __syncthreads();
    for (int row = threadIdx.x; row < kMaxRows; row += kThreads) {
      RowState state = shared_rows[0][row];
      for (int g = 1; g < kKeyGroups; ++g) state = merge(state, shared_rows[g][row]);
      const int64_t head = chunk.b * args.params.problem.num_q_heads + hq;
      args.state[(head * args.num_chunks + chunk.idx) * kMaxRows + row] =
          float2{state.max, state.sum};
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

// Of 2 * kWidth sums in each of two lanes, the lower lane keeps the lower half of both.
template <int kWidth, int kSums>
__device__ void fold_lanes(float (&sums)[kSums], int lane, int lanes_apart) {
  const bool is_upper = lane & lanes_apart;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const float given = is_upper ? sums[j] : sums[j + kWidth];
    const float kept = is_upper ? sums[j + kWidth] : sums[j];
    sums[j] = kept + __shfl_xor_sync(~0u, given, lanes_apart);
  }
}

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kThreads, ScoreTile<Element, kHeadDim>::kCtasPerSm)
    average_kernel(const ScoreArgs args) {
  using Tile = ScoreTile<Element, kHeadDim>;
  extern __shared__ uint4 raw[];
  __shared__ float totals[kRowGroups][Tile::kChunk];
  Tile tile(reinterpret_cast<Element*>(raw));
  const Problem& problem = args.params.problem;
  const Chunk chunk = chunk_of<Tile>(args);
  const ConstRows& k = args.params.k;
  tile.load_keys(k, chunk.b * k.batch_stride + chunk.hkv * k.head_stride, chunk.begin, chunk.end);
  const int lane = threadIdx.x % 32;
  const int row_group = threadIdx.x / 32 % kRowGroups;
  const int key_group = threadIdx.x / 32 / kRowGroups;
  const int num_keys = chunk.end - chunk.begin;
  const float factor = args.params.scale * kLog2e;
  const int64_t heads_per_perm = problem.num_q_heads / problem.num_perm_heads;
  for (int64_t h = 0; h < chunk.heads_per_kv; ++h) {
    const int64_t hq = chunk.hkv * chunk.heads_per_kv + h;
    if (h % heads_per_perm == 0) {
      for (int i = threadIdx.x; i < kRowGroups * Tile::kChunk; i += kThreads)
        (&totals[0][0])[i] = 0;
    }
    __syncthreads();
    load_queries(tile, args, chunk.b, hq);
    float2 rows[4];  // maximum, 1 / sum; 0 beyond the last row
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = tile.row0() + 8 * i;
      rows[i] = float2{};
      if (row < args.num_rows) {
        rows[i] =
            args.state[(chunk.b * problem.num_q_heads + hq) * args.num_chunks * kMaxRows + row];
      }
    }
    for (int key = key_group * Tile::kTileKeys; key < num_keys;
         key += kKeyGroups * Tile::kTileKeys) {
      typename Tile::Scores scores;
      tile.score(key, scores);
      constexpr int kSums = 2 * Tile::kTileColumns;
      float sums[kSums];  // over this lane's rows, by key
#pragma unroll
      for (int j = 0; j < kSums; ++j) {
        sums[j] = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float score = scores[i / 2][j / 2][i % 2 * 2 + j % 2];
          sums[j] += exp2_approx(score * factor - rows[i].x) * rows[i].y;
        }
      }
      // Eight lanes hold other rows of the same keys: each ends with the sums of one or two.
      fold_lanes<kSums / 2>(sums, lane, 16);
      fold_lanes<kSums / 4>(sums, lane, 8);
      fold_lanes<kSums / 8>(sums, lane, 4);
      const int first = (lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2) * (kSums / 8);
#pragma unroll
      for (int r = 0; r < kSums / 8; ++r) {
        const int j = first + r;
        totals[row_group][key + j / 2 * 8 + lane % 4 * 2 + j % 2] += sums[r];
      }
    }
    if ((h + 1) % heads_per_perm != 0) continue;
    __syncthreads();
    const float share = 1.0f / static_cast<float>(args.num_rows * heads_per_perm);
    const int64_t head = chunk.b * problem.num_perm_heads + hq / heads_per_perm;
    float* importance = args.params.importance + head * problem.num_kv;
    for (int i = threadIdx.x; i < num_keys; i += kThreads) {
      float total = 0.0f;
      for (int g = 0; g < kRowGroups; ++g) total += totals[g][i];
      importance[chunk.begin + i] = total * share;
    }
    if (chunk.idx == args.num_chunks - 1) {
      for (int64_t i = args.num_scored + threadIdx.x; i < problem.num_kv; i += kThreads) {
        importance[i] = 0.0f;
      }
    }
    __syncthreads();
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
  find<<<num_ctas, kThreads, kBytes, stream>>>(args);
  merge_rows_kernel<<<static_cast<unsigned>(problem.batch * problem.num_q_heads), 1024, 0,
                      stream>>>(args);
  average<<<num_ctas, kThreads, kBytes, stream>>>(args);
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
