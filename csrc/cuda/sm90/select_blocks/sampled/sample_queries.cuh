// The sampled queries of each stack, and what they know of their own segments.
#pragma once


#include "common/exp2.cuh"
#include "layout.cuh"
#include "unit_walk.cuh"

namespace pbs::cuda::sm90 {

constexpr int kSampleThreads = 128;  // a warp for 16 rows

// 8 elements of two bytes.
union Words {
  uint4 whole;
  uint32_t word[4];
};

template <class Element>
__device__ void multiply_16x8x16(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                 uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// A warp's 16 queries. A lane has pieces of two of them, 8 rows apart: those of columns
// 8 * (lane % 4) of every 32. The order of columns does not matter to a product as long as the keys
// have the same.
template <class Element, int kHeadDim>
class SampledQueries {
 public:
  __device__ SampledQueries(const SampledArgs& args, int perm_head, int stack)
      : args_(args),
        unit_(args, perm_head, stack / args.plan.num_warpgroups),
        stack_(unit_.stack(stack % args.plan.num_warpgroups)),
        image_(args.stacks +
               stack_idx(args, perm_head, stack) * static_cast<int64_t>(stack_bytes(kHeadDim))),
        states_(args.rows + stack_idx(args, perm_head, stack) * kStackRows),
        lane_(static_cast<int>(threadIdx.x) % 32),
        row_(row_of_thread(static_cast<int>(threadIdx.x))) {}

  __device__ void run() {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      samples_[r] = sample_of(args_, unit_, stack_, row_ + 8 * r);
      load(r);
      write(r);
    }
    add_keys();
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) write_state(r);
  }

 private:
  static constexpr int kChunks = kHeadDim / 32;  // pieces of a row that a lane has
  static constexpr int kGroups = kHeadDim <= 128 ? 2 : 1;  // of 8 keys, at once
  static constexpr int kStep = 8 * kGroups;

  // Of a lane: of each group the key lane / 4.
  struct Keys {
    Words pieces[kGroups][kChunks];
  };

  // The keys that tell the shift of a row: those of its own segment, or, where there are none, the
  // first candidates.
  struct OwnKeys {
    const Element* rows;
    int64_t row_stride;
    int begin;
    int end;
  };
  __device__ OwnKeys own_keys(const QueryBlock& block) const {
    const SelectBlocksParams& params = args_.params;
    const bool has_own = block.own_end > block.own_begin;
    const ConstRows& from = has_own ? params.k : params.k_perm;
    const int head = has_own ? unit_.hkv : unit_.hp;
    return OwnKeys{static_cast<const Element*>(from.data) + unit_.b * from.batch_stride +
                       head * from.head_stride,
                   from.row_stride, has_own ? static_cast<int>(block.own_begin) : 0,
                   has_own ? static_cast<int>(block.own_end)
                           : min(kExactKeys, args_.num_candidate_rows)};
  }

  __device__ void load(int r) {
    const Sample& sample = samples_[r];
    const ConstRows& q = args_.params.q;
    const Element* from = static_cast<const Element*>(q.data) + unit_.b * q.batch_stride +
                          sample.hq * q.head_stride +
                          (sample.block.first_row + sample.row) * q.row_stride;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      queries_[r][i].whole =
          sample.exists ? *reinterpret_cast<const uint4*>(from + 32 * i + lane_ % 4 * 8) : uint4{};
    }
  }

  __device__ cutlass::Array<float, 8> floats(int r, int chunk) const {
    return cutlass::NumericArrayConverter<float, Element, 8>()(
        reinterpret_cast<const cutlass::Array<Element, 8>&>(queries_[r][chunk]));
  }

  // Writes the row to the image of the stack, and keeps the scale of its elements.
  __device__ void write(int r) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const auto values = floats(r, i);
