// Types, tile sizes and shared memory of the sm_90a attend kernel.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/gemm/collective/builders/sm90_common.inl>

#include <cstddef>
#include <cute/tensor.hpp>

#include "common/attend/draw.cuh"
#include "pbs/sm90/tile_shape.h"

namespace pbs::cuda::sm90 {

using cute::_1;
using cute::_2;
using cute::_3;
using cute::Int;
using cute::Layout;
using cute::Shape;
using cute::Step;

struct AttendArgs : DrawArgs {
  CUtensorMap q;
  CUtensorMap k;
  CUtensorMap v;
  CUtensorMap k_perm;
  CUtensorMap v_perm;
};

template <class Element_, int kHeadDim_>
struct AttendTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kTileRows;
  static constexpr int kKeys = tile_keys(kHeadDim);
  static_assert(kKeys > 0, "include/pbs/sm90/tile_shape.h must have the tiles of this head dim");
  static constexpr int kKStages = k_stages(kHeadDim);
  static constexpr int kVStages = v_stages(kHeadDim);
  static constexpr int kWorkStages = kDrawnBlocks;
  static constexpr int kQStages = q_stages(kHeadDim);
  static constexpr int kConsumerWarps = 8;
  static constexpr int kThreads = 384;
  // NOTE: the launch gives 168 registers per thread (65536 / 384, in steps of 8). If the roles ask
  // for more than 3 * 168 in total, setmaxnreg waits forever.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = (3 * 168 - kProducerRegisters) / 2;
  static constexpr int kGroupColumns = group_columns(kHeadDim);
  static constexpr int kGroups = kHeadDim / kGroupColumns;

  using QkMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 Shape<Int<kRows>, Int<kKeys>, Int<kHeadDim>>>(),
      Layout<Shape<_2, _1, _1>>{}));
  using PvMma = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 Shape<Int<kRows>, Int<kHeadDim>, Int<kKeys>>, cute::GMMA::Major::K,
                                 cute::GMMA::Major::MN>(),
      Layout<Shape<_2, _1, _1>>{}));

  template <int kNumRows>
  using RowAtom =
      decltype(cutlass::gemm::collective::detail::ss_smem_selector<cute::GMMA::Major::K, Element,
                                                                   Int<kNumRows>, Int<kHeadDim>>());
  using ColumnAtom =
      decltype(cutlass::gemm::collective::detail::ss_smem_selector<cute::GMMA::Major::MN, Element,
                                                                   Int<kHeadDim>, Int<kKeys>>());
  using LayoutQ = decltype(cute::tile_to_shape(RowAtom<kRows>{},
                                               Shape<Int<kRows>, Int<kHeadDim>, Int<kQStages>>{}));
  using LayoutK = decltype(cute::tile_to_shape(RowAtom<kKeys>{},
                                               Shape<Int<kKeys>, Int<kHeadDim>, Int<kKStages>>{}));
  // V as the second product reads it, (D, keys), in the same bytes as a K tile.
  using LayoutVt = decltype(cute::tile_to_shape(
      ColumnAtom{}, Shape<Int<kHeadDim>, Int<kKeys>, Int<kVStages>>{}, Step<_2, _1, _3>{}));

  using Work = AttendWork<Element>;

  struct SharedStorage {
    alignas(kSwizzleBytes) Element q[cute::cosize_v<LayoutQ>];
    alignas(kSwizzleBytes) Element k[cute::cosize_v<LayoutK>];
    alignas(kSwizzleBytes) Element v[cute::cosize_v<LayoutVt>];
    cutlass::arch::ClusterTransactionBarrier q_full[kQStages];
    cutlass::arch::ClusterTransactionBarrier k_full[kKStages];
    cutlass::arch::ClusterTransactionBarrier v_full[kVStages];
    cutlass::arch::ClusterBarrier q_empty[kQStages];
    cutlass::arch::ClusterBarrier k_empty[kKStages];
    cutlass::arch::ClusterBarrier v_empty[kVStages];
    cutlass::arch::ClusterBarrier work_full[kWorkStages];
    cutlass::arch::ClusterBarrier work_empty[kWorkStages];
    Work work[kWorkStages];
  };
  static_assert(offsetof(SharedStorage, q_full) == tile_bytes(kHeadDim));
  static_assert(sizeof(SharedStorage) + kSwizzleBytes <= kSharedBytesPerCta);
};

}  // namespace pbs::cuda::sm90
