// sort_segments on CUDA. A warp sorts a short segment in registers. For a longer segment, a CTA
// counts for each key how many keys come before it.
#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <limits>

#include "common/launch.h"
#include "pbs/geometry.h"

namespace pbs::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSortWarps = 4;          // segments per CTA, if warps sort them
constexpr int kMostInRegisters = 512;  // keys per warp

// An integer that orders floats, with -0 equal to 0 and NaN below everything.
__device__ int ascending_key(float score) {
  if (isnan(score)) return INT_MIN;
  const int bits = __float_as_int(score + 0.0f);
  return bits < 0 ? INT_MIN - bits : bits;
}

struct Segment {
  int64_t begin;
  const float* importance;
  int32_t* perm;
  bool is_complete;
};

__device__ Segment segment_of(const SortSegmentsParams& params, int64_t idx) {
  const int64_t num_segments = ceil_div(params.num_kv, params.segment_size);
  const int64_t head = idx / num_segments;
  Segment segment{};
  segment.begin = idx % num_segments * params.segment_size;
  segment.importance = params.importance + head * params.num_kv + segment.begin;
  segment.perm = params.perm + head * params.num_kv + segment.begin;
  segment.is_complete = segment.begin + params.segment_size <= params.num_kv;
  return segment;
}

// An incomplete segment keeps its order.
__device__ void keep_order(const SortSegmentsParams& params, const Segment& segment, int first,
                           int step) {
  for (int64_t i = first; segment.begin + i < params.num_kv; i += step) {
    segment.perm[i] = static_cast<int32_t>(segment.begin + i);
  }
}

// Keys are sorted by importance, then by place, in descending order, so no two are equal.
__device__ uint64_t sort_key(float score, int place) {
  const uint32_t high = static_cast<uint32_t>(ascending_key(score)) ^ 0x80000000u;
  return uint64_t{high} << 32 | ~static_cast<uint32_t>(place);
}
__device__ int place_of(uint64_t key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

// Sorts keys kPerLane * lane + i in descending order with a bitonic network. Keys less than
// kPerLane apart are in one lane.
template <int kPerLane>
__device__ void sort_warp(uint64_t (&keys)[kPerLane]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int run = 2; run <= 32 * kPerLane; run *= 2) {
#pragma unroll
    for (int distance = run / 2; distance > 0; distance /= 2) {
      if (distance >= kPerLane) {
        const int lanes = distance / kPerLane;
        const bool runs_down = (lane * kPerLane & run) == 0;
        const bool takes_larger = ((lane & lanes) == 0) == runs_down;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          const uint64_t other = __shfl_xor_sync(~0u, keys[i], lanes);
          if ((other > keys[i]) == takes_larger) keys[i] = other;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          if (i & distance) continue;
          const bool runs_down = ((lane * kPerLane + i) & run) == 0;
          const uint64_t a = keys[i];
          const uint64_t b = keys[i + distance];
          const bool swaps = (b > a) == runs_down;
          keys[i] = swaps ? b : a;
          keys[i + distance] = swaps ? a : b;
        }
      }
    }
  }
}

// One warp per segment. Reads and writes go through shared memory to be coalesced.
template <int kPerLane>
__global__ void __launch_bounds__(32 * kSortWarps)
    sort_segments_kernel(const SortSegmentsParams params, int64_t num_segments) {
  constexpr int kSize = 32 * kPerLane;
  __shared__ uint32_t
      shared[kSortWarps][kSize + kSize / kPerLane];  // an unused word after each lane's
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t idx = static_cast<int64_t>(blockIdx.x) * kSortWarps + warp;
  if (idx >= num_segments) return;
  const Segment segment = segment_of(params, idx);
  if (!segment.is_complete) {
    keep_order(params, segment, lane, 32);
    return;
  }
  const auto size = static_cast<int>(params.segment_size);
  const auto word = [&](int i) -> uint32_t& { return shared[warp][i + i / kPerLane]; };
#pragma unroll
  for (int i = lane; i < kSize; i += 32) {
    if (i < size) word(i) = __float_as_uint(segment.importance[i]);
  }
  __syncwarp();
  uint64_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int place = lane * kPerLane + i;
    keys[i] = place < size ? sort_key(__uint_as_float(word(place)), place) : 0;  // 0 comes last
  }
  sort_warp(keys);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int rank = lane * kPerLane + i;
    if (rank >= size) continue;
    // A full sort needs the place of each rank. A partition needs the rank of each place.
    if (params.num_heavy < 0) {
      word(rank) = place_of(keys[i]);
    } else {
      word(place_of(keys[i])) = rank;
    }
  }
  __syncwarp();
  const auto begin = static_cast<int32_t>(segment.begin);
  const auto num_heavy = static_cast<int>(smaller(params.num_heavy, size));
  int num_heavy_before = 0;