#pragma unroll
      for (int e = 0; e < 8; ++e) largest = max(largest, magnitude(values[e]));
    }
    largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
    const NarrowScale scale(largest);
    scales_[r] = scale.scale;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const auto narrow = narrowed(floats(r, i), scale.inverse);
      const int place =
          typename SampledLayouts<kHeadDim>::Stack{}(row_ + 8 * r, 32 * i + lane_ % 4 * 8);
      *reinterpret_cast<uint2*>(image_ + place) = reinterpret_cast<const uint2&>(narrow);
    }
  }

  // The largest score of a row's own keys and the sum of their weights, of all its lanes.
  __device__ void add_keys() {
    int begin = args_.num_kv;
    int end = 0;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      seen_[r] = KeyRange{};
      if (!samples_[r].exists) continue;
      const OwnKeys own = own_keys(samples_[r].block);
      const int position = static_cast<int>(samples_[r].block.first_position) + samples_[r].row;
      const bool is_cut = args_.params.is_causal;
      seen_[r] = KeyRange{own.begin, is_cut ? min(own.end, position + 1) : own.end};
      keys_ = own.rows;
      row_stride_ = own.row_stride;
      begin = min(begin, seen_[r].begin);
      end = max(end, seen_[r].end);
    }
    begin = __reduce_min_sync(~0u, begin);
    end = __reduce_max_sync(~0u, end);
    // A lane without a query helps to load.
    const uint32_t has_keys = __ballot_sync(~0u, keys_ != nullptr);
    if (has_keys == 0) return;
    const int from = __ffs(static_cast<int>(has_keys)) - 1;
    keys_ = reinterpret_cast<const Element*>(
        __shfl_sync(~0u, reinterpret_cast<uint64_t>(keys_), from));
    row_stride_ = __shfl_sync(~0u, row_stride_, from);
    keys_ += lane_ % 4 * 8;
    const int begin_of_all =
        __reduce_max_sync(~0u, max(seen_[0].begin, seen_[1].begin));
    const int end_of_all = __reduce_min_sync(~0u, min(seen_[0].end, seen_[1].end));
    Keys next = load_keys(begin, end);
    for (int key = begin; key < end; key += kStep) {
      const Keys keys = next;
      if (key + kStep < end) next = load_keys(key + kStep, end);
      float scores[kGroups][4];
      multiply(keys, scores);
      if (key >= begin_of_all && key + kStep <= end_of_all) {
        add_scores<false>(scores, key);
      } else {
        add_scores<true>(scores, key);
      }
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

  __device__ void multiply(const Keys& keys, float (&scores)[kGroups][4]) const {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (float& score : scores[g]) score = 0.0f;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          multiply_16x8x16<Element>(
              scores[g], queries_[0][i].word[2 * half], queries_[1][i].word[2 * half],
              queries_[0][i].word[2 * half + 1], queries_[1][i].word[2 * half + 1],
              keys.pieces[g][i].word[2 * half], keys.pieces[g][i].word[2 * half + 1]);
        }
      }
    }
  }

  template <bool kHides>
  __device__ void add_scores(const float (&scores)[kGroups][4], int first) {
    const float factor = args_.params.scale * kLog2e;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      float top = tops_[r];
      float logits[2 * kGroups];
#pragma unroll
      for (int i = 0; i < 2 * kGroups; ++i) {
        logits[i] = scores[i / 2][2 * r + i % 2] * factor;
        if (kHides) {
          const int key = first + i / 2 * 8 + lane_ % 4 * 2 + i % 2;
          if (key < seen_[r].begin || key >= seen_[r].end) logits[i] = -INFINITY;
        }
        top = fmaxf(top, logits[i]);  // a NaN stays one in the sum
      }
      const float base = top == -INFINITY ? 0.0f : top;
      float sum = sums_[r] * exp2_approx(tops_[r] - base);
#pragma unroll
      for (float logit : logits) sum += exp2_approx(logit - base);
      tops_[r] = top;
      sums_[r] = sum;
    }
  }

  // NOTE: a row that does not exist gets weights of 0 whatever the keys.
  __device__ void write_state(int r) {
    const float top = quad_max(tops_[r]);
    const float base = top == -INFINITY ? 0.0f : top;
    const float sum = quad_sum(sums_[r] * exp2_approx(tops_[r] - base));
    SampledRow state{0.0f, INFINITY, 0};
    if (samples_[r].exists) {
      state = SampledRow{scales_[r] * args_.params.scale * kLog2e, base + log2f(sum),
                         static_cast<int>(samples_[r].block.num_candidates *
                                          args_.params.blocking.kv_block_size)};
    }
    if (lane_ % 4 == 0) states_[row_ + 8 * r] = state;
  }

  const SampledArgs& args_;
  SampledUnit unit_;
  SampledStack stack_;
  char* image_;
  SampledRow* states_;
  int lane_;
  int row_;
  Sample samples_[kThreadRows];
  Words queries_[kThreadRows][kChunks];
  float scales_[kThreadRows];
  KeyRange seen_[kThreadRows];
  const Element* keys_ = nullptr;
  int64_t row_stride_ = 0;
  float tops_[kThreadRows] = {-INFINITY, -INFINITY};
  float sums_[kThreadRows] = {};
};

// One CTA a stack.
template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kSampleThreads)
    sample_queries_kernel(const __grid_constant__ SampledArgs args) {
  cudaTriggerProgrammaticLaunchCompletion();  // the summary of the keys is another matter
  const auto idx = static_cast<int>(blockIdx.x);
  if (idx == 0 && threadIdx.x == 0) *args.counter = 0;
  SampledQueries<Element, kHeadDim>(args, idx / args.plan.stacks_per_perm,
                                    idx % args.plan.stacks_per_perm)
      .run();
}

}  // namespace pbs::cuda::sm90
