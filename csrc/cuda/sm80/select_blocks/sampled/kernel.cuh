// The kernel of sampled scores. The warps of a CTA copy tiles of permuted keys together and share
// them. Each warp has its own sampled queries in registers. Then the warps select blocks.
#pragma once

#include <cuda_runtime.h>

#include "common/launch_kernel.h"
#include "common/pages.cuh"
#include "stack_rows.cuh"

namespace pbs::cuda::sm80 {

template <class Element_, int kHeadDim_, int kStacks_>
struct SampledTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kStacks = kStacks_;
  static constexpr int kThreads = 32 * kSampledWarps;
  static constexpr int kRowTiles = kStacks * kStackRows / (16 * kSampledWarps);  // per warp
  static constexpr int kStages = sampled_stages(kHeadDim);
  static constexpr int kCtasPerSm = sampled_ctas_per_sm(kHeadDim);
  using Rows = StackRows<Element, kHeadDim, kRowTiles>;

  struct Shared {
    alignas(128) char k[kStages][stage_bytes(kHeadDim)];
    int drawn;

    // 1 / (sum of a row), as two equal bfloat16, in the memory of the keys.
    __device__ uint32_t* weights() { return reinterpret_cast<uint32_t*>(k[0]); }
  };
  static_assert(sizeof(Shared::k[0]) >= 4 * kStacks * kStackRows);
  static_assert(kCtasPerSm * (sizeof(Shared) + kReservedBytesPerCta) <= kSmallSharedBytes);
};

// The permuted keys of a unit, stage by stage.
template <class Traits>
class StageLoader {
 public:
  using Element = typename Traits::Element;
  using Shared = typename Traits::Shared;
  using Copy = TileCopy<Traits::kHeadDim, kStageKeys, Traits::kThreads>;

  __device__ StageLoader(const SampledArgs& args, Shared& shared, const SampledUnit& unit)
      : args_(args), unit_(unit), shared_(shared) {}

  // Starts to copy the keys from first_key on, if there are any.
  __device__ __forceinline__ void start(int slot, int first_key) const {
    const ConstRows& keys = args_.params.k_perm;
#pragma unroll
    for (int i = 0; i < kStageKeys; i += kPartRows) {
      const int key = first_key + i;
      const int num_rows = args_.num_candidate_rows - key;
      if (num_rows <= 0) break;
      const RowPlace place = place_in_pages(args_.params.pages, unit_.b, key);
      const Element* rows =
          static_cast<const Element*>(keys.data) + row_start(keys, place, unit_.hp);
      Copy::template start<kPartRows>(read_thread(), shared_.k[slot], i, rows, keys.row_stride,
                                      num_rows);
    }
  }

 private:
  const SampledArgs& args_;
  const SampledUnit& unit_;
  Shared& shared_;
};

// Two neighbouring sums of a stage in a lane.
template <class Traits>
__device__ __forceinline__ void write_sums(const SampledArgs& args, char* tables, int stage,
                                           const float (&sums)[2][Traits::Rows::kSumRows]) {
  using Rows = typename Traits::Rows;
  if (!Rows::writes_sums()) return;
#pragma unroll
  for (int i = 0; i < Traits::Rows::kSumRows; ++i) {
    const int row = Rows::row_of_sum(i);
    constexpr int kStagesPerRead = kTilesPerRead * kSampledKeys / kStageKeys;
    char* to = tables + row / kStackRows * table_bytes(args.plan) +
               (static_cast<int64_t>(stage / kStagesPerRead) * kStackRows + row % kStackRows) *
                   kSumsPerRead * 2 +
               stage % kStagesPerRead * 4;
    *reinterpret_cast<uint32_t*>(to) = bits_of(__floats2bfloat162_rn(sums[0][i], sums[1][i]));
  }
}

// The sums of all candidates of a unit, and the factors of their rows.
template <class Traits>
__device__ __forceinline__ void sum_unit(const SampledArgs& args, const SampledUnit& unit,
                                         typename Traits::Shared& shared, char* tables) {
  constexpr int kStages = Traits::kStages;
  const int num_stages = unit.num_tiles() * (kSampledKeys / kStageKeys);
  const StageLoader<Traits> loader(args, shared, unit);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    loader.start(i, i * kStageKeys);
    commit_copies();
  }
  typename Traits::Rows rows(args, unit);
  int slot = 0;
#pragma unroll 1
  for (int stage = 0; stage < num_stages; ++stage) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the keys are loaded, and all warps have finished with the previous ones
    const int ahead = stage + kStages - 1;
    if (ahead < num_stages) loader.start(slot == 0 ? kStages - 1 : slot - 1, ahead * kStageKeys);
    commit_copies();
    float sums[2][Traits::Rows::kSumRows] = {};
    rows.add(shared.k[slot], stage * kStageKeys, sums);
    write_sums<Traits>(args, tables, stage, sums);
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }
  wait_for_copies<0>();
  __syncthreads();  // all warps have finished with the keys
  rows.write_weights(unit, shared.weights());
}

// Writes the rows of the block mask of a unit. The warps take them in turn.
template <class Traits>
__device__ __forceinline__ void select_unit(const SampledArgs& args, const SampledUnit& unit,
                                            typename Traits::Shared& shared, const char* tables) {
  const PairMask mask(args);
  const int pairs_per_stack = args.plan.pairs_per_stack;
  const int sink = find_sink(args.params, unit.b, unit.hp);
  for (int i = static_cast<int>(threadIdx.x) / 32; i < Traits::kStacks * pairs_per_stack;
       i += kSampledWarps) {
    const int stack = i / pairs_per_stack;
    const StackPairs pairs = unit.pairs(stack);
    if (i % pairs_per_stack >= pairs.count) continue;
    const int first_row = i % pairs_per_stack * args.plan.rows_per_pair;
    const PairSums sums{tables + stack * table_bytes(args.plan) + first_row * kSumsPerRead * 2,
                        shared.weights() + stack * kStackRows + first_row, args.plan.rows_per_pair};
    mask.write(unit, unit.pair(pairs.first + i % pairs_per_stack), sums, sink);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    select_blocks_sampled_kernel(const __grid_constant__ SampledArgs args) {
  extern __shared__ __align__(128) char raw[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(raw);
  char* tables =
      args.tables + static_cast<int64_t>(blockIdx.x) * Traits::kStacks * table_bytes(args.plan);
  int idx = static_cast<int>(blockIdx.x);
  while (idx < num_units(args)) {
    int drawn = 0;
    if (threadIdx.x == 0) drawn = atomicAdd(args.counter, 1);  // while the CTA works on this unit
    const SampledUnit unit = unit_of(args, idx);
    sum_unit<Traits>(args, unit, shared, tables);
    if (threadIdx.x == 0) shared.drawn = drawn;
    __syncthreads();  // sums, in memory, and weights are complete
    idx = static_cast<int>(gridDim.x) + shared.drawn;
    select_unit<Traits>(args, unit, shared, tables);
    __syncthreads();  // all warps have read them
  }
}

template <class Element, int kHeadDim, int kStacks>
cudaError_t launch_scores(const SampledArgs& args, cudaStream_t stream) {
  using Traits = SampledTraits<Element, kHeadDim, kStacks>;
  return launch_kernel(select_blocks_sampled_kernel<Traits>, args, args.plan.num_ctas,
                       Traits::kThreads, sizeof(typename Traits::Shared), stream);
}

}  // namespace pbs::cuda::sm80
