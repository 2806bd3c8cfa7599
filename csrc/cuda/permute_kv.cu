// permute_kv on CUDA: one CTA gathers the K and V rows of one permuted key block in 16-byte
// pieces and averages its keys from the same registers.
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

const char* text_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T>
struct Row {
  static constexpr int kPiece = 16 / sizeof(T);
  using Piece = cutlass::AlignedArray<T, kPiece, 16>;
  using Floats = cutlass::Array<float, kPiece>;
};

template <class T>
__global__ void __launch_bounds__(kThreads) permute_kv_kernel(PermuteKVParams params) {
  using Piece = typename Row<T>::Piece;
  using Floats = typename Row<T>::Floats;
  constexpr int kPiece = Row<T>::kPiece;
  extern __shared__ float sums[];  // (rows in flight, head_dim)

  // Indices.
  const Problem& problem = params.problem;
  const int head_dim = static_cast<int>(problem.head_dim);
  const int num_pieces = head_dim / kPiece;
  const int rows_in_flight = kThreads / num_pieces;
  const int piece = threadIdx.x % num_pieces;
  const int first_row = threadIdx.x / num_pieces;
  const int64_t num_kv_blocks = ceil_div(problem.num_kv, params.kv_block_size);
  const int64_t head = blockIdx.x / num_kv_blocks;
  const int64_t begin = blockIdx.x % num_kv_blocks * params.kv_block_size;
  const int num_rows = static_cast<int>(smaller(params.kv_block_size, problem.num_kv - begin));
  const int64_t b = head / problem.num_perm_heads;
  const int64_t hkv =
      head % problem.num_perm_heads / (problem.num_perm_heads / problem.num_kv_heads);
  const T* k = static_cast<const T*>(params.k.data) + b * params.k.batch_stride +
               hkv * params.k.head_stride + piece * kPiece;
  const T* v = static_cast<const T*>(params.v.data) + b * params.v.batch_stride +
               hkv * params.v.head_stride + piece * kPiece;
  const int64_t dst_head = (head * problem.num_kv + begin) * head_dim + piece * kPiece;
  T* k_perm = static_cast<T*>(params.k_perm) + dst_head;
  T* v_perm = static_cast<T*>(params.v_perm) + dst_head;

  // Gather.
  Floats total;
  total.clear();
  cutlass::NumericArrayConverter<float, T, kPiece> to_floats;
  if (first_row < rows_in_flight) {
    for (int row = first_row; row < num_rows; row += rows_in_flight) {
      const int64_t src = params.perm[head * problem.num_kv + begin + row];
      Piece key;
      Piece value;
      if (src >= 0 && src < problem.num_kv) {
        key = *reinterpret_cast<const Piece*>(k + src * params.k.row_stride);
        value = *reinterpret_cast<const Piece*>(v + src * params.v.row_stride);
      } else {
        // NOTE: a kernel cannot raise; NaN makes a bad permutation visible without a stray read.
        key.fill(T(std::numeric_limits<float>::quiet_NaN()));
        value.fill(T(std::numeric_limits<float>::quiet_NaN()));
      }
      *reinterpret_cast<Piece*>(k_perm + static_cast<int64_t>(row) * head_dim) = key;
      *reinterpret_cast<Piece*>(v_perm + static_cast<int64_t>(row) * head_dim) = value;
      const Floats widened = to_floats(key);
      for (int i = 0; i < kPiece; ++i) total[i] += widened[i];
    }
    for (int i = 0; i < kPiece; ++i) sums[first_row * head_dim + piece * kPiece + i] = total[i];
  }
  __syncthreads();

  // Mean, always added in the same order.
  const int num_partial = rows_in_flight < num_rows ? rows_in_flight : num_rows;
  for (int d = threadIdx.x; d < head_dim; d += kThreads) {
    float sum = 0.0f;
    for (int r = 0; r < num_partial; ++r) sum += sums[r * head_dim + d];
    params.k_mean[static_cast<int64_t>(blockIdx.x) * head_dim + d] = sum / num_rows;
  }
}

template <class T>
const char* launch(const PermuteKVParams& params, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const int64_t num_blocks =
      problem.batch * problem.num_perm_heads * ceil_div(problem.num_kv, params.kv_block_size);
  if (num_blocks == 0) return nullptr;
  if (num_blocks > std::numeric_limits<int32_t>::max()) return "too many key blocks for one grid";
  const int rows_in_flight = kThreads / static_cast<int>(problem.head_dim / Row<T>::kPiece);
  const size_t shared_bytes = rows_in_flight * problem.head_dim * sizeof(float);
  permute_kv_kernel<T>
      <<<static_cast<unsigned>(num_blocks), kThreads, shared_bytes, stream>>>(params);
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
