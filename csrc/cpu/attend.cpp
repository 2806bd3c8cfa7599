// attend: flash attention over the selected permuted key blocks and the own segment.
#include "gemm.h"
#include "pbs/bitmask.h"
#include "stages.h"

namespace pbs::cpu::PBS_CPU_ARCH {
namespace {

constexpr int64_t kKeyTile =
    64;  // keys per pass: scores, queries and outputs of a group fit in L1/L2
constexpr float kNegInf = -__builtin_huge_valf();
constexpr float kLn2 = 0.6931471805599453f;

// Running softmax of one block of queries; every array has the queries along its last dim.
struct Tile {
  int64_t padded;  // rows rounded up to full vectors
  float* queries;  // (D, padded), times scale * log2(e)
  float* out;      // (D, padded), not yet divided by row_sum
  float* row_max;  // (padded)
  float* row_sum;  // (padded)
  float* scores;   // (kKeyTile, group)
  float* keys;     // (kKeyTile, D), used if K is not float32
  float* values;   // (kKeyTile, D), used if V is not float32
  float* rows;     // (block_size, D)
};

Tile carve(const Problem& problem, int64_t padded, int64_t block_size, float* scratch) {
  Tile tile{};
  const auto take = [&scratch](int64_t n) {
    float* start = scratch;
    scratch += n;
    return start;
  };
  tile.padded = padded;
  tile.queries = take(problem.head_dim * padded);
  tile.out = take(problem.head_dim * padded);
  tile.row_max = take(padded);
  tile.row_sum = take(padded);
  tile.scores = take(kKeyTile * kMaxVecs * kLanes);
  tile.keys = take(kKeyTile * problem.head_dim);
  tile.values = take(kKeyTile * problem.head_dim);
  tile.rows = take(block_size * problem.head_dim);
  return tile;
}

struct KeyTile {
  const float* keys;
  int64_t key_stride;
  const float* values;
  int64_t value_stride;
  int64_t num_keys;
  int64_t diagonal;  // query i of the block sees keys j <= i + diagonal of the tile
};

// Hides key `key` from the lanes of the queries before it.
template <int kVecs>
void mask_key(float* scores, int64_t first_visible_lane) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int c = 0; c < kVecs; ++c) {
    const IntVec is_hidden = (lane + c * kLanes) < static_cast<int32_t>(first_visible_lane);
    store(scores + c * kLanes, is_hidden ? splat(kNegInf) : load(scores + c * kLanes));
  }
}

// Turns scores into weights exp2(score - new max) in place. Returns the factor by which the old
// sums must shrink.
template <int kVecs>
void online_softmax(float* scores, int64_t num_keys, float* row_max, float* row_sum, Vec* rescale) {
  constexpr int64_t kStride = kVecs * kLanes;
  Vec top[kVecs];
  for (int c = 0; c < kVecs; ++c) top[c] = load(row_max + c * kLanes);
  for (int64_t key = 0; key < num_keys; ++key) {
    for (int c = 0; c < kVecs; ++c) top[c] = max(load(scores + key * kStride + c * kLanes), top[c]);
  }
  Vec base[kVecs];
  Vec total[kVecs] = {};
  for (int c = 0; c < kVecs; ++c) {
    // A row that has not seen any key keeps -inf: subtracting -inf from itself would give NaN.
    base[c] = top[c] == kNegInf ? Vec{} : top[c];
    rescale[c] = exp2_nonpositive(load(row_max + c * kLanes) - base[c]);
  }
  for (int64_t key = 0; key < num_keys; ++key) {
    for (int c = 0; c < kVecs; ++c) {
      float* score = scores + key * kStride + c * kLanes;
      const Vec weight = exp2_nonpositive(load(score) - base[c]);
      total[c] += weight;
      store(score, weight);
    }
  }
  for (int c = 0; c < kVecs; ++c) {
    store(row_max + c * kLanes, top[c]);
    store(row_sum + c * kLanes, load(row_sum + c * kLanes) * rescale[c] + total[c]);
  }
}

template <int kVecs>
void visit_group(const Tile& tile, int64_t lane, int64_t head_dim, const KeyTile& key_tile) {
  constexpr int64_t kGroup = kVecs * kLanes;
  const int64_t num_keys = smaller(key_tile.num_keys, lane + kGroup + key_tile.diagonal);
  if (num_keys <= 0) return;
  score_keys_tile<kVecs>(tile.queries + lane, tile.padded, key_tile.keys, key_tile.key_stride,
                         head_dim, num_keys, tile.scores);
  // All lanes of the group see the keys up to the position of the first lane.
  const int64_t num_open = smaller(num_keys, larger(0, lane + key_tile.diagonal + 1));
  for (int64_t key = num_open; key < num_keys; ++key) {
    mask_key<kVecs>(tile.scores + key * kGroup, key - key_tile.diagonal - lane);
  }
  Vec rescale[kVecs];
  online_softmax<kVecs>(tile.scores, num_keys, tile.row_max + lane, tile.row_sum + lane, rescale);
  accumulate_values<kVecs, false>(tile.scores, key_tile.values, key_tile.value_stride, head_dim,
                                  num_open, rescale, tile.out + lane, tile.padded);
  if (num_open == num_keys) return;
  for (int c = 0; c < kVecs; ++c) rescale[c] = splat(1.0f);
  accumulate_values<kVecs, true>(
      tile.scores + num_open * kGroup, key_tile.values + num_open * key_tile.value_stride,
      key_tile.value_stride, head_dim, num_keys - num_open, rescale, tile.out + lane, tile.padded);
}

