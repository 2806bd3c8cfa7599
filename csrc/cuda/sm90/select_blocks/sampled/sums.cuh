// Sums of the weights that sampled queries give to keys, 32 keys each, by the warpgroups that
// multiply. Stacked queries are the rows of a product, a tile of keys its columns.
#pragma once

#include "common/exp2.cuh"
#include "unit_walk.cuh"

namespace pbs::cuda::sm90 {

// What a thread knows of its two rows. Weights are exp2(score - shift), where shift is the largest
// score of the first keys that the row saw: a later score may lie kMostGrowth powers of two above
// it. Where one lies further above, the shift is raised, and what was written shrinks.
struct SampledRows {
  static constexpr float kMostGrowth = 1.2676506e30f;  // 2^100

  float shift[kThreadRows] = {-INFINITY, -INFINITY};
  float total[kThreadRows] = {};
};

__device__ inline float low_bfloat16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_bfloat16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ inline uint32_t bfloat16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// A thread's sums of a tile.
using TileWeights = float[kSumsPerTile][kThreadRows];  // by 32 keys, and row
struct Weights {
  TileWeights sums;
  float total[kThreadRows];
};

// The sums of a quad's lanes, added up. Each lane gets two of the eight: of row lane % 2, and of
// the first or the second half of the tile, as lane / 2 % 2 says; as two bfloat16.
__device__ __forceinline__ uint32_t share_quad(const TileWeights& sums, int lane) {
  const bool is_second_half = lane & 2;
  const bool is_second_row = lane & 1;
  float halves[2][kThreadRows];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const float own = is_second_half ? sums[2 + h][r] : sums[h][r];
      const float other = is_second_half ? sums[h][r] : sums[2 + h][r];
      halves[h][r] = own + __shfl_xor_sync(~0u, other, 2);
    }
  }
  float found[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float own = is_second_row ? halves[h][1] : halves[h][0];
    const float other = is_second_row ? halves[h][0] : halves[h][1];
    found[h] = own + __shfl_xor_sync(~0u, other, 1);
  }
  return bfloat16_pair(found[0], found[1]);
}

// The tiles of a unit as one of its stacks sees them.
struct StackTiles {
  int num_own;  // of the unit; its candidates' follow
  int own_begin;
  int end_of_whole;     // of candidates that every row sees
  int first_candidate;  // in the table

  __device__ StackTiles(const SampledUnit& unit, const SampledStack& stack, const SampledPlan& plan)
      : num_own(unit.num_own_tiles()),
        own_begin(unit.own.begin),
        end_of_whole(stack.lowest_candidate / kSampledTileKeys),
        first_candidate(plan.own_tiles) {}

  __device__ int entry(int tile) const {
    return tile < num_own ? tile : first_candidate + tile - num_own;
  }
};

template <class Traits>
class SampledSums {
 public:
  using Element = typename Traits::Element;
  using Shared = typename Traits::Shared;

  __device__ SampledSums(const SampledArgs& args, Shared& shared)
      : args_(args),
        shared_(shared),
        factor_(args.params.scale * kLog2e),
        lane_(static_cast<int>(threadIdx.x) % 32),
        warpgroup_(uniform(static_cast<int>(threadIdx.x) / 128)),
        row_(row_of_thread(static_cast<int>(threadIdx.x) % 128)) {}

  __device__ void run() {
    DrawnUnits<Traits> walk(args_, shared_);
    while (walk.next()) {
      const SampledUnit unit = walk.unit();
      const SampledStack stack = unit.stack(warpgroup_);
      table_ = table_of(args_, walk.table(), warpgroup_);
      num_written_ = 0;
      rows_ = SampledRows{};
      if (stack.num_pairs > 0) load_queries(unit, stack);
      set_ranges(unit, stack);
      shared_.table_empty[walk.table()].wait(walk.parity() ^ 1);
      add_tiles(unit, stack);
      write_weights(unit, stack, walk.table());
      shared_.table_full[walk.table()].arrive();
    }
  }

 private:
  static constexpr int kBurst = 4;  // tiles
  using Scores = decltype(cute::partition_fragment_C(
      typename Traits::Mma{}, cute::Shape<typename Traits::Rows, typename Traits::Keys>{}));

