// Code that the kernels of permute_kv share: the windows of rows that CTAs work on, the stores of a
// warp, and the means of permuted key blocks.
#pragma once

#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>

#include <limits>

#include "common/launch_kernel.h"
#include "common/pages.cuh"
#include "pbs/geometry.h"

namespace pbs::cuda {

constexpr int kWindowThreads = 256;
constexpr int kWindowWarps = kWindowThreads / 32;
constexpr int kWindowRows = 256;
constexpr int kMostRowBytes = 256;  // per window; longer rows are split
constexpr int kRowsAtOnce = 4;      // rows per lane
static_assert(kWindowThreads == kWindowRows, "thread i has row i, its warp the 32 rows around it");

template <class T>
constexpr int kPiece = 16 / sizeof(T);

template <class T>
using Piece = cutlass::AlignedArray<T, kPiece<T>, 16>;

__host__ __device__ constexpr int num_splits(int64_t head_dim, int element_bytes) {
  return static_cast<int>(ceil_div(head_dim * element_bytes, kMostRowBytes));
}

// The work of a CTA: `width` columns of rows [begin, begin + num_rows) of K or of V. It writes the
// first num_copied permuted rows.
struct Window {
  int64_t b;
  int64_t kv_head;
  int begin;
  int num_rows;
  int num_copied;
  int first_column;
  int width;
  bool is_key;
};

template <class T>
__device__ Window window_of(const PermuteKVParams& params) {
  const Problem& problem = params.problem;
  const int splits = num_splits(problem.head_dim, sizeof(T));
  const auto num_windows = static_cast<int>(ceil_div(params.num_copied, kWindowRows));
  const auto num_kv_heads = static_cast<int>(problem.num_kv_heads);
  // Heads vary faster than windows, because a (B, N, H, D) tensor stores the heads of a row
  // together.
  const int part = static_cast<int>(blockIdx.x) % (2 * splits);
  const int item = static_cast<int>(blockIdx.x) / (2 * splits);
  const int window_idx = item / num_kv_heads;
  Window window{};
  window.kv_head = item % num_kv_heads;
  window.b = window_idx / num_windows;
  window.begin = window_idx % num_windows * kWindowRows;
  window.num_rows = static_cast<int>(smaller(kWindowRows, problem.num_kv - window.begin));
  window.num_copied = static_cast<int>(smaller(kWindowRows, params.num_copied - window.begin));
  window.width = static_cast<int>(problem.head_dim) / splits;
  window.first_column = part / 2 * window.width;
  window.is_key = part % 2 == 0;
  return window;
}

// Returns how many of the first num_rows rows of a window belong to this warp.
__device__ inline int rows_of_warp(int num_rows) {
  return max(0, min(32, num_rows - static_cast<int>(threadIdx.x) / 32 * 32));
}

// The source of the rows: those of a head, starting with the first column of the window.
template <class T>
struct Source {
  const T* rows;
  int64_t row_stride;
  int num_rows;
};

template <class T>
__device__ Source<T> source_of(const PermuteKVParams& params, const Window& window) {
  const ConstRows& input = window.is_key ? params.k : params.v;
  return Source<T>{static_cast<const T*>(input.data) + window.b * input.batch_stride +
                       window.kv_head * input.head_stride + window.first_column,
                   input.row_stride, static_cast<int>(params.problem.num_kv)};
}

template <class T>
__device__ Piece<T> nan_piece() {
  Piece<T> piece;
  piece.fill(T(std::numeric_limits<float>::quiet_NaN()));
  return piece;
}

// Stores the output rows of this warp, and writes their sum if it is needed. Lane i knows the
// source of the i-th row. Each lane holds pieces of as many rows as possible, which read(column,
// from) returns, also for absent rows. (A bulk copy per row would be shorter, but takes about 25
// cycles of an SM, whatever its length.)
template <bool kAdds, class T, class Read>
__device__ void store_rows(const Read& read, int width, int own_from, int num_rows, T* out,
                           int out_stride, float* sums) {
  const cutlass::NumericArrayConverter<float, T, kPiece<T>> to_floats;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int num_pieces = width / kPiece<T>;
  const bool is_narrow = num_pieces <= 8;
  const int lanes_per_row = is_narrow ? 8 : 16;
  const int step = is_narrow ? 4 : 2;
  const int piece = lane & (lanes_per_row - 1);
  const int first_row = is_narrow ? lane / 8 : lane / 16;
  const int column = min(piece, num_pieces - 1) * kPiece<T>;
  const int num_stored = piece < num_pieces ? num_rows : 0;
  out += piece * kPiece<T>;
  cutlass::AlignedArray<float, kPiece<T>, 16> total;
  total.clear();
  __syncwarp();  // a lane may just have written data that others read
#pragma unroll 1
  for (int i = 0; i < lanes_per_row; i += kRowsAtOnce) {
    const int row = first_row + i * step;
    Piece<T> pieces[kRowsAtOnce];
    // No branch separates the reads.
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      pieces[j] = read(column, __shfl_sync(~0u, own_from, row + j * step));
    }
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      if (row + j * step >= num_stored) continue;
      *reinterpret_cast<Piece<T>*>(out + (row + j * step) * out_stride) = pieces[j];
      if constexpr (kAdds) {
        const cutlass::Array<float, kPiece<T>> widened = to_floats(pieces[j]);
#pragma unroll
        for (int e = 0; e < kPiece<T>; ++e) total[e] += widened[e];
      }
    }
  }
  if constexpr (kAdds) {
    for (int lanes = lanes_per_row; lanes < 32; lanes *= 2) {
#pragma unroll
      for (int e = 0; e < kPiece<T>; ++e) total[e] += __shfl_xor_sync(~0u, total[e], lanes);
    }
    if (lane < min(lanes_per_row, num_pieces)) {
      *reinterpret_cast<decltype(total)*>(sums + piece * kPiece<T>) = total;
    }
  }
}

