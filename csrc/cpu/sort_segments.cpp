// sort_segments: orders the keys of one segment by importance.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "kernels.h"
#include "pbs/geometry.h"

namespace pbs::cpu {
namespace {

// An integer that orders floats in descending order, with -0 equal to 0 and NaN last.
int64_t descending_key(float score) {
  if (score != score) return INT64_MAX;
  const float positive_zero = score + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &positive_zero, sizeof bits);
  return -static_cast<int64_t>(bits < 0 ? INT32_MIN - bits : bits);
}

}  // namespace

void sort_segment(const SortSegmentsParams& params, int64_t item) {
  const int64_t num_segments = ceil_div(params.num_kv, params.segment_size);
  const int64_t head = item / num_segments;
  const int64_t begin = item % num_segments * params.segment_size;
  const int64_t end = smaller(begin + params.segment_size, params.num_kv);
  const float* importance = params.importance + head * params.num_kv;
  int32_t* perm = params.perm + head * params.num_kv;
  std::iota(perm + begin, perm + end, static_cast<int32_t>(begin));
  if (end - begin < params.segment_size) return;  // an incomplete segment keeps its order

  std::stable_sort(perm + begin, perm + end, [importance](int32_t a, int32_t b) {
    return descending_key(importance[a]) < descending_key(importance[b]);
  });
  if (params.num_heavy >= 0) {
    // The heavy keys are now first, and each part returns to its original order.
    const int64_t split = begin + smaller(params.num_heavy, params.segment_size);
    std::sort(perm + begin, perm + split);
    std::sort(perm + split, perm + end);
  }
}

}  // namespace pbs::cpu
