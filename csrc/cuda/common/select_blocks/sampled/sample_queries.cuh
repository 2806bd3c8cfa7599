// The sampled queries of each stack, and their weights on their own segments.
#pragma once

#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>

#include "common/exp2.cuh"
#include "common/fragments.cuh"
#include "common/launch_kernel.h"
#include "common/mma_sync.cuh"
#include "common/row_state.cuh"
#include "units.cuh"

namespace pbs::cuda {

constexpr int kSampleThreads = 128;  // each warp has 16 rows and a part of the keys

// 8 elements of two bytes.
union Words {
  uint4 whole;
  uint32_t word[4];
};

// The 16 queries of a warp. A lane has pieces of two of them, 8 rows apart: columns 8 * (lane % 4)
// and the following of every 32. A product allows any order of columns that queries and keys share.
// `Image` is the format of a stack in a GPU family: it may copy the queries, and computes the shift
// of a row from the weights of the own segment.
template <class Image, class Element, int kHeadDim, int kKeyParts>
class SampledQueries {
 public:
  __device__ SampledQueries(const SampledArgs& args, int perm_head, int stack)
      : args_(args),
        thread_(static_cast<int>(threadIdx.x) % kSampleThreads),
        part_(static_cast<int>(threadIdx.x) / kSampleThreads),
        unit_(args, perm_head, /*nth=*/0),
        pairs_(stack_pairs(args, stack)),
        image_(args, stack_idx(args, perm_head, stack)),
        states_(args.rows + stack_idx(args, perm_head, stack) * kStackRows),
        lane_(static_cast<int>(threadIdx.x) % 32),
        row_(row_of_thread(thread_)) {}

  __device__ void run() {
    find_rows();
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) load(r);
    if (part_ == 0) {
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
        scales_[r] = image_.template write<Element>(row_ + 8 * r, queries_[r]);
      }
    }
    add_keys();
    if (kKeyParts > 1 && !merge_parts()) return;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) write_state(r);
  }

 private:
  static constexpr int kChunks = kHeadDim / 32;            // pieces of a row per lane
  static constexpr int kGroups = kHeadDim <= 128 ? 2 : 1;  // groups of 8 keys at once
  static constexpr int kStep = 8 * kGroups;

  // A lane has key lane / 4 of each group.
  struct Keys {
    Words pieces[kGroups][kChunks];
  };

  // A row of the stack: its query, the keys that determine its shift, and its number of candidates.
  struct Row {
    int hq;
    int query;  // negative if the row does not exist
    int begin;
    int end;
    int candidate_end;
  };

  // Each lane finds one of the 16 rows, and gets the two rows that it works on from other lanes.
  __device__ void find_rows() {
    const int first = row_of_thread(thread_ / 32 * 32);
    const Row own = find_row(first + lane_ % 16);
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const int from = lane_ / 4 + 8 * r;
      rows_[r] = Row{__shfl_sync(~0u, own.hq, from), __shfl_sync(~0u, own.query, from),
                     __shfl_sync(~0u, own.begin, from), __shfl_sync(~0u, own.end, from),
                     __shfl_sync(~0u, own.candidate_end, from)};
    }
  }

  __device__ Row find_row(int row) const {
    const Sample sample = sample_of(args_, unit_, pairs_, row);
    if (!sample.exists) return Row{0, -1, args_.num_kv, 0, 0};
    const QueryBlock& block = sample.block;
    Row found{sample.hq, static_cast<int>(block.first_row) + sample.row, 0, 0, 0};
    found.candidate_end =
        static_cast<int>(block.num_candidates * args_.params.blocking.kv_block_size);
    if (!args_.has_own) {  // the first candidates determine the shift
      found.end = min(kSumKeys, args_.num_candidate_rows);
      return found;
    }
    found.begin = static_cast<int>(block.own_begin);
    found.end = args_.params.is_causal ? static_cast<int>(block.first_position) + sample.row + 1
                                       : static_cast<int>(block.own_end);
    return found;
  }

  __device__ void load(int r) {
    const Row& row = rows_[r];
    const ConstRows& q = args_.params.q;
    const Element* from = static_cast<const Element*>(q.data) + unit_.b * q.batch_stride +
                          row.hq * q.head_stride + max(row.query, 0) * q.row_stride;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      queries_[r][i].whole =
          row.query >= 0 ? *reinterpret_cast<const uint4*>(from + 32 * i + lane_ % 4 * 8) : uint4{};
    }
  }

  // A lane's share of the largest score of a row's keys and of the sum of their weights.
  __device__ void add_keys() {
    const ConstRows& from = args_.has_own ? args_.params.k : args_.params.k_perm;
    keys_ = static_cast<const Element*>(from.data) + unit_.b * from.batch_stride +
            (args_.has_own ? unit_.hkv : unit_.hp) * from.head_stride + lane_ % 4 * 8 -
            (args_.has_own ? args_.params.first_k_row : 0) * from.row_stride;
    row_stride_ = from.row_stride;
    const int begin = __reduce_min_sync(~0u, min(rows_[0].begin, rows_[1].begin));
    const int end = __reduce_max_sync(~0u, max(rows_[0].end, rows_[1].end));
    if (begin >= end) return;
    Keys next = load_keys(begin + part_ * kStep, end);
    for (int key = begin + part_ * kStep; key < end; key += kKeyParts * kStep) {
      const Keys keys = next;
      next = load_keys(key + kKeyParts * kStep, end);
      float scores[kGroups][4];
      multiply(keys, scores);
      add_scores(scores, key);
    }
  }

  __device__ Keys load_keys(int first, int end) const {
    Keys keys;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const Element* row = keys_ + min(first + 8 * g + lane_ / 4, end - 1) * row_stride_;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        keys.pieces[g][i].whole = *reinterpret_cast<const uint4*>(row + 32 * i);
      }
    }
    return keys;
  }

  // Two sums per group, so that fewer products wait for each other.
  __device__ void multiply(const Keys& keys, float (&scores)[kGroups][4]) const {
    float odd[kGroups][4] = {};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (float& score : scores[g]) score = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          multiply_16x8x16<Element>(
              half == 0 ? scores[g] : odd[g], queries_[0][i].word[2 * half],
              queries_[1][i].word[2 * half], queries_[0][i].word[2 * half + 1],
              queries_[1][i].word[2 * half + 1], keys.pieces[g][i].word[2 * half],
              keys.pieces[g][i].word[2 * half + 1]);
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[g][i] += odd[g][i];
    }
  }

  __device__ void add_scores(const float (&scores)[kGroups][4], int first) {
    const float factor = args_.params.scale * kLog2e;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      float top = tops_[r];
      float logits[2 * kGroups];
#pragma unroll
      for (int i = 0; i < 2 * kGroups; ++i) {
        const int key = first + i / 2 * 8 + lane_ % 4 * 2 + i % 2;
        const bool is_seen = key >= rows_[r].begin && key < rows_[r].end;
        logits[i] = is_seen ? scores[i / 2][2 * r + i % 2] * factor : -INFINITY;
        top = fmaxf(top, logits[i]);  // NaN is kept in the sum
      }
      const float base = top == -INFINITY ? 0.0f : top;
      float sum = sums_[r] * exp2_approx(tops_[r] - base);
#pragma unroll
      for (float logit : logits) sum += exp2_approx(logit - base);
      tops_[r] = top;
      sums_[r] = sum;
    }
  }

  // Whether this is the first part, which then has the sums of all parts.
  __device__ bool merge_parts() {
    __shared__ float2 states[kMostKeyParts - 1][kSampleThreads][kThreadRows];
    if (part_ > 0) {
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
        states[part_ - 1][thread_][r] = float2{tops_[r], sums_[r]};
      }
    }
    __syncthreads();
    if (part_ > 0) return false;
