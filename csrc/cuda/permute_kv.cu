// permute_kv on CUDA: a CTA holds a window of K or V rows in shared memory and writes them in the
// order of each permutation of that key head; means of permuted key blocks come from the same
// registers. Rows from outside the window, which only segments longer than it have, come from L2.
#include <cuda_runtime.h>
#include <cutlass/array.h>
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>
#include <cutlass/numeric_conversion.h>

#include <limits>

#include "launch.h"
#include "pbs/geometry.h"

namespace pbs::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWindowRows = 256;
constexpr int kRowsPerWarp = kWindowRows / kWarps;  // no key block has fewer
constexpr int kMostRowBytes = 256;                  // of a window; longer rows go to several
constexpr int kRowsAtOnce = 4;                      // of a lane
static_assert(kRowsPerWarp <= 32);

const char* text_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T>
constexpr int kPiece = 16 / sizeof(T);

template <class T>
using Piece = cutlass::AlignedArray<T, kPiece<T>, 16>;

__host__ __device__ constexpr int num_splits(int64_t head_dim, int element_bytes) {
  return static_cast<int>(ceil_div(head_dim * element_bytes, kMostRowBytes));
}

// What a CTA works on: `width` columns of rows [begin, begin + num_rows) of K or of V, of which it
// writes the first num_copied, permuted.
struct Window {
  int64_t b;
  int64_t kv_head;
  int64_t begin;
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
  const int part = static_cast<int>(blockIdx.x) % (2 * splits);
  const int item = static_cast<int>(blockIdx.x) / (2 * splits);
  const int head = item / num_windows;
  Window window{};
  window.begin = static_cast<int64_t>(item % num_windows) * kWindowRows;
  window.b = head / static_cast<int>(problem.num_kv_heads);
  window.kv_head = head % static_cast<int>(problem.num_kv_heads);
  window.num_rows = static_cast<int>(smaller(kWindowRows, problem.num_kv - window.begin));
  window.num_copied = static_cast<int>(smaller(kWindowRows, params.num_copied - window.begin));
  window.width = static_cast<int>(problem.head_dim) / splits;
  window.first_column = part / 2 * window.width;
  window.is_key = part % 2 == 0;
  return window;
}

template <class T>
__device__ void load_window(const T* src, int64_t row_stride, int width, int num_rows, T* rows) {
  const int pieces = width / kPiece<T>;
  for (int i = threadIdx.x; i < num_rows * pieces; i += kThreads) {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(rows + i * kPiece<T>));
    const T* from = src + i / pieces * row_stride + i % pieces * kPiece<T>;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  }
}

// Where rows come from: global memory, and those of the window shared memory.
template <class T>
struct Source {
  const T* rows;  // of the head, from the first column of the window on
  int64_t row_stride;
  const T* window;
  int64_t window_begin;
  int num_window_rows;
  int64_t num_kv;
  int width;

  __device__ Piece<T> piece(int64_t row, int column) const {
    const int64_t in_window = row - window_begin;
    if (in_window >= 0 && in_window < num_window_rows) {
      return *reinterpret_cast<const Piece<T>*>(window + in_window * width + column);
    }
    if (row >= 0 && row < num_kv) {
      return *reinterpret_cast<const Piece<T>*>(rows + row * row_stride + column);
    }
    // NOTE: a kernel cannot raise; NaN makes a bad permutation visible without a stray read.
    Piece<T> piece;
    piece.fill(T(std::numeric_limits<float>::quiet_NaN()));
    return piece;
  }
};

