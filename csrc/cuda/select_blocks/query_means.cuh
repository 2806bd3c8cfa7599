// Means of query blocks. Of 2-byte elements, TMA brings column groups into slots and the tensor
// cores add up their rows, as the product with a matrix of ones: an instruction for 64 elements,
// where conversions and sums would take more than memory does.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

#include "../exp2.cuh"
#include "../ring.cuh"
#include "../tma.cuh"
#include "mean_rows.cuh"
#include "walk.cuh"

namespace pbs::cuda {

constexpr int kRowsPerProduct = 16;
constexpr int kColumnsPerLoad = 16;

template <class Element>
struct OnesMma;
template <>
struct OnesMma<cutlass::bfloat16_t> {
  using Mma = cute::SM80_16x8x16_F32BF16BF16F32_TN;
  static constexpr uint32_t kOnes = 0x3f803f80;
};
template <>
struct OnesMma<cutlass::half_t> {
  using Mma = cute::SM80_16x8x16_F32F16F16F32_TN;
  static constexpr uint32_t kOnes = 0x3c003c00;
};

// Loads every query block of every tile. By one warp.
template <class Element>
__device__ void load_queries(const SelectArgs& args, const SelectShared& shared) {
  const int num_groups = shared.head_dim / group_columns(shared.head_dim);
  const auto block_size = static_cast<int>(args.params.blocking.block_size);
  DynamicRingState state{args.tiles.num_slots};
  for_each_tile(args, [&](const SelectTile& tile, int) {
    for (int i = 0; i < tile.num_blocks * num_groups; ++i) {
      shared.barriers->slot_empty[state.stage].wait(state.parity ^ 1);
      if (cute::elect_one_sync()) {
        auto& full = shared.barriers->slot_full[state.stage];
        full.arrive_and_expect_tx(shared.slot_bytes);
        copy_box(args.q, full,
                 reinterpret_cast<Element*>(shared.slots + state.stage * shared.slot_bytes),
                 (tile.first_block + i / num_groups) * block_size, i % num_groups,
                 static_cast<int>(tile.hq), static_cast<int>(tile.b));
      }
      __syncwarp();
      state.advance(1);
    }
  });
}

// Calls write(column, mean) for the columns of a slot, whose sums it takes times `share`, by one
// warp. Rows that do not exist are zero.
template <class Element, int kGroupColumns, class Write>
__device__ void sum_columns(uint32_t slot, int num_rows, float share, Write write) {
  using Ones = OnesMma<Element>;
  constexpr int kPairs = kGroupColumns / kColumnsPerLoad;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int lane_row = lane % 16;
  const int lane_column = lane / 16 * 8;
  const uint32_t ones = Ones::kOnes;
  // 16 rows further on, the swizzle is the same.
  uint32_t from[kPairs];
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    from[pair] =
        slot + tile_offset<kGroupColumns>(num_rows, lane_row, pair * kColumnsPerLoad + lane_column);
  }
  float sums[kPairs][2][4] = {};
#pragma unroll 2
  for (int row = 0; row < num_rows; row += kRowsPerProduct) {
    uint32_t x[kPairs][4];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      asm volatile("ldmatrix.sync.aligned.x4.trans.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[pair][0]), "=r"(x[pair][1]), "=r"(x[pair][2]), "=r"(x[pair][3])
                   : "r"(from[pair] + row * 2 * kGroupColumns)
                   : "memory");
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float (&sum)[4] = sums[pair][half];
        Ones::Mma::fma(sum[0], sum[1], sum[2], sum[3], ones, ones, ones, ones, x[pair][2 * half],
                       x[pair][2 * half + 1], sum[0], sum[1], sum[2], sum[3]);
      }
    }
  }
  // All rows of the products are alike.
  if (lane >= 4) return;
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = pair * kColumnsPerLoad + half * 8 + lane * 2;
      write(column, sums[pair][half][0] * share);
      write(column + 1, sums[pair][half][1] * share);
    }
  }
}

// The mean queries of a tile, times what makes of their products logits in powers of two. By
// kMeanWarps warps, which take slots in turn.
template <class Element>
class QueryMeans {
 public:
  __device__ QueryMeans(const SelectArgs& args, const SelectShared& shared, int warp)
      : args_(args),
        shared_(shared),
        warp_(warp),
        factor_(args.params.scale * kLog2e),
        slot_{args.tiles.num_slots} {
    slot_.advance(warp);
  }

  __device__ void add_tile(const SelectTile& tile, const SplitQueries& means) {
    if constexpr (std::is_same_v<Element, float>) {
      average_from_memory(tile, means);
    } else {
      average_slots(tile, means);
    }
  }

 private:
  __device__ void average_from_memory(const SelectTile& tile, const SplitQueries& means) {
    const ConstRows& rows = args_.params.q;
    const auto* q = static_cast<const float*>(rows.data) + tile.b * rows.batch_stride +
                    tile.hq * rows.head_stride;
    for (int r = warp_; r < tile.num_blocks; r += kMeanWarps) {
      const QueryBlock block = describe(args_, tile, r);
      const int first = r * query_stride(shared_.head_dim);
      mean_rows(q, rows.row_stride, block.first_row, block.first_row + block.num_rows,
                shared_.head_dim, factor_, [&](int d, float x) { means.write(first + d, x); });
    }
  }

  __device__ void average_slots(const SelectTile& tile, const SplitQueries& means) {
    const int columns = group_columns(shared_.head_dim);
    const int num_groups = shared_.head_dim / columns;
    const int num_loaded = tile.num_blocks * num_groups;
    const auto block_size = static_cast<int>(args_.params.blocking.block_size);
    for (; nth_ < num_loaded; nth_ += kMeanWarps, slot_.advance(kMeanWarps)) {
      const int r = nth_ / num_groups;
      const float share = factor_ / static_cast<float>(describe(args_, tile, r).num_rows);
      const int first = r * query_stride(shared_.head_dim) + nth_ % num_groups * columns;
      const auto write = [&](int column, float x) { means.write(first + column, x); };
      const uint32_t slot =
          cute::cast_smem_ptr_to_uint(shared_.slots) + slot_.stage * shared_.slot_bytes;
      shared_.barriers->slot_full[slot_.stage].wait(slot_.parity);
      if (columns == 64) {
        sum_columns<Element, 64>(slot, block_size, share, write);
      } else {
        sum_columns<Element, 32>(slot, block_size, share, write);
      }
      release(shared_.barriers->slot_empty[slot_.stage]);
    }
    nth_ -= num_loaded;  // in the next tile
  }

  const SelectArgs& args_;
  const SelectShared& shared_;
  int warp_;
  float factor_;
  DynamicRingState slot_;
  int nth_ = warp_;  // of the slots of the tile
};

}  // namespace pbs::cuda
