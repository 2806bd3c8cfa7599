// The consumers: two warpgroups of 64 query rows each, which use the tensor cores in turn.
#pragma once

#include <cutlass/numeric_conversion.h>

#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

#include "common/attend/softmax.cuh"
#include "epilogue.cuh"
#include "operands.cuh"
#include "sm90/warpgroup.cuh"
#include "work.cuh"

namespace pbs::cuda::sm90 {

// A consumer works on one tile of keys after the other, across query blocks: the first product of a
// block overlaps with the last one of the previous block.
template <class Traits>
class Consumer {
 public:
  using Element = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;

  __device__ Consumer(const AttendArgs& args, Shared& shared)
      : params_(args.params),
        shared_(shared),
        reader_(shared),
        lane_(threadIdx.x % 32),
        warpgroup_(static_cast<int>(threadIdx.x) / 128 - 1),
        row_(row_of_thread(static_cast<int>(threadIdx.x) - 128)) {}

  __device__ void run() {
    // The first turn belongs to warpgroup 0.
    if (warpgroup_ == 1) pass_turn();
    int num_tiles = reader_.next().tiles.total;
    if (num_tiles < 0) return;
    auto t = make_operands<Traits>(shared_, warpgroup_, params_.scale * kLog2e);

    shared_.q_full[q_.stage()].wait(q_.parity());
    shared_.k_full[k_.stage()].wait(k_.parity());
    take_turn();
    start_scores(t);
    pass_turn();
    cute::warpgroup_wait<0>();
    take_first_tile(t);
    while (true) {
      cute::clear(t.tOrO);
      round_weights(t);
      fold_tiles(t, num_tiles);
      release(shared_.q_empty[q_.stage()]);
      q_.advance();
      const bool has_older = num_tiles > 1;
      num_tiles = reader_.next().tiles.total;
      if (num_tiles < 0) {
        start_values(t);
        cute::warpgroup_wait<0>();
        cute::warpgroup_fence_operand(t.tOrO);
        write_rows<Traits>(params_, reader_.previous(), t.softmax, t.tOrO);
        return;
      }
      shared_.q_full[q_.stage()].wait(q_.parity());
      start_both(t, has_older);
      const Softmax done = t.softmax;
      t.softmax = Softmax{done.scale_log2};
      take_first_tile(t);
      release(shared_.v_empty[v_.previous().stage()]);
      write_rows<Traits>(params_, reader_.previous(), done, t.tOrO);
      reader_.free_previous();
    }
  }

 private:
  template <class Operands>
  CUTLASS_DEVICE void start_scores(Operands& t) {
    // The address of Q, recomputed each time. Otherwise values that depend on it would stay in
    // registers through the loop, which D=256 lacks.
    Element* q = shared_.q;
    asm volatile("" : "+l"(q));
    const cute::Tensor tSrQ = t.qk_thread.partition_fragment_A(cute::make_tensor(
        cute::make_smem_ptr(q), typename Traits::LayoutQ{}));  // (MMA, 1, D / 16, stage)
    start_gemm<true>(t.qk_mma, tSrQ(cute::_, cute::_, cute::_, uniform(q_.stage())),
                     t.tSrK(cute::_, cute::_, cute::_, uniform(k_.stage())), t.tSrS);
  }

  template <class Operands>
  CUTLASS_DEVICE void start_values(Operands& t) {
    start_gemm<false>(t.pv_mma, t.tOrP, t.tOrV(cute::_, cute::_, cute::_, uniform(v_.stage())),
                      t.tOrO);
  }

  // Computes the scores of the next tile and weights times values of this tile at the same time.
  template <class Operands>
  CUTLASS_DEVICE void start_both(Operands& t, bool has_older) {
    shared_.k_full[k_.stage()].wait(k_.parity());
    cute::warpgroup_arrive();  // otherwise ptxas puts the conversion to weights after the turn
    take_turn();
    start_scores(t);
    start_values(t);
    pass_turn();
    if (has_older) release(shared_.v_empty[v_.previous().stage()]);
    v_.advance();
  }

