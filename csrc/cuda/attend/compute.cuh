// The consumers: two warpgroups of 64 query rows each, taking turns at the tensor cores.
#pragma once

#include <cutlass/numeric_conversion.h>
#include <cute/algorithm/gemm.hpp>

#include "softmax.cuh"
#include "traits.cuh"

namespace pbs::cuda {

// Starts acc (+)= a . b on the tensor cores and returns at once.
template <bool kClears, class Mma, class A, class B, class Acc>
__device__ void start_gemm(Mma& mma, const A& a, const B& b, Acc& acc) {
  cute::warpgroup_fence_operand(acc);
  cute::warpgroup_arrive();
  mma.accumulate_ = kClears ? cute::GMMA::ScaleOut::Zero : cute::GMMA::ScaleOut::One;
  CUTE_UNROLL
  for (int i = 0; i < cute::size<2>(a); ++i) {
    cute::gemm(mma, a(cute::_, cute::_, i), b(cute::_, cute::_, i), acc);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
}

template <class Traits>
class Consumer {
 public:
  using Element = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;

  __device__ Consumer(const AttendArgs& args, Shared& shared)
      : params_(args.params),
        order_(args.order),
        shared_(shared),
        thread_(threadIdx.x - 128),
        lane_(threadIdx.x % 32),
        warpgroup_(static_cast<int>(threadIdx.x) / 128 - 1) {}

  __device__ void run() {
    // The first turn belongs to warpgroup 0.
    if (warpgroup_ == 1) pass_turn();
    while (true) {
      const typename Traits::TileInfo info = next_tile();
      if (info.tile_idx < 0) return;
      attend_tile(info);
    }
  }

 private:
  __device__ void attend_tile(const typename Traits::TileInfo& info) {
    const Problem& problem = params_.problem;
    const Blocking& blocking = params_.blocking;
    const WorkTile tile = work_tile(order_, info.tile_idx);
    const QueryBlock block =
        query_block(tile.q_block_idx, problem.num_q, problem.num_kv, blocking.block_size,
                    blocking.kv_block_size, blocking.segment_size, params_.is_causal);
    const KeyTiles tiles =
        key_tiles(block, info.num_selected, blocking.kv_block_size, Traits::kKeys);

    typename Traits::QkMma qk_mma;
    typename Traits::PvMma pv_mma;
    const cute::Tensor sQ =
        cute::make_tensor(cute::make_smem_ptr(shared_.q), typename Traits::LayoutQ{});
    const cute::Tensor sK =
        cute::make_tensor(cute::make_smem_ptr(shared_.k), typename Traits::LayoutK{});
    const cute::Tensor sVt =
        cute::make_tensor(cute::make_smem_ptr(shared_.v), typename Traits::LayoutVt{});
    auto qk_thread = qk_mma.get_thread_slice(thread_);
    auto pv_thread = pv_mma.get_thread_slice(thread_);
    const cute::Tensor tSrQ = qk_thread.partition_fragment_A(sQ);   // (MMA, 1, D / 16, stage)
    const cute::Tensor tSrK = qk_thread.partition_fragment_B(sK);   // (MMA, 1, D / 16, stage)
    const cute::Tensor tOrV = pv_thread.partition_fragment_B(sVt);  // (MMA, 1, keys / 16, stage)
    cute::Tensor tOrO =
        cute::partition_fragment_C(pv_mma, Shape<Int<Traits::kRows>, Int<Traits::kHeadDim>>{});
    cute::Tensor tSrS =
        cute::partition_fragment_C(qk_mma, Shape<Int<Traits::kRows>, Int<Traits::kKeys>>{});
    cute::Tensor tOrP = cute::make_tensor<Element>(
        pv_thread
            .partition_A(cute::make_tensor(static_cast<Element*>(nullptr),
                                           Shape<Int<Traits::kRows>, Int<Traits::kKeys>>{},
                                           cute::GenRowMajor{}))
            .layout()
            .shape());
    cute::clear(tOrO);

    const float scale_log2 = params_.scale * 1.4426950408889634f;
    Softmax softmax{scale_log2};
    float rescale[kThreadRows];
    const int row = warpgroup_ * 64 + thread_ / 32 % 4 * 16 + lane_ / 4;

    const auto mask = [&](int tile_idx) CUTLASS_LAMBDA_FUNC_INLINE {
      const int limit = visible_columns(block, tiles, tile_idx, row);
      const int next_limit = visible_columns(block, tiles, tile_idx, row + 8);
      CUTE_UNROLL
      for (int i = 0; i < cute::size(tSrS); ++i) {
        if (column_of(i, lane_) >= (row_of(i) == 0 ? limit : next_limit)) tSrS(i) = -INFINITY;
      }
    };
    const auto start_scores = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
      shared_.k_full[kv_.stage()].wait(kv_.parity());
      start_gemm<true>(qk_mma, tSrQ(cute::_, cute::_, cute::_, q_.stage()),
                       tSrK(cute::_, cute::_, cute::_, kv_.stage()), tSrS);
    };
    const auto start_values = [&](const RingState<Traits::kStages>& at) CUTLASS_LAMBDA_FUNC_INLINE {
      shared_.v_full[at.stage()].wait(at.parity());
      start_gemm<false>(pv_mma, tOrP, tOrV(cute::_, cute::_, cute::_, at.stage()), tOrO);
    };
    const auto store_weights = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
      cutlass::NumericArrayConverter<Element, float, cute::size(tSrS.layout())> convert;
      auto& weights =
          *reinterpret_cast<cutlass::Array<float, cute::size(tSrS.layout())>*>(tSrS.data());
      *reinterpret_cast<cutlass::Array<Element, cute::size(tSrS.layout())>*>(
          cute::raw_pointer_cast(tOrP.data())) = convert(weights);
    };

    shared_.q_full[q_.stage()].wait(q_.parity());
    if (tiles.total > 0) {
      start_scores();
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(tSrS);
      release(shared_.k_empty[kv_.stage()]);
      mask(0);
      softmax.fold(tSrS, rescale);
      store_weights();
      RingState<Traits::kStages> values = kv_;
      kv_.advance();
      // NOTE: whether a tile is masked is known at compile time. A branch between the two waits
      // makes ptxas pull the second one up, and the softmax no longer overlaps with P . V.
      const auto step = [&](int tile_idx, auto is_masked) CUTLASS_LAMBDA_FUNC_INLINE {
        take_turn();
        start_scores();
        start_values(values);
        pass_turn();
        cute::warpgroup_wait<1>();
        cute::warpgroup_fence_operand(tSrS);
        release(shared_.k_empty[kv_.stage()]);
        if constexpr (is_masked) mask(tile_idx);
        softmax.fold(tSrS, rescale);
        cute::warpgroup_wait<0>();
        cute::warpgroup_fence_operand(tOrO);
        release(shared_.v_empty[values.stage()]);
        values = kv_;
        kv_.advance();
        CUTE_UNROLL
        for (int i = 0; i < cute::size(tOrO); ++i) tOrO(i) *= rescale[row_of(i)];
        store_weights();
      };
      const int num_full = tiles.last_size < Traits::kKeys ? tiles.total - 1 : tiles.total;
      int tile_idx = 1;
      for (; tile_idx < tiles.num_own; ++tile_idx) step(tile_idx, cute::true_type{});
      for (; tile_idx < num_full; ++tile_idx) step(tile_idx, cute::false_type{});
      if (tile_idx < tiles.total) step(tile_idx, cute::true_type{});
      release(shared_.q_empty[q_.stage()]);
      start_values(values);
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(tOrO);
      release(shared_.v_empty[values.stage()]);
    } else {
      release(shared_.q_empty[q_.stage()]);
    }
    q_.advance();
    write_rows(tile, block, softmax, tOrO, row);
  }