#pragma unroll
    for (int i = 0; i < kKeyParts - 1; ++i) {
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
        const float2 other = states[i][thread_][r];
        const RowState all = merge(RowState{tops_[r], sums_[r]}, RowState{other.x, other.y});
        tops_[r] = all.max;
        sums_[r] = all.sum;
      }
    }
    return true;
  }

  __device__ void write_state(int r) {
    const float top = quad_max(tops_[r]);
    const float base = top == -INFINITY ? 0.0f : top;
    const float sum = quad_sum(sums_[r] * exp2_approx(tops_[r] - base));
    SampledRow state{0.0f, 0.0f, 0.0f, -1};  // the row does not exist
    if (rows_[r].query >= 0) {
      state.factor = scales_[r] * args_.params.scale * kLog2e;
      Image::set_own(state, base + log2f(sum), args_.has_own);
      state.candidate_end = rows_[r].candidate_end;
    }
    if (lane_ % 4 == 0) states_[row_ + 8 * r] = state;
  }

  const SampledArgs& args_;
  int thread_;
  int part_;          // part of the keys
  SampledUnit unit_;  // any unit of the permutation
  StackPairs pairs_;
  Image image_;
  SampledRow* states_;
  int lane_;
  int row_;
  Row rows_[kThreadRows];
  Words queries_[kThreadRows][kChunks];
  float scales_[kThreadRows] = {};  // scales of the rows of the image
  const Element* keys_ = nullptr;   // starts at the lane's columns
  int64_t row_stride_ = 0;
  float tops_[kThreadRows] = {-INFINITY, -INFINITY};
  float sums_[kThreadRows] = {};
};

// One CTA per stack.
template <class Image, class Element, int kHeadDim, int kKeyParts>
__global__ void __launch_bounds__(kSampleThreads* kKeyParts,
                                  kHeadDim <= 128 ? kSampleCtasPerSm / kKeyParts : 2)
    select_blocks_samples_kernel(const __grid_constant__ SampledArgs args) {
  Image::begin();
  const auto idx = static_cast<int>(blockIdx.x);
  if (idx == 0 && threadIdx.x == 0) *args.counter = 0;
  SampledQueries<Image, Element, kHeadDim, kKeyParts>(args, idx / args.plan.stacks_per_perm,
                                                      idx % args.plan.stacks_per_perm)
      .run();
}

template <class Image, class Element, int kHeadDim, int kKeyParts>
cudaError_t launch_samples(const SampledArgs& args, cudaStream_t stream) {
  const int64_t num_stacks =
      static_cast<int64_t>(args.plan.num_perm_heads) * args.plan.stacks_per_perm;
  return launch_kernel(select_blocks_samples_kernel<Image, Element, kHeadDim, kKeyParts>, args,
                       num_stacks, kKeyParts * kSampleThreads, 0, stream);
}

template <class Image, class Element, int kHeadDim>
cudaError_t launch_samples(const SampledArgs& args, cudaStream_t stream) {
  if (args.plan.key_parts == 1) return launch_samples<Image, Element, kHeadDim, 1>(args, stream);
  if constexpr (kHeadDim <= 128) {
    if (args.plan.key_parts == 2) return launch_samples<Image, Element, kHeadDim, 2>(args, stream);
    if (args.plan.key_parts == 4) return launch_samples<Image, Element, kHeadDim, 4>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace pbs::cuda