  // All tiles of a query block except the first.
  template <class Operands>
  CUTLASS_DEVICE void fold_tiles(Operands& t, int num_tiles) {
    const int num_masked = reader_.current().tiles.num_masked;
    int tile_idx = 1;
    for (; tile_idx < num_masked; ++tile_idx) {
      start_both(t, tile_idx > 1);
      fold_tile(t, tile_idx, cute::true_type{});
    }
    if (tile_idx >= num_tiles) return;
    // The branch of the loop comes after start_both, where it costs no time.
    start_both(t, tile_idx > 1);
    while (true) {
      fold_tile(t, tile_idx, cute::false_type{});
      if (++tile_idx == num_tiles) break;
      start_both(t, true);
    }
  }

  template <class Operands, class IsMasked>
  CUTLASS_DEVICE void fold_tile(Operands& t, int tile_idx, IsMasked is_masked) {
    bool rescales = false;
    take_scores(t);
    if constexpr (is_masked) {
      release_keys();
      t.softmax.add(weigh_masked(t, tile_idx, rescales));
    } else {
      t.softmax.add(weigh(t, rescales));
      release_keys();
    }
    take_values(t);
    round_weights(t);
    if (rescales) {
      CUTE_UNROLL
      for (int i = 0; i < cute::size(t.tOrO); ++i) t.tOrO(i) *= t.rescale[row_of(i)];
    }
  }

  template <class Operands>
  CUTLASS_DEVICE void take_first_tile(Operands& t) {
    bool rescales = false;  // there is nothing to rescale yet
    take_scores(t);
    release_keys();
    t.softmax.add(weigh_masked(t, 0, rescales));
    take_values(t);
  }

  template <class Operands>
  CUTLASS_DEVICE void take_scores(Operands& t) {
    cute::warpgroup_wait<1>();
    cute::warpgroup_fence_operand(t.tSrS);
  }

  // NOTE: ptxas moves a wait to the top of its basic block. The wait for a barrier is a loop. The
  // exponentials before it stay there, and overlap with P . V. Read the SASS after a change.
  template <class Operands>
  CUTLASS_DEVICE void take_values(Operands& t) {
    cute::warpgroup_fence_operand(t.tSrS);
    shared_.v_full[v_.stage()].wait(v_.parity());
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(t.tOrO);
  }

  CUTLASS_DEVICE void release_keys() {
    release(shared_.k_empty[k_.stage()]);
    k_.advance();
  }

  // Weights of the first tile, or of a tile that some rows see only in part: uses exact maxima.
  template <class Operands>
  CUTLASS_DEVICE TileSums weigh_masked(Operands& t, int tile_idx, bool& rescales) {
    mask(t.tSrS, tile_idx);
    rescales = t.softmax.raise(t.tSrS, t.rescale);
    return t.softmax.weigh_any(t.tSrS);
  }

  // Weights of any other tile: computed at once, relative to the known maxima. If their sums show
  // that a score is far above these, the weights are rescaled. If they are out of range, the scores
  // are computed again.
  template <class Operands>
  CUTLASS_DEVICE TileSums weigh(Operands& t, bool& rescales) {
    TileSums sums = t.softmax.weigh(t.tSrS);
    rescales = Softmax::outgrow(sums);
    if (rescales) {
      if (Softmax::is_lost(sums)) {
        recompute_scores(t.tSrS);
        rescales = t.softmax.raise(t.tSrS, t.rescale);
        sums = t.softmax.weigh_any(t.tSrS);
      } else {
        t.softmax.shrink(t.tSrS, sums, t.rescale);
      }
    }
    return sums;
  }

  template <class Operands>
  CUTLASS_DEVICE static void round_weights(Operands& t) {
    constexpr int kSize = cute::size(decltype(t.tSrS.layout()){});
    cutlass::NumericArrayConverter<Element, float, kSize> convert;
    auto& weights = *reinterpret_cast<cutlass::Array<float, kSize>*>(t.tSrS.data());
    *reinterpret_cast<cutlass::Array<Element, kSize>*>(cute::raw_pointer_cast(t.tOrP.data())) =
        convert(weights);
    fence_weights(t.tOrP);
  }

