// Types, tile sizes and shared memory of the sm_90a attend kernel.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/gemm/collective/builders/sm90_common.inl>

#include <cute/tensor.hpp>

#include "pbs/key_tiles.h"
#include "pbs/params.h"

namespace pbs::cuda {

using cute::_1;
using cute::_2;
using cute::_3;
using cute::Int;
using cute::Layout;
using cute::Shape;
using cute::Step;

struct AttendArgs {
  AttendParams params;
  TileOrder order;
  int32_t* tile_counter;  // one int, 0 at launch
  CUtensorMap q;
  CUtensorMap k;
  CUtensorMap v;
  CUtensorMap k_perm;
  CUtensorMap v_perm;
};

// Keys of one tile: what two stages of K and V beside Q leave room for, and no wider than the
// accumulators of one warpgroup allow.
constexpr int tile_keys(int head_dim) { return head_dim == 256 ? 64 : 128; }

// Columns of one TMA box: a row of it fills the swizzle span of 128 (or, for 96 columns, 64) bytes.
constexpr int box_columns(int head_dim) { return head_dim % 64 == 0 ? 64 : 32; }

template <class Element_, int kHeadDim_>
struct AttendTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = 128;
  static constexpr int kKeys = tile_keys(kHeadDim);
  static constexpr int kStages = 2;
  // A second Q hides its load behind the previous block's last products.
  static constexpr int kQStages = kHeadDim == 256 ? 1 : 2;
  static constexpr int kConsumerWarps = 8;
  static constexpr int kThreads = 384;
  // NOTE: 168 a thread are there at launch (65536 / 384, in steps of 8); asking for more than
  // 3 * 168 in all makes setmaxnreg wait for ever.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = (3 * 168 - kProducerRegisters) / 2;
  static constexpr int kBoxColumns = box_columns(kHeadDim);
  static constexpr int kBoxes = kHeadDim / kBoxColumns;

  using QkMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 Shape<Int<kRows>, Int<kKeys>, Int<kHeadDim>>>(),
      Layout<Shape<_2, _1, _1>>{}));
  using PvMma = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 Shape<Int<kRows>, Int<kHeadDim>, Int<kKeys>>, cute::GMMA::Major::K,
                                 cute::GMMA::Major::MN>(),
      Layout<Shape<_2, _1, _1>>{}));

  template <int kTileRows>
  using RowAtom = decltype(cutlass::gemm::collective::detail::ss_smem_selector<
                           cute::GMMA::Major::K, Element, Int<kTileRows>, Int<kHeadDim>>());
  using ColumnAtom =
      decltype(cutlass::gemm::collective::detail::ss_smem_selector<cute::GMMA::Major::MN, Element,
                                                                   Int<kHeadDim>, Int<kKeys>>());
  using LayoutQ = decltype(cute::tile_to_shape(RowAtom<kRows>{},
                                               Shape<Int<kRows>, Int<kHeadDim>, Int<kQStages>>{}));
  using LayoutK = decltype(cute::tile_to_shape(RowAtom<kKeys>{},
                                               Shape<Int<kKeys>, Int<kHeadDim>, Int<kStages>>{}));
  // V as the second product reads it, (D, keys): the same bytes that a K tile would have.
  using LayoutVt = decltype(cute::tile_to_shape(
      ColumnAtom{}, Shape<Int<kHeadDim>, Int<kKeys>, Int<kStages>>{}, Step<_2, _1, _3>{}));

  struct TileInfo {
    int32_t tile_idx;      // negative: no more work
    int32_t num_selected;  // key blocks
  };

  struct SharedStorage {
    alignas(1024) Element q[cute::cosize_v<LayoutQ>];
    alignas(1024) Element k[cute::cosize_v<LayoutK>];
    alignas(1024) Element v[cute::cosize_v<LayoutVt>];
    cutlass::arch::ClusterTransactionBarrier q_full[kQStages];
    cutlass::arch::ClusterTransactionBarrier k_full[kStages];
    cutlass::arch::ClusterTransactionBarrier v_full[kStages];
    cutlass::arch::ClusterBarrier q_empty[kQStages];
    cutlass::arch::ClusterBarrier k_empty[kStages];
    cutlass::arch::ClusterBarrier v_empty[kStages];
    cutlass::arch::ClusterBarrier info_full[kStages];
    cutlass::arch::ClusterBarrier info_empty[kStages];
    TileInfo info[kStages];
  };
};

// A place in a ring of stages and the parity that its barriers have there.
template <int kStages>
struct RingState {
  uint32_t count = 0;

  __device__ int stage() const { return static_cast<int>(count % kStages); }
  __device__ uint32_t parity() const { return count / kStages & 1; }
  __device__ void advance() { ++count; }
};

}  // namespace pbs::cuda