// Adds key rows [begin, end) to the running softmax. With is_masked, a key row at position p is
// hidden from queries before p.
void visit_keys(const AttendParams& params, const Tile& tile, const ConstRows& k,
                const ConstRows& v, int64_t b, int64_t h, int64_t begin, int64_t end,
                bool is_masked, int64_t first_position) {
  const Problem& problem = params.problem;
  for (int64_t key = begin; key < end; key += kKeyTile) {
    KeyTile key_tile{};
    key_tile.num_keys = smaller(kKeyTile, end - key);
    key_tile.diagonal = is_masked ? first_position - key : problem.num_kv;
    key_tile.keys =
        float_rows(k, problem, b, h, key, key_tile.num_keys, tile.keys, &key_tile.key_stride);
    key_tile.values =
        float_rows(v, problem, b, h, key, key_tile.num_keys, tile.values, &key_tile.value_stride);
    for_each_group(tile.padded, [&](auto vecs, int64_t lane) {
      visit_group<decltype(vecs)::value>(tile, lane, problem.head_dim, key_tile);
    });
  }
}

void write_rows(const AttendParams& params, const Tile& tile, const QueryBlock& block, int64_t b,
                int64_t hq) {
  const Problem& problem = params.problem;
  const MutableRows& out = params.out;
  float* lse = params.lse + (b * problem.num_q_heads + hq) * problem.num_q + block.first_row;
  const int64_t start = b * out.batch_stride + hq * out.head_stride;
  for (int64_t r = 0; r < block.num_rows; ++r) {
    const float row_sum = tile.row_sum[r];
    const float inverse = row_sum == 0.0f ? 0.0f : 1.0f / row_sum;
    for (int64_t d = 0; d < problem.head_dim; ++d) {
      tile.rows[d] = tile.out[d * tile.padded + r] * inverse;
    }
    const int64_t row = start + (block.first_row + r) * out.row_stride;
    from_floats(tile.rows, problem.dtype,
                static_cast<char*>(out.data) + row * element_size(problem.dtype), problem.head_dim);
    lse[r] = row_sum == 0.0f ? kNegInf : (tile.row_max[r] + __builtin_log2f(row_sum)) * kLn2;
  }
}

}  // namespace

int64_t attend_scratch(const AttendParams& params) {
  const Problem& problem = params.problem;
  const int64_t padded = padded_rows(params.blocking.block_size);
  return 2 * problem.head_dim * padded + 2 * padded + kKeyTile * kMaxVecs * kLanes +
         2 * kKeyTile * problem.head_dim + params.blocking.block_size * problem.head_dim;
}

void attend_block(const AttendParams& params, int64_t item, float* scratch) {
  const Problem& problem = params.problem;
  const Blocking& blocking = params.blocking;
  const int64_t num_q_blocks = num_query_blocks(problem, blocking);
  const int64_t hq = item % problem.num_q_heads;
  const int64_t b = item / problem.num_q_heads % problem.batch;
  // Later blocks visit more keys, so they start first: no long block is left at the end.
  const int64_t q_block_idx = num_q_blocks - 1 - item / problem.num_q_heads / problem.batch;
  const int64_t hkv = hq / heads_per_kv(problem);
  const int64_t hp = hq / heads_per_perm(problem);

  const QueryBlock block = query_block(q_block_idx, problem, blocking, params.is_causal);
  const int64_t padded = padded_rows(block.num_rows);
  const Tile tile = carve(problem, padded, blocking.block_size, scratch);
  pack_queries(params.q, problem, b, hq, block.first_row, block.num_rows, padded,
               params.scale * kLog2e, tile.rows, tile.queries);
  for (int64_t i = 0; i < problem.head_dim * padded; ++i) tile.out[i] = 0.0f;
  for (int64_t i = 0; i < padded; ++i) tile.row_max[i] = kNegInf;
  for (int64_t i = 0; i < padded; ++i) tile.row_sum[i] = 0.0f;

  const int64_t num_words = num_mask_words(num_key_blocks(problem, blocking));
  const uint32_t* words =
      params.block_mask + ((b * problem.num_q_heads + hq) * num_q_blocks + q_block_idx) * num_words;
  for_each_selected(words, block.num_candidates, [&](int64_t kv_block_idx) {
    const RowPlace place = place_of(params.pages, b, kv_block_idx * blocking.kv_block_size);
    visit_keys(params, tile, params.k_perm, params.v_perm, place.b, hp, place.row,
               place.row + blocking.kv_block_size, false, 0);
  });
  const int64_t first = params.first_k_row;
  visit_keys(params, tile, params.k, params.v, b, hkv, block.own_begin - first,
             block.own_end - first, params.is_causal, block.first_position - first);
  write_rows(params, tile, block, b, hq);
}

}  // namespace pbs::cpu::PBS_CPU_ARCH