  // One lane reads for its warp, so that the reader is also the one who frees the place.
  __device__ typename Traits::TileInfo next_tile() {
    shared_.info_full[info_.stage()].wait(info_.parity());
    typename Traits::TileInfo info{};
    if (lane_ == 0) {
      info = shared_.info[info_.stage()];
      shared_.info_empty[info_.stage()].arrive();
    }
    info_.advance();
    return {__shfl_sync(~0u, info.tile_idx, 0), __shfl_sync(~0u, info.num_selected, 0)};
  }

  // Columns of a tile that a row of the block sees, from the left.
  __device__ int visible_columns(const QueryBlock& block, const KeyTiles& tiles, int tile_idx,
                                 int row) const {
    if (tile_idx >= tiles.num_own) {
      return tile_idx == tiles.total - 1 ? tiles.last_size : Traits::kKeys;
    }
    const int own_size = static_cast<int>(block.own_end - block.own_begin);
    const int first_row_sees = static_cast<int>(block.first_position - block.own_begin) + 1;
    const int sees = params_.is_causal ? min(first_row_sees + row, own_size) : own_size;
    return sees - tile_idx * Traits::kKeys;
  }

  template <class Output>
  __device__ void write_rows(const WorkTile& tile, const QueryBlock& block, Softmax& softmax,
                             const Output& tOrO, int row) const {
    const Problem& problem = params_.problem;
    const MutableRows& out = params_.out;
    const int num_q_heads = static_cast<int>(problem.num_q_heads);
    float* lse = params_.lse + tile.head * problem.num_q + block.first_row;
    Element* base = static_cast<Element*>(out.data) + tile.head / num_q_heads * out.batch_stride +
                    tile.head % num_q_heads * out.head_stride + block.first_row * out.row_stride;
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const float sum = quad_sum(softmax.row_sum[r]);
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int own_row = row + 8 * r;
      if (own_row >= block.num_rows) continue;
      if (lane_ % 4 == 0) {
        const float log2_sum = softmax.row_max[r] * softmax.scale_log2 + log2f(sum);
        lse[own_row] = sum == 0.0f ? -INFINITY : log2_sum * 0.6931471805599453f;
      }
      CUTE_UNROLL
      for (int i = 2 * r; i < cute::size(tOrO); i += 4) {
        cutlass::Array<Element, 2> pair;
        pair[0] = Element(tOrO(i) * inverse);
        pair[1] = Element(tOrO(i + 1) * inverse);
        *reinterpret_cast<uint32_t*>(base + own_row * out.row_stride + column_of(i, lane_)) =
            *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
  }

  template <class Barrier>
  __device__ void release(Barrier& barrier) const {
    __syncwarp();
    if (lane_ == 0) barrier.arrive();
  }

  // While one warpgroup computes its softmax, the other has the tensor cores.
  __device__ void take_turn() const {
    cutlass::arch::NamedBarrier::sync(256, static_cast<uint32_t>(warpgroup_));
  }
  __device__ void pass_turn() const {
    cutlass::arch::NamedBarrier::arrive(256, static_cast<uint32_t>(1 - warpgroup_));
  }

  const AttendParams& params_;
  const TileOrder& order_;
  Shared& shared_;
  int thread_;
  int lane_;
  int warpgroup_;
  RingState<Traits::kQStages> q_;
  RingState<Traits::kStages> kv_;
  RingState<Traits::kStages> info_;
};

}  // namespace pbs::cuda
