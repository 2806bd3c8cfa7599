// The warpgroups that multiply sampled queries by keys.
#pragma once

#include "sm90/turns.cuh"
#include "stack_sums.cuh"

namespace pbs::cuda::sm90 {

template <class Traits>
class SampledSums {
 public:
  using Shared = typename Traits::Shared;

  __device__ SampledSums(const SampledArgs& args, Shared& shared)
      : args_(args),
        shared_(shared),
        turns_(warpgroup()),
        stack_idx_(warpgroup() / kParts),
        part_(warpgroup() % kParts) {}

  __device__ void run() {
    DrawnUnits<Traits> walk(args_, shared_);
    while (walk.next()) {
      const SampledUnit unit = walk.unit();
      const SampledStack stack = unit.stack(stack_idx_);
      const int num_seen = uniform((stack.candidate_end + kSampledKeys - 1) / kSampledKeys);
      if (num_seen > 0) load_stack(unit, walk.table());
      shared_.table_empty[walk.table()].wait(walk.parity() ^ 1);
      add_tiles(uniform(unit.num_tiles()), num_seen, uniform(stack.end_of_whole / kSampledKeys));
      if (num_seen > 0) write_weights(walk.table());
      TableFull<Traits>::arrive(shared_, walk.table());
    }
  }

 private:
  // Warpgroups that share a stack. Each works on every kParts-th tile.
  static constexpr int kParts = kSumWarpgroups / Traits::kStacks;
  using Scores = typename StackSums<Traits>::Scores;

  __device__ static int warpgroup() { return uniform(static_cast<int>(threadIdx.x) / 128); }
  __device__ void sync_stack() const { sync_barrier(kStackBarrier + stack_idx_, 128 * kParts); }

  // The copy of the stack, with all its loads in flight, and the keys that the thread's rows may
  // see.
  __device__ void load_stack(const SampledUnit& unit, int table) {
    constexpr int kThreads = 128 * kParts;
    constexpr int kAll = stack_bytes(Traits::kHeadDim) / 16;
    constexpr int kPieces = static_cast<int>(ceil_div(kAll, kThreads));
    const int64_t idx = stack_idx(args_, unit.perm_head, unit.first_stack + stack_idx_);
    const int thread = static_cast<int>(threadIdx.x) % kThreads;
    const auto* from =
        reinterpret_cast<const uint4*>(args_.stacks + idx * stack_bytes(Traits::kHeadDim));
    uint4 pieces[kPieces];
    CUTE_UNROLL
    for (int i = 0; i < kPieces; ++i) pieces[i] = from[min(i * kThreads + thread, kAll - 1)];
    sums_.start(args_.rows + idx * kStackRows, table_of(args_, table, stack_idx_));
    auto* to = reinterpret_cast<uint4*>(shared_.q[stack_idx_]);
    // A warp writes rows of other warps, which may still be at their last product of these rows.
    sync_stack();
    CUTE_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      if (kAll % kThreads == 0 || i * kThreads + thread < kAll)
        to[i * kThreads + thread] = pieces[i];
    }
    cutlass::arch::fence_view_async_shared();
    sync_stack();
  }

  // Sums over all tiles of the unit. Every warpgroup has the same number of turns. Every row sees
  // most tiles whole, and fewer stacks see the last tiles.
  __device__ __forceinline__ void add_tiles(int num_tiles, int num_seen, int num_whole) {
    int tile = part_;
    for (; tile < min(num_whole, num_seen); tile += kParts) add_tile<false>(tile);
    for (; tile < num_seen; tile += kParts) add_tile<true>(tile);
#pragma unroll 1
    for (; tile < num_tiles; tile += kParts) {
      turns_.await();
      turns_.pass_on();
      release(shared_.k_empty[wait_for_keys(tile)]);
    }
    if (tile - part_ < num_tiles) {  // others have one more
      turns_.await();
      turns_.pass_on();
    }
    num_tiles_before_ += num_tiles;
  }

  // The stage of the tile.
  __device__ __forceinline__ int wait_for_keys(int tile) {
    const uint32_t nth = num_tiles_before_ + tile;
    const auto stage = static_cast<int>(nth % Traits::kStages);
    shared_.k_full[stage].wait(nth / Traits::kStages & 1);
    return stage;
  }

  template <bool kHides>
  __device__ __forceinline__ void add_tile(int tile) {
    Scores scores = cute::partition_fragment_C(
        typename Traits::Mma{},
        cute::Shape<typename Traits::Layouts::Rows, typename Traits::Layouts::Columns>{});
    const int stage = wait_for_keys(tile);
    turns_.await();
    multiply(scores, stage);
    turns_.pass_on();  // the product of the next warpgroup waits for this one
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(scores);
    // Called by the lane that frees the stage for all.
    float scale = 0.0f;
    if (threadIdx.x % 32 == 0) {
      scale = *reinterpret_cast<const float*>(shared_.k[stage] + kSampledKeys * Traits::kHeadDim);
    }
    scale = __shfl_sync(~0u, scale, 0);
    release(shared_.k_empty[stage]);
    sums_.template add<kHides>(scores, tile, scale);
  }

  // Starts the product of the stack with the tile of keys of a stage.
  __device__ __forceinline__ void multiply(Scores& scores, int stage) {
    typename Traits::Mma mma;
    auto thread = mma.get_thread_slice(0);
    const auto as_narrow = [](char* data) {
      return cute::make_smem_ptr(reinterpret_cast<Narrow*>(data));
    };
    const cute::Tensor q = thread.partition_fragment_A(
        cute::make_tensor(as_narrow(shared_.q[stack_idx_]), typename Traits::Layouts::Stack{}));
    const cute::Tensor k = thread.partition_fragment_B(
        cute::make_tensor(as_narrow(shared_.k[uniform(stage)]), typename Traits::Layouts::Tile{}));
    start_gemm<true>(mma, q, k, scores);
  }

  __device__ void write_weights(int table) const {
    const int first_row = StackSums<Traits>::first_row();
    auto& totals = shared_.totals[stack_idx_];
    float total[kThreadRows];
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      total[r] = sums_.total(r);
      if (kParts > 1) totals[part_][first_row + 8 * r] = total[r];
    }
    if (kParts > 1) sync_stack();
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      if (kParts > 1) {
        total[r] = 0.0f;
        for (const auto& part : totals) total[r] += part[first_row + 8 * r];
      }
      if (part_ == 0) sums_.write_weight(shared_.weights[table][stack_idx_], r, total[r]);
    }
  }

  const SampledArgs& args_;
  Shared& shared_;
  Turns<kSumWarpgroups, kTurnBarrier> turns_;
  int stack_idx_;  // index in the unit
  int part_;
  StackSums<Traits> sums_;
  uint32_t num_tiles_before_ = 0;  // in earlier units
};

}  // namespace pbs::cuda::sm90
