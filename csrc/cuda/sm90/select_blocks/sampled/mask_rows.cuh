// Turns the sums of a stack into rows of the block mask, in single warps.
#pragma once

#include "common/select_blocks/sampled/pair_mask.cuh"
#include "stack_sums.cuh"

namespace pbs::cuda::sm90 {

template <class Traits>
class SampledRowsMask {
 public:
  using Shared = typename Traits::Shared;

  __device__ SampledRowsMask(const SampledArgs& args, Shared& shared, int warp)
      : args_(args), shared_(shared), warp_(warp), mask_(args) {}

  __device__ void run() {
    const int pairs_per_stack = args_.plan.pairs_per_stack;
    DrawnUnits<Traits> walk(args_, shared_);
    while (walk.next()) {
      const SampledUnit unit = walk.unit();
      const int sink = find_sink(args_.params, unit.b, unit.hp);
      TableFull<Traits>::wait(shared_, walk.table(), walk.parity());
      for (int i = warp_; i < Traits::kStacks * pairs_per_stack; i += Traits::kSelectWarps) {
        const int stack = i / pairs_per_stack;
        const StackPairs pairs = unit.pairs(stack);
        if (i % pairs_per_stack >= pairs.count) continue;
        const int first_row = i % pairs_per_stack * args_.plan.rows_per_pair;
        const PairSums sums{table_of(args_, walk.table(), stack) + first_row * kSumsPerRead * 2,
                            shared_.weights[walk.table()][stack] + first_row,
                            args_.plan.rows_per_pair};
        const SampledPair pair = unit.pair(pairs.first + i % pairs_per_stack);
        mask_.write(unit, pair, sums, sink);
      }
      shared_.table_empty[walk.table()].arrive();
    }
  }

 private:
  const SampledArgs& args_;
  Shared& shared_;
  int warp_;
  PairMask mask_;
};

}  // namespace pbs::cuda::sm90