  // The weights are complete here, before the wait for a turn, and not at their first use.
  template <class Weights>
  __device__ static void fence_weights(Weights& tOrP) {
    auto words = cute::recast<uint32_t>(tOrP);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(words); ++i) asm volatile("" : "+r"(words(i))::"memory");
  }

  template <class Scores>
  __device__ void mask(Scores& tSrS, int tile_idx) const {
    const KeyTiles& tiles = reader_.current().tiles;
    // Compares with constants, counted from the first column of this lane.
    const int limit = visible_keys(tiles, tile_idx, row_, Traits::kKeys) - column_of(0, lane_);
    const int next_limit =
        visible_keys(tiles, tile_idx, row_ + 8, Traits::kKeys) - column_of(0, lane_);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tSrS); ++i) {
      if (column_of(i, 0) >= (row_of(i) == 0 ? limit : next_limit)) tSrS(i) = -INFINITY;
    }
  }

  // S = Q . K^T of this warp's rows again, with products that a single warp can issue. They have
  // the accumulator layout of the warpgroup.
  template <class Scores>
  __device__ void recompute_scores(Scores& tSrS) const {
    using Mma = std::conditional_t<std::is_same_v<Element, cutlass::half_t>,
                                   cute::SM80_16x8x16_F32F16F16F32_TN,
                                   cute::SM80_16x8x16_F32BF16BF16F32_TN>;
    constexpr int kEightRows = 8 * Traits::kGroupColumns * 2;
    const int thread = read_thread();
    const int row = thread % 32 / 4;
    const uint32_t q =
        cute::cast_smem_ptr_to_uint(shared_.q + q_.stage() * Traits::kRows * Traits::kHeadDim);
    const uint32_t k =
        cute::cast_smem_ptr_to_uint(shared_.k + k_.stage() * Traits::kKeys * Traits::kHeadDim);
    cute::clear(tSrS);
    CUTE_NO_UNROLL
    for (int column = thread % 4 * 2; column < Traits::kHeadDim; column += 16) {
      const int q_row = thread / 32 * 16 - 64 + row;
      const uint32_t q_left = q + tile_offset<Traits::kGroupColumns>(Traits::kRows, q_row, column);
      const uint32_t q_right =
          q + tile_offset<Traits::kGroupColumns>(Traits::kRows, q_row, column + 8);
      const uint32_t a[] = {load_pair(q_left), load_pair(q_left + kEightRows), load_pair(q_right),
                            load_pair(q_right + kEightRows)};
      const uint32_t k_left = k + tile_offset<Traits::kGroupColumns>(Traits::kKeys, row, column);
      const uint32_t k_right =
          k + tile_offset<Traits::kGroupColumns>(Traits::kKeys, row, column + 8);
      CUTE_UNROLL
      for (int i = 0; i < cute::size(tSrS); i += 4) {
        const uint32_t b[] = {load_pair(k_left + i / 4 * kEightRows),
                              load_pair(k_right + i / 4 * kEightRows)};
        Mma::fma(tSrS(i), tSrS(i + 1), tSrS(i + 2), tSrS(i + 3), a[0], a[1], a[2], a[3], b[0], b[1],
                 tSrS(i), tSrS(i + 1), tSrS(i + 2), tSrS(i + 3));
      }
    }
  }

  // In program order, so that few are in flight: registers are scarce here, and time is not.
  __device__ static uint32_t load_pair(uint32_t address) {
    uint32_t pair;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(address));
    return pair;
  }

  // While one warpgroup computes its softmax, the other uses the tensor cores.
  __device__ void take_turn() const {
    cutlass::arch::NamedBarrier::sync(256, static_cast<uint32_t>(warpgroup_));
  }
  __device__ void pass_turn() const {
    cutlass::arch::NamedBarrier::arrive(256, static_cast<uint32_t>(1 - warpgroup_));
  }

  const AttendParams& params_;
  Shared& shared_;
  WorkReader<Traits> reader_;
  int lane_;
  int warpgroup_;
  int row_;
  RingState<Traits::kQStages> q_;
  RingState<Traits::kKStages> k_;
  RingState<Traits::kVStages> v_;  // the next product with V
};

}  // namespace pbs::cuda::sm90