  // The sampled query of a row of the stack; false where there is none.
  struct Sample {
    QueryBlock block;
    int hq;
    int row;  // in the block
    bool exists;
  };
  __device__ Sample sample_of(const SampledUnit& unit, const SampledStack& stack, int row) const {
    const int nth_pair = row / args_.plan.rows_per_pair;
    const int nth = row % args_.plan.rows_per_pair;
    Sample sample{};
    if (nth_pair >= stack.num_pairs) return sample;
    const SampledPair pair = unit.pair(stack.first_pair + nth_pair);
    sample.block = block_of(args_, pair.block_idx);
    sample.hq = pair.hq;
    const auto num_rows = static_cast<int>(sample.block.num_rows);
    const int count = num_samples_of(num_rows, args_.params.rule.num_samples);
    sample.exists = nth < count;
    sample.row = sample_row(num_rows, count, nth);
    return sample;
  }

  // Two threads a row, all their loads in flight.
  __device__ void load_queries(const SampledUnit& unit, const SampledStack& stack) {
    constexpr int kPiece = 8;
    constexpr int kPieces = Traits::kHeadDim / kPiece / 2;
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const int row = thread / 2;
    const int first_column = thread % 2 * kPiece;
    uint4 pieces[kPieces] = {};
    const Sample sample = sample_of(unit, stack, row);
    if (sample.exists) {
      const ConstRows& q = args_.params.q;
      const int64_t place = unit.b * q.batch_stride + sample.hq * q.head_stride +
                            (sample.block.first_row + sample.row) * q.row_stride + first_column;
      const char* from = static_cast<const char*>(q.data) + 2 * place;
      CUTE_UNROLL
      for (int i = 0; i < kPieces; ++i) {
        pieces[i] = *reinterpret_cast<const uint4*>(from + i * 4 * kPiece);
      }
    }
    char* to = reinterpret_cast<char*>(shared_.q + warpgroup_ * kStackRows * Traits::kHeadDim);
    CUTE_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const int column = first_column + i * 2 * kPiece;
      *reinterpret_cast<uint4*>(to + tile_offset<Traits::kGroupColumns>(kStackRows, row, column)) =
          pieces[i];
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(128, 1 + warpgroup_);
  }