#pragma unroll
  for (int first = 0; first < kSize; first += 32) {
    const int i = first + lane;
    if (params.num_heavy < 0) {
      if (i < size) segment.perm[i] = begin + static_cast<int32_t>(word(i));
      continue;
    }
    // Both parts keep their original order.
    const bool is_heavy = i < size && static_cast<int>(word(i)) < num_heavy;
    const unsigned votes = __ballot_sync(~0u, is_heavy);
    const int heavy = num_heavy_before + __popc(votes & ((1u << lane) - 1));
    if (i < size) segment.perm[is_heavy ? heavy : num_heavy + i - heavy] = begin + i;
    num_heavy_before += __popc(votes);
  }
}

// The numbers of earlier threads and of all threads whose `flag` is set.
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

// One CTA per segment.
__global__ void __launch_bounds__(kThreads)
    sort_segments_long_kernel(const SortSegmentsParams params) {
  extern __shared__ int4 raw[];
  __shared__ int warp_counts[kWarps];
  int* keys = reinterpret_cast<int*>(raw);
  const int size = static_cast<int>(params.segment_size);
  const Segment segment = segment_of(params, blockIdx.x);
  if (!segment.is_complete) {
    keep_order(params, segment, threadIdx.x, kThreads);
    return;
  }
  const auto begin = static_cast<int32_t>(segment.begin);
  const int padded = static_cast<int>(ceil_div(size, 4)) * 4;
  for (int i = threadIdx.x; i < padded; i += kThreads) {
    keys[i] = i < size ? ascending_key(segment.importance[i]) : INT_MIN;
  }
  __syncthreads();
  const int num_heavy = params.num_heavy < 0 ? size : static_cast<int>(params.num_heavy);
  int num_heavy_before = 0;
  for (int first = 0; first < size; first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
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
      if (i < size) segment.perm[rank] = begin + i;
      continue;
    }
    // Both parts keep their original order.
    const Before before = count_before(rank < num_heavy, warp_counts);
    if (i < size) {
      const int heavy = num_heavy_before + before.here;
      const int place = rank < num_heavy ? heavy : min(num_heavy, size) + i - heavy;
      segment.perm[place] = begin + i;
    }
    num_heavy_before += before.total;
  }
}

template <int kPerLane>
void launch_short(const SortSegmentsParams& params, int64_t num_segments, cudaStream_t stream) {
  if (params.segment_size > 32 * kPerLane) {
    if constexpr (64 * kPerLane <= kMostInRegisters) {
      launch_short<2 * kPerLane>(params, num_segments, stream);
    }
    return;
  }
  const auto num_ctas = static_cast<unsigned>(ceil_div(num_segments, kSortWarps));
  sort_segments_kernel<kPerLane><<<num_ctas, 32 * kSortWarps, 0, stream>>>(params, num_segments);
}

}  // namespace

int64_t sort_segments_workspace(const SortSegmentsParams&) { return 0; }

const char* launch_sort_segments(const SortSegmentsParams& params, void*, void* stream) {
  const int64_t num_segments = params.num_heads * ceil_div(params.num_kv, params.segment_size);
  if (num_segments == 0) return nullptr;
  if (num_segments > std::numeric_limits<int32_t>::max()) return "too many segments for one grid";
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.segment_size <= kMostInRegisters) {
    launch_short<2>(params, num_segments, cuda_stream);
  } else {
    const size_t bytes = ceil_div(params.segment_size, 4) * sizeof(int4);
    sort_segments_long_kernel<<<static_cast<unsigned>(num_segments), kThreads, bytes,
                                cuda_stream>>>(params);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pbs::cuda