// Writes the means of the key blocks of the window, given the sums of its warps. Each thread works
// on the key block of its row.
__device__ inline void write_means(const PermuteKVParams& params, const Window& window,
                                   int64_t head, const float* sums) {
  const auto head_dim = static_cast<int>(params.problem.head_dim);
  const auto kv_block_size = static_cast<int>(params.kv_block_size);
  const int thread = static_cast<int>(threadIdx.x);
  const int first_column = thread % kv_block_size;
  const int first_row = thread - first_column;
  const int num_rows = min(kv_block_size, window.num_copied - first_row);
  if (num_rows <= 0) return;
  const int num_kv_blocks = (static_cast<int>(params.problem.num_kv) - 1) / kv_block_size + 1;
  const int64_t kv_block = head * num_kv_blocks + (window.begin + first_row) / kv_block_size;
  float* means = params.k_mean + kv_block * head_dim + window.first_column;
  sums += first_row / 32 * window.width;
  for (int column = first_column; column < window.width; column += kv_block_size) {
    float sum = 0.0f;
#pragma unroll 1
    for (int w = 0; w < kv_block_size / 32; ++w) sum += sums[w * window.width + column];
    means[column] = sum / static_cast<float>(num_rows);
  }
}

// Launches a kernel that works on windows, with this many bytes of shared memory per column.
template <class T>
const char* launch_windows(void (*kernel)(PermuteKVParams), const PermuteKVParams& params,
                           int bytes_per_column, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const int splits = num_splits(problem.head_dim, sizeof(T));
  const int64_t num_ctas =
      2 * splits * problem.batch * problem.num_kv_heads * ceil_div(params.num_copied, kWindowRows);
  if (num_ctas == 0 || problem.num_perm_heads == 0) return nullptr;
  if (num_ctas > std::numeric_limits<int32_t>::max()) return "too many keys for one grid";
  const int width = static_cast<int>(problem.head_dim) / splits;
  const cudaError_t error =
      launch_kernel(kernel, params, num_ctas, kWindowThreads, width * bytes_per_column, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pbs::cuda
