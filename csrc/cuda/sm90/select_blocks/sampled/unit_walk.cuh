// How the units of sampled scores reach the warps of a CTA, and the shared memory of a CTA.
#pragma once

#include <cutlass/arch/barrier.h>

#include "common/select_blocks/sampled/units.cuh"
#include "layout.cuh"
#include "sm90/named_barrier.cuh"
#include "sm90/ring.cuh"
#include "sm90/warpgroup.cuh"

namespace pbs::cuda::sm90 {

template <int kHeadDim_, int kStacks_>
struct SampledTraits {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kStacks = kStacks_;  // per unit
  static constexpr int kStages = sampled_key_stages(kHeadDim);
  static constexpr int kConsumers = 128 * kSumWarpgroups;
  static constexpr int kOthers = 256;
  static constexpr int kSelectWarps = kOthers / 32 - 1;  // the remaining warp loads
  static constexpr int kThreads = kConsumers + kOthers;
  static constexpr int kOtherRegisters = 64;
  static constexpr int kConsumerRegisters = 88;
  static constexpr int kRegistersAtLaunch = 65536 / kThreads / 8 * 8;
  static_assert(kConsumers * kConsumerRegisters + kOthers * kOtherRegisters <=
                kThreads * kRegistersAtLaunch);
  using Layouts = SampledLayouts<kHeadDim>;
  using Mma = typename Layouts::Mma;
  static constexpr int kTileBytes = key_tile_bytes(kHeadDim);
  static constexpr int kStageBytes =
      static_cast<int>(ceil_div(kTileBytes, kSwizzleBytes)) * kSwizzleBytes;

  struct Shared {
    alignas(kSwizzleBytes) char q[kStacks][stack_bytes(kHeadDim)];
    alignas(kSwizzleBytes) char k[kStages][kStageBytes];
    float totals[kStacks][kSumWarpgroups / kStacks][kStackRows];
    // 1 / (sum of a row), as two equal bfloat16.
    uint32_t weights[kSampledTables][kStacks][kStackRows];
    int units[kDrawnUnits];
    cutlass::arch::ClusterTransactionBarrier k_full[kStages];
    cutlass::arch::ClusterBarrier k_empty[kStages];
    cutlass::arch::ClusterBarrier unit_full[kDrawnUnits];
    cutlass::arch::ClusterBarrier unit_empty[kDrawnUnits];
    cutlass::arch::ClusterBarrier table_full[kSampledTables];
    cutlass::arch::ClusterBarrier table_empty[kSampledTables];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + kSwizzleBytes;
  static_assert(kSharedBytes <= kSharedBytesPerCta);
};

// The units of a CTA, one after the other, for all warps except the one that draws and loads.
template <class Traits>
class DrawnUnits {
 public:
  __device__ DrawnUnits(const SampledArgs& args, typename Traits::Shared& shared)
      : args_(args), shared_(shared) {}

  // Whether there is another unit.
  __device__ bool next() {
    ++nth_;
    shared_.unit_full[ring_.stage()].wait(ring_.parity());
    idx_ = shared_.units[ring_.stage()];
    shared_.unit_empty[ring_.stage()].arrive();
    ring_.advance();
    return idx_ < num_units(args_);
  }
  __device__ SampledUnit unit() const { return unit_of(args_, idx_); }
  __device__ int table() const { return nth_ % kSampledTables; }
  __device__ uint32_t parity() const { return nth_ / kSampledTables & 1; }

 private:
  const SampledArgs& args_;
  typename Traits::Shared& shared_;
  RingState<kDrawnUnits> ring_;
  int nth_ = -1;
  int idx_ = 0;
};

// Hardware numbers of named barriers. Each name is the first of its range, and 0 is the barrier of
// all threads. They include numbers that CUTLASS reserves for itself, but it uses none of these
// here.
constexpr int kStackBarrier = 1;
constexpr int kTurnBarrier = kStackBarrier + kManyStacks;
constexpr int kTableBarrier = kTurnBarrier + kSumWarpgroups;
static_assert(kTableBarrier + kSampledTables <= 16);

// Whether the sums of a table are complete, for selecting warps. They wait long. At a barrier in
// shared memory alone, they would wake up at every change of any barrier, and take issue slots from
// the warps that multiply. So a named barrier wakes them, after the barrier that orders the data.
template <class Traits>
class TableFull {
 public:
  using Shared = typename Traits::Shared;

  __device__ static void arrive(Shared& shared, int table) {
    shared.table_full[table].arrive();
    arrive_barrier(kTableBarrier + table, kThreads);
  }
  __device__ static void wait(Shared& shared, int table, uint32_t parity) {
    sync_barrier(kTableBarrier + table, kThreads);
    shared.table_full[table].wait(parity);
  }

 private:
  static constexpr int kThreads = Traits::kThreads - 32;  // all but the warp that loads
};

// The sums of a stack of the unit.
__device__ inline char* table_of(const SampledArgs& args, int table, int stack) {
  const int64_t idx =
      (static_cast<int64_t>(blockIdx.x) * kSampledTables + table) * args.plan.stacks_per_unit +
      stack;
  return args.tables + idx * table_bytes(args.plan);
}

// Draws units from the counter of the grid and loads their keys. Runs in one warp.
template <class Traits>
class SampledLoader {
 public:
  using Shared = typename Traits::Shared;

  __device__ SampledLoader(const SampledArgs& args, Shared& shared)
      : args_(args), shared_(shared) {}

  __device__ void run() {
    for (int idx = static_cast<int>(blockIdx.x);; idx = draw()) {
      publish(idx);
      if (idx >= num_units(args_)) return;
      const SampledUnit unit = unit_of(args_, idx);
      const char* from = args_.key_tiles + static_cast<int64_t>(unit.perm_head) *
                                               args_.plan.num_tiles * Traits::kTileBytes;
      const int num_tiles = unit.num_tiles();
      for (int i = 0; i < num_tiles; ++i) load(from + static_cast<int64_t>(i) * Traits::kTileBytes);
    }
  }

 private:
  // The first units are fixed for each CTA.
  __device__ int draw() const {
    int drawn = 0;
    if (threadIdx.x % 32 == 0) drawn = atomicAdd(args_.counter, 1);
    return static_cast<int>(gridDim.x) + uniform(drawn);
  }

  __device__ void publish(int idx) {
    shared_.unit_empty[unit_.stage()].wait(unit_.parity() ^ 1);
    if (threadIdx.x % 32 == 0) {
      shared_.units[unit_.stage()] = idx;
      shared_.unit_full[unit_.stage()].arrive();
    }
    __syncwarp();
    unit_.advance();
  }

  __device__ void load(const char* from) {
    shared_.k_empty[key_.stage()].wait(key_.parity() ^ 1);
    if (cute::elect_one_sync()) {
      auto& full = shared_.k_full[key_.stage()];
      full.arrive_and_expect_tx(Traits::kTileBytes);
      cute::SM90_BULK_COPY_G2S::copy(from, reinterpret_cast<uint64_t*>(&full),
                                     shared_.k[key_.stage()], Traits::kTileBytes);
    }
    __syncwarp();
    key_.advance();
  }

  const SampledArgs& args_;
  Shared& shared_;
  RingState<kDrawnUnits> unit_;
  RingState<Traits::kStages> key_;
};

}  // namespace pbs::cuda::sm90