// Writes num_rows rows, row i from row `from[i]`, and their sum; by one warp, whose lanes hold
// pieces of as many rows as they can.
template <class T>
__device__ void gather_rows(const Source<T>& source, const int32_t* from, int num_rows, T* dst,
                            int64_t dst_stride, float* sums) {
  const cutlass::NumericArrayConverter<float, T, kPiece<T>> to_floats;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int num_pieces = source.width / kPiece<T>;
  const int lanes_per_row = num_pieces <= 8 ? 8 : num_pieces <= 16 ? 16 : 32;
  const int step = 32 / lanes_per_row;
  for (int first = 0; first < num_pieces; first += lanes_per_row) {
    const int piece = first + lane % lanes_per_row;
    const int column = piece * kPiece<T>;
    cutlass::Array<float, kPiece<T>> total;
    total.clear();
    if (piece < num_pieces) {
      for (int row = lane / lanes_per_row; row < num_rows; row += kRowsAtOnce * step) {
        Piece<T> pieces[kRowsAtOnce];
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
          if (row + i * step < num_rows) pieces[i] = source.piece(from[row + i * step], column);
        }
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
          if (row + i * step >= num_rows) continue;
          T* to = dst + (row + i * step) * dst_stride + column;
          *reinterpret_cast<Piece<T>*>(to) = pieces[i];
          const cutlass::Array<float, kPiece<T>> widened = to_floats(pieces[i]);
#pragma unroll
          for (int e = 0; e < kPiece<T>; ++e) total[e] += widened[e];
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kPiece<T>; ++e) {
      for (int lanes = lanes_per_row; lanes < 32; lanes *= 2) {
        total[e] += __shfl_xor_sync(~0u, total[e], lanes);
      }
      if (piece < num_pieces && lane < lanes_per_row) sums[column + e] = total[e];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) permute_kv_kernel(const PermuteKVParams params) {
  extern __shared__ uint4 raw[];
  __shared__ int32_t from[kWindowRows];
  const Problem& problem = params.problem;
  const auto head_dim = static_cast<int>(problem.head_dim);
  const auto kv_block_size = static_cast<int>(params.kv_block_size);
  const Window window = window_of<T>(params);
  T* window_data = reinterpret_cast<T*>(raw);  // (kWindowRows, width)
  float* sums =
      reinterpret_cast<float*>(window_data + kWindowRows * window.width);  // (kWarps, width)
  const ConstRows& input = window.is_key ? params.k : params.v;
  const T* src = static_cast<const T*>(input.data) + window.b * input.batch_stride +
                 window.kv_head * input.head_stride + window.first_column;
  load_window(src + window.begin * input.row_stride, input.row_stride, window.width,
              window.num_rows, window_data);
  const Source<T> source{src,          input.row_stride, window_data,
                         window.begin, window.num_rows,  problem.num_kv,
                         window.width};

  const int64_t perms_per_kv = problem.num_perm_heads / problem.num_kv_heads;
  const int64_t first_head = window.b * problem.num_perm_heads + window.kv_head * perms_per_kv;
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t* perm = params.perm + first_head * problem.num_kv + window.begin + thread;
  static_assert(kThreads == kWindowRows);
  int32_t next = thread < window.num_copied ? *perm : 0;
  asm volatile("cp.async.wait_all;" ::: "memory");
  const int first_row = thread / 32 * kRowsPerWarp;
  const int num_rows = max(0, min(kRowsPerWarp, window.num_copied - first_row));
  for (int64_t p = 0; p < perms_per_kv; ++p) {
    __syncthreads();
    from[thread] = next;
    perm += problem.num_kv;
    if (thread < window.num_copied && p + 1 < perms_per_kv) next = *perm;
    __syncthreads();
    const int64_t head = first_head + p;
    T* out = static_cast<T*>(window.is_key ? params.k_perm : params.v_perm);
    gather_rows(
        source, from + first_row, num_rows,
        out + (head * problem.num_kv + window.begin + first_row) * head_dim + window.first_column,
        head_dim, sums + thread / 32 * window.width);
    if (!window.is_key) continue;
    __syncthreads();
    const int64_t num_kv_blocks = ceil_div(problem.num_kv, kv_block_size);
    float* means = params.k_mean +
                   (head * num_kv_blocks + window.begin / kv_block_size) * head_dim +
                   window.first_column;
    const int num_blocks = (window.num_copied + kv_block_size - 1) / kv_block_size;
    const int warps_per_block = kv_block_size / kRowsPerWarp;
    for (int i = thread; i < num_blocks * window.width; i += kThreads) {
      const int block = i / window.width;
      const int column = i % window.width;
      float sum = 0.0f;
      for (int w = 0; w < warps_per_block; ++w) {
        sum += sums[(block * warps_per_block + w) * window.width + column];
      }
      means[block * head_dim + column] =
          sum / static_cast<float>(min(kv_block_size, window.num_copied - block * kv_block_size));
    }
  }
}

template <class T>
const char* launch(const PermuteKVParams& params, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const int splits = num_splits(problem.head_dim, sizeof(T));
  const int64_t num_ctas =
      2 * splits * problem.batch * problem.num_kv_heads * ceil_div(params.num_copied, kWindowRows);
  if (num_ctas == 0 || problem.num_perm_heads == 0) return nullptr;
  if (num_ctas > std::numeric_limits<int32_t>::max()) return "too many keys for one grid";
  const int width = static_cast<int>(problem.head_dim) / splits;
  const int bytes = width * static_cast<int>(kWindowRows * sizeof(T) + kWarps * sizeof(float));
  const auto kernel = permute_kv_kernel<T>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return text_of(error);
  kernel<<<static_cast<unsigned>(num_ctas), kThreads, bytes, stream>>>(params);
  return text_of(cudaGetLastError());
}

}  // namespace

const char* launch_permute_kv(const PermuteKVParams& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (params.problem.dtype) {
    case DType::kFloat32:
      return launch<float>(params, cuda_stream);
    case DType::kBFloat16:
      return launch<cutlass::bfloat16_t>(params, cuda_stream);
    case DType::kFloat16:
      return launch<cutlass::half_t>(params, cuda_stream);
  }
  return "unknown dtype";
}

const char* current_device(int* device) { return text_of(cudaGetDevice(device)); }

const char* set_device(int device) { return text_of(cudaSetDevice(device)); }

const char* compute_capability(int device, int* capability) {
  int major = 0;
  int minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  *capability = 10 * major + minor;
  return text_of(error);
}

}  // namespace pbs::cuda