  // What the thread's rows may see.
  __device__ void set_ranges(const SampledUnit& unit, const SampledStack& stack) {
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const Sample sample = sample_of(unit, stack, row_ + 8 * r);
      own_[r] = KeyRange{};
      candidate_end_[r] = 0;
      if (!sample.exists) continue;
      const QueryBlock& block = sample.block;
      const auto position = static_cast<int>(block.first_position) + sample.row;
      own_[r].begin = static_cast<int>(block.own_begin);
      own_[r].end = args_.params.is_causal ? position + 1 : static_cast<int>(block.own_end);
      candidate_end_[r] =
          static_cast<int>(block.num_candidates * args_.params.blocking.kv_block_size);
    }
  }

  // All tiles of the unit: of keys in their own order, then of candidates. Most of the candidates'
  // are seen by every row.
  __device__ __forceinline__ void add_tiles(const SampledUnit& unit, const SampledStack& stack) {
    const StackTiles tiles(unit, stack, args_.plan);
    const int num_tiles = uniform(unit.num_tiles());
    const int end_of_bursts = uniform(tiles.num_own + tiles.end_of_whole / kBurst * kBurst);
    int end = uniform(tiles.num_own);
    for (int tile = 0; tile < num_tiles; end = num_tiles) {
      // One loop for both ends: the code of a tile is long.
      for (; tile < end; ++tile) add_tile(tiles, tile);
      for (; tile < end_of_bursts; tile += kBurst) add_burst(tiles.entry(tile));
    }
  }

  // Any tile.
  __device__ __forceinline__ void add_tile(const StackTiles& tiles, int tile) {
    Scores scores = make_scores();
    multiply(scores);
    cute::warpgroup_wait<0>();
    await(scores);
    const int entry = tiles.entry(tile);
    if (!hide(scores, tiles, tile)) {
      *place_of(entry) = 0;  // the masses of own segments are those of all rows of a stack
      return;
    }
    if (__any_sync(~0u, rows_.shift[0] == -INFINITY || rows_.shift[1] == -INFINITY)) {
      raise_shifts(scores);
    }
    leave(weigh<true>(scores), entry);
  }

  // Tiles that all rows see. Two products are in work at once, so that the next one is there when
  // the weights of the last one are; over the end of a loop ptxas lets none be in work.
  __device__ __forceinline__ void add_burst(int entry) {
    Scores first = make_scores();
    Scores second = make_scores();
    multiply(first);
    multiply(second);
    CUTE_UNROLL
    for (int i = 0; i < kBurst; ++i) {
      Scores& scores = i % 2 == 0 ? first : second;
      if (i + 1 < kBurst) {
        cute::warpgroup_wait<1>();
      } else {
        cute::warpgroup_wait<0>();
      }
      await(scores);
      const Weights weights = weigh(scores);
      if (i + 2 < kBurst) multiply(scores);
      leave(weights, entry + i);
    }
  }

  // The product is there: its keys are not needed any more.
  __device__ __forceinline__ void await(Scores& scores) {
    cute::warpgroup_fence_operand(scores);
    release(shared_.k_empty[in_work_.stage()]);
    in_work_.advance();
  }

  // Whether the warp sees the tile; leaves -inf where a row does not.
  __device__ __forceinline__ bool hide(Scores& scores, const StackTiles& tiles, int tile) const {
    const int candidate = tile - tiles.num_own;
    if (candidate < 0) {
      const int begin = tiles.own_begin + tile * kSampledTileKeys;
      bool is_seen = false;
      CUTE_UNROLL
      for (const KeyRange& own : own_) {
        is_seen |= own.begin < begin + kSampledTileKeys && own.end > begin;
      }
      if (!__any_sync(~0u, is_seen)) return false;
      hide_all_but_own(scores, begin);
    } else if (candidate >= tiles.end_of_whole) {
      const int begin = candidate * kSampledTileKeys;
      if (!__any_sync(~0u, max(candidate_end_[0], candidate_end_[1]) > begin)) return false;
      hide_all_but_candidates(scores, begin);
    }
    return true;
  }

  // Keys of its own segment a row sees up to its own position.
  __device__ __forceinline__ void hide_all_but_own(Scores& scores, int begin) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      const int key = begin + column_of(i, lane_);
      const KeyRange& own = own_[row_of(i)];
      if (key < own.begin || key >= own.end) scores(i) = -INFINITY;
    }
  }

  __device__ __forceinline__ void hide_all_but_candidates(Scores& scores, int begin) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      if (begin + column_of(i, lane_) >= candidate_end_[row_of(i)]) scores(i) = -INFINITY;
    }
  }

  __device__ static Scores make_scores() {
    return cute::partition_fragment_C(typename Traits::Mma{},
                                      cute::Shape<typename Traits::Rows, typename Traits::Keys>{});
  }

  // Starts the product with the tile of keys that comes next.
  __device__ __forceinline__ void multiply(Scores& scores) {
    shared_.k_full[ring_.stage()].wait(ring_.parity());
    typename Traits::Mma mma;
    auto thread = mma.get_thread_slice(0);
    const cute::Tensor q = thread.partition_fragment_A(
        cute::make_tensor(cute::make_smem_ptr(shared_.q), typename Traits::LayoutQ{}));
    const cute::Tensor k = thread.partition_fragment_B(
        cute::make_tensor(cute::make_smem_ptr(shared_.k), typename Traits::LayoutK{}));
    start_gemm<true>(mma, q(cute::_, cute::_, cute::_, warpgroup_),
                     k(cute::_, cute::_, cute::_, uniform(ring_.stage())), scores);
    ring_.advance();
  }

  // Raises shifts where they are too low. In a tile that hides keys, some rows may go on having
  // seen nothing.
  template <bool kMayHaveSeenNothing = false>
  __device__ __forceinline__ Weights weigh(const Scores& scores) {
    float shift[kThreadRows];
    finite_shifts(shift);
    Weights weights = weigh(scores, kMayHaveSeenNothing ? shift : rows_.shift);
    bool is_lost = false;
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) is_lost |= !(weights.total[r] < SampledRows::kMostGrowth);
    if (__any_sync(~0u, is_lost)) {
      raise_shifts(scores);
      finite_shifts(shift);
      weights = weigh(scores, shift);
    }
    CUTE_UNROLL
    for (float (&sums)[kThreadRows] : weights.sums) fence_operands(sums);
    return weights;
  }

  // Gives rows that have seen nothing a finite shift too, so that exp2(-inf - shift) is 0.
  __device__ __forceinline__ void finite_shifts(float (&shift)[kThreadRows]) const {
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      shift[r] = rows_.shift[r] == -INFINITY ? 0.0f : rows_.shift[r];
    }
  }

  // Leaves the sums of a tile's weights in an entry of the table.
  __device__ __forceinline__ void leave(const Weights& weights, int entry) {
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) rows_.total[r] += weights.total[r];
    *place_of(entry) = share_quad(weights.sums, lane_);
    num_written_ = entry + 1;
  }

  __device__ __forceinline__ Weights weigh(const Scores& scores,
                                           const float (&shift)[kThreadRows]) const {
    Weights weights;
    auto& [sums, total] = weights;
    constexpr int kPerSum = cute::size(Scores{}) / kSumsPerTile;
    CUTE_UNROLL
    for (int s = 0; s < kSumsPerTile; ++s) {
      CUTE_UNROLL
      for (int i = 0; i < kPerSum; ++i) {
        const int r = row_of(i);
        const float weight = exp2_approx(__fmaf_rn(scores(s * kPerSum + i), factor_, -shift[r]));
        sums[s][r] = i < 4 && i % 2 == 0 ? weight : sums[s][r] + weight;
      }
    }
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      total[r] = (sums[0][r] + sums[1][r]) + (sums[2][r] + sums[3][r]);
    }
    return weights;
  }

  // To the maxima of what was seen, this tile included. A row that has seen nothing keeps -inf.
  __device__ __forceinline__ void raise_shifts(const Scores& scores) {
    float rescale[kThreadRows];
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      float top = -INFINITY;
      CUTE_UNROLL
      for (int i = 0; i < cute::size(scores); ++i) {
        if (row_of(i) == r) top = fmaxf(top, scores(i));
      }
      const float raised = fmaxf(rows_.shift[r], quad_max(top) * factor_);
      const bool is_new = rows_.shift[r] == -INFINITY;  // nothing but zeros was written
      rescale[r] = is_new || rows_.shift[r] == raised ? 1.0f : exp2_approx(rows_.shift[r] - raised);
      rows_.total[r] *= rescale[r];
      rows_.shift[r] = raised;
    }
    // The lane's own places: nobody else has written there.
    const float own_rescale = lane_ % 2 == 0 ? rescale[0] : rescale[1];
    if (own_rescale == 1.0f) return;
    for (int entry = 0; entry < num_written_; ++entry) {
      uint32_t* place = place_of(entry);
      const uint32_t pair = *place;
      *place = bfloat16_pair(low_bfloat16(pair) * own_rescale, high_bfloat16(pair) * own_rescale);
    }
  }

  // Where this lane writes what share_quad gives it.
  __device__ __forceinline__ uint32_t* place_of(int entry) const {
    const int row = row_ + lane_ % 2 * 8;
    return reinterpret_cast<uint32_t*>(table_) + (entry * kStackRows + row) * (kSumsPerTile / 2) +
           lane_ / 2 % 2;
  }

  __device__ void write_weights(const SampledUnit& unit, const SampledStack& stack, int table) {
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const int row = row_ + 8 * r;
      const float total = quad_sum(rows_.total[r]);
      const bool exists = sample_of(unit, stack, row).exists && total != 0.0f;
      if (lane_ % 4 == 0) shared_.weights[table][warpgroup_][row] = exists ? 1.0f / total : 0.0f;
    }
  }

  const SampledArgs& args_;
  Shared& shared_;
  float factor_;
  int lane_;
  int warpgroup_;
  int row_;
  char* table_ = nullptr;
  int num_written_ = 0;
  SampledRows rows_;
  KeyRange own_[kThreadRows];
  int candidate_end_[kThreadRows];
  RingState<Traits::kStages> ring_;
  RingState<Traits::kStages> in_work_;
};

}  // namespace pbs::cuda::sm90
