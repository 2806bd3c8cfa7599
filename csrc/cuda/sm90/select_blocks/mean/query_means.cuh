// Means of query blocks. For 2-byte elements, TMA loads column groups into slots, and the tensor
// cores sum their rows as the product of the transposed group with a matrix of ones. All columns of
// the result are equal, but this is still faster than conversions and additions.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <type_traits>

#include "common/exp2.cuh"
#include "common/select_blocks/mean/mean_rows.cuh"
#include "pbs/key_tiles.h"
#include "sm90/ring.cuh"
#include "sm90/tma.cuh"
#include "sm90/warpgroup.cuh"
#include "tile_walk.cuh"

namespace pbs::cuda::sm90 {

// Loads all query blocks of all tiles of a CTA, one slot after the other. Runs in one warp.
template <class Element, int kHeadDim>
class QueryLoads {
 public:
  __device__ QueryLoads(const SelectArgs& args, const SelectShared<kHeadDim>& shared)
      : args_(args), shared_(shared), walk_(args), slot_{args.tiles.num_slots} {
    enter_tile();
  }

  __device__ void start_next() {
    if (rows_left_ == 0) return;
    shared_.barriers->slot_empty[slot_.stage].wait(slot_.parity ^ 1);
    if (cute::elect_one_sync()) {
      auto& full = shared_.barriers->slot_full[slot_.stage];
      full.arrive_and_expect_tx(shared_.slot_bytes);
      copy_box(args_.q, full,
               reinterpret_cast<Element*>(shared_.slots + slot_.stage * shared_.slot_bytes), row_,
               group_, head_, batch_);
    }
    __syncwarp();
    slot_.advance(1);
    group_ += query_slot_columns(kHeadDim) / group_columns(kHeadDim);
    if (group_ < kHeadDim / group_columns(kHeadDim)) return;
    group_ = 0;
    row_ += static_cast<int>(args_.params.blocking.block_size);
    if (--rows_left_ > 0) return;
    walk_.advance();
    enter_tile();
  }

 private:
  __device__ void enter_tile() {
    if (walk_.is_done()) return;
    const SelectTile tile = walk_.tile();
    row_ = tile.first_block * static_cast<int>(args_.params.blocking.block_size);
    rows_left_ = tile.num_blocks;
    head_ = static_cast<int>(tile.hq);
    batch_ = static_cast<int>(tile.b);
  }

  const SelectArgs& args_;
  const SelectShared<kHeadDim>& shared_;
  TileWalk walk_;
  DynamicRingState slot_;
  // The next block to load.
  int row_ = 0;
  int group_ = 0;
  int head_ = 0;
  int batch_ = 0;
  int rows_left_ = 0;  // query blocks left in the tile
};

// The product that sums the columns of a slot: 64 columns are its rows.
template <class Element, int kHeadDim>
class ColumnSums {
 public:
  static constexpr int kGroupColumns = group_columns(kHeadDim);
  static constexpr int kGroups = query_slot_columns(kHeadDim) / kGroupColumns;
  static constexpr int kSums = 4;  // per thread: two columns, twice

  __device__ explicit ColumnSums(const SelectShared<kHeadDim>& shared)
      : slots_(cute::GMMA::make_gmma_desc<cute::GMMA::Major::MN>(
            tensor_of(reinterpret_cast<const Element*>(shared.slots), layout()))),
        ones_(cute::GMMA::make_gmma_desc<cute::GMMA::Major::K>(
            tensor_of(static_cast<const Element*>(shared.ones), Ones{}))) {}

