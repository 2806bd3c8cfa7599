// sort_segments on CUDA: a key's place is the number of keys that come before it. Counting those is
// stable, needs no exchange, and for the segments that are used (256 keys) costs less than a sort.
#include <cuda_runtime.h>

#include <climits>
#include <limits>

#include "launch.h"
#include "pbs/geometry.h"

namespace pbs::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// An integer that orders floats, with -0 beside 0 and NaN below everything.
__device__ int ascending_key(float score) {
  if (isnan(score)) return INT_MIN;
  const int bits = __float_as_int(score + 0.0f);
  return bits < 0 ? INT_MIN - bits : bits;
}

// How many of the threads before this one have `flag` set, and of all.
struct Before {
  int here;
  int total;
};

__device__ Before count_before(bool flag, int (&warp_counts)[kWarps]) {
  const unsigned votes = __ballot_sync(~0u, flag);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  if (lane == 0) warp_counts[warp] = __popc(votes);
  __syncthreads();
  Before before{__popc(votes & ((1u << lane) - 1)), 0};
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before.here += warp_counts[w];
    before.total += warp_counts[w];
  }
  __syncthreads();
  return before;
}

// One CTA a segment.
__global__ void __launch_bounds__(kThreads) sort_segments_kernel(const SortSegmentsParams params) {
  extern __shared__ int4 raw[];
  __shared__ int warp_counts[kWarps];
  int* keys = reinterpret_cast<int*>(raw);
  const int size = static_cast<int>(params.segment_size);
  const int64_t num_segments = ceil_div(params.num_kv, size);
  const int64_t head = blockIdx.x / num_segments;
  const int64_t begin = blockIdx.x % num_segments * size;
  const float* importance = params.importance + head * params.num_kv + begin;
  int32_t* perm = params.perm + head * params.num_kv + begin;
  if (begin + size > params.num_kv) {  // an incomplete segment keeps its order
    for (int i = threadIdx.x; begin + i < params.num_kv; i += kThreads) {
      perm[i] = static_cast<int32_t>(begin + i);
    }
    return;
  }
  const int padded = static_cast<int>(ceil_div(size, 4)) * 4;
  for (int i = threadIdx.x; i < padded; i += kThreads) {
    keys[i] = i < size ? ascending_key(importance[i]) : INT_MIN;
  }
  __syncthreads();
  const int num_heavy = params.num_heavy < 0 ? size : static_cast<int>(params.num_heavy);
  int num_heavy_before = 0;
  for (int first = 0; first < size; first += kThreads) {
    const int i = first + threadIdx.x;
    int rank = size;
    if (i < size) {
      const int own = keys[i];
      rank = 0;
#pragma unroll 4
      for (int j = 0; j < padded; j += 4) {
        const int4 others = raw[j / 4];
        rank += others.x > own || (others.x == own && j < i);
        rank += others.y > own || (others.y == own && j + 1 < i);
        rank += others.z > own || (others.z == own && j + 2 < i);
        rank += others.w > own || (others.w == own && j + 3 < i);
      }
    }
    if (params.num_heavy < 0) {
      if (i < size) perm[rank] = static_cast<int32_t>(begin + i);
      continue;
    }
    // Both parts in their original order.
    const Before before = count_before(rank < num_heavy, warp_counts);
    if (i < size) {
      const int heavy = num_heavy_before + before.here;
      const int place = rank < num_heavy ? heavy : min(num_heavy, size) + i - heavy;
      perm[place] = static_cast<int32_t>(begin + i);
    }
    num_heavy_before += before.total;
  }
}

}  // namespace

const char* launch_sort_segments(const SortSegmentsParams& params, void* stream) {
  const int64_t num_ctas = params.num_heads * ceil_div(params.num_kv, params.segment_size);
  if (num_ctas == 0) return nullptr;
  if (num_ctas > std::numeric_limits<int32_t>::max()) return "too many segments for one grid";
  const size_t bytes = ceil_div(params.segment_size, 4) * sizeof(int4);
  sort_segments_kernel<<<static_cast<unsigned>(num_ctas), kThreads, bytes,
                         static_cast<cudaStream_t>(stream)>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pbs::cuda
