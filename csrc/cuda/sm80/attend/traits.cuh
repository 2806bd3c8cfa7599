// Types, tile sizes and shared memory of the sm_80 attend kernel.
#pragma once

#include <cute/tensor.hpp>

#include "common/attend/draw.cuh"
#include "pbs/sm80/tile_shape.h"
#include "sm80/tile_copy.cuh"

namespace pbs::cuda::sm80 {

template <class Element_, int kHeadDim_, int kKeys_>
struct AttendTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kParts = kKeys / kPartRows;
  static_assert(kParts <= kMostParts);
  static constexpr int kWarps = attend_warps(kHeadDim);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kTileRows / (16 * kWarps);  // of 16 rows each, per warp
  static constexpr int kCtasPerSm = attend_ctas_per_sm(kHeadDim);
  using Work = AttendWork<Element>;

  // Accumulators of a row tile.
  using Scores = decltype(cute::make_tensor<float>(cute::Shape<cute::Int<kKeys / 2>>{}));
  using Output = decltype(cute::make_tensor<float>(cute::Shape<cute::Int<kHeadDim / 2>>{}));

  using QueryCopy = TileCopy<kHeadDim, kTileRows, kThreads>;
  using KeyCopy = TileCopy<kHeadDim, kKeys, kThreads>;
  using QueryRead = TileRead<kHeadDim, kTileRows>;
  using KeyRead = TileRead<kHeadDim, kKeys>;

  struct Shared {
    alignas(128) Element q[kTileRows * kHeadDim];
    alignas(128) Element k[kKeys * kHeadDim];
    alignas(128) Element v[kKeys * kHeadDim];
    // Slots of the current query block and of the next one.
    Work work[2];
    // The first permuted row of the head of each slot, in keys and in values.
    const Element* k_head[2];
    const Element* v_head[2];
    const int32_t* list[2];  // of the selected keys (key_list.cuh)
  };
  static_assert(offsetof(Shared, work) == tile_bytes(kHeadDim, kKeys));
  static_assert(kKeys > tile_keys(kHeadDim, false) ||
                kCtasPerSm * (sizeof(Shared) + kReservedBytesPerCta) <= kSmallSharedBytes);
};

}  // namespace pbs::cuda::sm80