  // Sums the rows of the slot that starts `slot` bytes after the first one.
  __device__ void compute(uint32_t slot, int num_rows, float (&sums)[kGroups][kSums]) const {
    constexpr uint32_t kRowBytes = 2 * kGroupColumns;
    for (int row = 0; row < num_rows; row += kAtOnce * kRows) {
      fence(sums);
      cute::warpgroup_arrive();
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          float (&sum)[kSums] = sums[group];
          Op::fma(slots_.at(slot + (group * num_rows + row + i * kRows) * kRowBytes), ones_.at(0),
                  sum[0], sum[1], sum[2], sum[3],
                  row + i == 0 ? cute::GMMA::ScaleOut::Zero : cute::GMMA::ScaleOut::One);
        }
      }
      cute::warpgroup_commit_batch();
    }
    cute::warpgroup_wait<0>();
    fence(sums);
  }

 private:
  static constexpr int kRows = 16;   // rows of the slot per product
  static constexpr int kAtOnce = 2;  // products at once; a query block has at least 32 rows
  using Op = decltype(cute::GMMA::ss_op_selector<Element, Element, float,
                                                 cute::Shape<cute::_64, cute::_8, cute::Int<kRows>>,
                                                 cute::GMMA::Major::MN, cute::GMMA::Major::K>());
  using Ones = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_INTER_Atom<Element>{},
                                            cute::Shape<cute::_8, cute::Int<kRows>>{}));
  static_assert(cute::cosize_v<Ones> * sizeof(Element) == kOnesBytes);

  // (64, kRows). A group narrower than a product is read twice.
  __device__ static auto layout() {
    using Atom = std::conditional_t<kGroupColumns == 64, cute::GMMA::Layout_MN_SW128_Atom<Element>,
                                    cute::GMMA::Layout_MN_SW64_Atom<Element>>;
    const auto once =
        cute::tile_to_shape(Atom{}, cute::Shape<cute::Int<kGroupColumns>, cute::Int<kRows>>{});
    const auto plain = once.layout_b();
    return cute::make_composed_layout(
        once.layout_a(), once.offset(),
        cute::make_layout(
            cute::make_layout(cute::get<0>(plain),
                              cute::Layout<cute::Int<64 / kGroupColumns>, cute::_0>{}),
            cute::get<1>(plain)));
  }

  template <class Layout>
  __device__ static auto tensor_of(const Element* first, const Layout& layout) {
    return cute::make_tensor(cute::make_smem_ptr(first), layout);
  }

  __device__ static void fence(float (&sums)[kGroups][kSums]) {
#pragma unroll
    for (float (&sum)[kSums] : sums) fence_operands(sum);
  }

  OperandDescriptor slots_;
  OperandDescriptor ones_;
};

// The mean queries of a tile, scaled so that their logits are powers of two. Runs in a warpgroup.
template <class Element, int kHeadDim>
class QueryMeans {
 public:
  __device__ QueryMeans(const SelectArgs& args, const SelectShared<kHeadDim>& shared)
      : args_(args),
        shared_(shared),
        thread_(static_cast<int>(threadIdx.x) % 128),
        factor_(args.params.scale * kLog2e),
        loads_(args, shared),
        slot_{args.tiles.num_slots} {
    if constexpr (!std::is_same_v<Element, float>) {
      // The last slot is loaded while the first one is averaged.
      for (int i = 1; i < args.tiles.num_slots && thread_ < 32; ++i) loads_.start_next();
    }
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
    for (int r = thread_ / 32; r < tile.num_blocks; r += kMeanWarps) {
      const QueryBlock block = block_of(args_, tile, r);
      mean_rows(q, rows.row_stride, block.first_row, block.first_row + block.num_rows, kHeadDim,
                factor_, [&](int d, float x) { means.write(r, d, x); });
    }
  }

  // Rows of a slot that do not exist are zero.
  __device__ void average_slots(const SelectTile& tile, const SplitQueries& means) {
    using Sums = ColumnSums<Element, kHeadDim>;
    const Sums columns(shared_);
    const auto block_size = static_cast<int>(args_.params.blocking.block_size);
    const auto num_q = static_cast<int>(args_.params.problem.num_q);
    // The threads of a quad have the same two columns of each group.
    const int nth = thread_ % 4;
    const int column = row_of_thread(thread_) + nth * 8;
    const bool writes = nth < kThreadRows && column < Sums::kGroupColumns;
    for (int r = 0; r < tile.num_blocks; ++r) {
      const int num_rows = min(block_size, num_q - (tile.first_block + r) * block_size);
      const float share = factor_ / static_cast<float>(num_rows);
      for (int first = 0; first < kHeadDim; first += query_slot_columns(kHeadDim)) {
        // Loads into the slot that was averaged before this one: all warps have finished it, or are
        // about to.
        if (thread_ < 32) loads_.start_next();
        shared_.barriers->slot_full[slot_.stage].wait(slot_.parity);
        float sums[Sums::kGroups][Sums::kSums] = {};
        columns.compute(slot_.stage * shared_.slot_bytes, block_size, sums);
        release(shared_.barriers->slot_empty[slot_.stage]);
        slot_.advance(1);
        if (!writes) continue;
#pragma unroll
        for (int group = 0; group < Sums::kGroups; ++group) {
          means.write(r, first + group * Sums::kGroupColumns + column,
                      (nth == 0 ? sums[group][0] : sums[group][2]) * share);
        }
      }
    }
  }

  const SelectArgs& args_;
  const SelectShared<kHeadDim>& shared_;
  int thread_;
  float factor_;
  QueryLoads<Element, kHeadDim> loads_;
  DynamicRingState slot_;
};

}  // namespace pbs::cuda::sm90
