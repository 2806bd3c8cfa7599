// score_keys: how much attention the last block of queries gives each key of the complete segments.
//
// The scores are computed twice: first for the maximum and the sum of each query over all keys,
// then for the weights. Recomputing 128 rows is cheaper than storing 128 x Nkv scores.
#include "gemm.h"
#include "pbs/geometry.h"
#include "stages.h"

namespace pbs::cpu::PBS_CPU_ARCH {
namespace {

constexpr int64_t kKeyTile = 64;
constexpr float kNegInf = -__builtin_huge_valf();

// Packed queries of one head and the tiles of one chunk of keys.
struct Chunk {
  int64_t num_rows;
  int64_t padded;
  int64_t begin;
  int64_t end;
  float* queries;  // (D, padded), times scale * log2(e)
  float* scores;   // (kKeyTile, group)
  float* keys;     // (kKeyTile, D), used if K is not float32
  float* rows;     // (num_rows, D), used if Q is not float32
  float* row_max;  // (padded)
  float* row_sum;  // (padded), or its inverse
};

Chunk carve(const ScoreKeysParams& params, int64_t chunk_idx, float* scratch) {
  const Problem& problem = params.problem;
  Chunk chunk{};
  chunk.num_rows = num_score_rows(problem, params.blocking);
  chunk.padded = padded_rows(chunk.num_rows);
  chunk.begin = chunk_idx * kScoreChunk;
  chunk.end = smaller(chunk.begin + kScoreChunk, num_scored_keys(params));
  chunk.queries = scratch;
  chunk.scores = chunk.queries + problem.head_dim * chunk.padded;
  chunk.keys = chunk.scores + kKeyTile * kMaxVecs * kLanes;
  chunk.rows = chunk.keys + kKeyTile * problem.head_dim;
  chunk.row_max = chunk.rows + chunk.num_rows * problem.head_dim;
  chunk.row_sum = chunk.row_max + chunk.padded;
  return chunk;
}

void pack(const ScoreKeysParams& params, const Chunk& chunk, int64_t b, int64_t hq) {
  pack_queries(params.q, params.problem, b, hq, params.problem.num_q - chunk.num_rows,
               chunk.num_rows, chunk.padded, params.scale * kLog2e, chunk.rows, chunk.queries);
}

// Calls visit(vecs, lane, key, num_keys) with the scores of each (key tile, query group).
template <class Visit>
void for_each_tile(const ScoreKeysParams& params, const Chunk& chunk, int64_t b, int64_t hkv,
                   Visit&& visit) {
  const int64_t head_dim = params.problem.head_dim;
  for (int64_t key = chunk.begin; key < chunk.end; key += kKeyTile) {
    const int64_t num_keys = smaller(kKeyTile, chunk.end - key);
    int64_t stride = 0;
    const float* keys =
        float_rows(params.k, params.problem, b, hkv, key, num_keys, chunk.keys, &stride);
    for_each_group(chunk.padded, [&](auto vecs, int64_t lane) {
      score_keys_tile<decltype(vecs)::value>(chunk.queries + lane, chunk.padded, keys, stride,
                                             head_dim, num_keys, chunk.scores);
      visit(vecs, lane, key, num_keys);
    });
  }
}

template <int kVecs>
void fold_max_sum(const Chunk& chunk, int64_t lane, int64_t num_keys) {
  constexpr int64_t kStride = kVecs * kLanes;
  for (int c = 0; c < kVecs; ++c) {
    const float* scores = chunk.scores + c * kLanes;
    float* row_max = chunk.row_max + lane + c * kLanes;
    float* row_sum = chunk.row_sum + lane + c * kLanes;
    const Vec old_max = load(row_max);
    Vec top = old_max;
    for (int64_t key = 0; key < num_keys; ++key) top = max(load(scores + key * kStride), top);
    Vec total{};
    for (int64_t key = 0; key < num_keys; ++key) {
      total += exp2_nonpositive(load(scores + key * kStride) - top);
    }
    store(row_max, top);
    store(row_sum, load(row_sum) * exp2_nonpositive(old_max - top) + total);
  }
}

}  // namespace

int64_t score_scratch(const ScoreKeysParams& params) {
  const int64_t num_rows = num_score_rows(params.problem, params.blocking);
  const int64_t padded = padded_rows(num_rows);
  return params.problem.head_dim * (padded + kKeyTile + num_rows) + kKeyTile * kMaxVecs * kLanes +
         2 * padded + kScoreChunk;
}

void score_chunk(const ScoreKeysParams& params, const ScoreStates& states, int64_t item,
                 float* scratch) {
  const Problem& problem = params.problem;
  const int64_t num_chunks = ceil_div(num_scored_keys(params), kScoreChunk);
  const int64_t head = item / num_chunks;
  const int64_t hq = head % problem.num_q_heads;
  const int64_t b = head / problem.num_q_heads;
  const Chunk chunk = carve(params, item % num_chunks, scratch);
  pack(params, chunk, b, hq);
  for (int64_t i = 0; i < chunk.padded; ++i) chunk.row_max[i] = kNegInf;
  for (int64_t i = 0; i < chunk.padded; ++i) chunk.row_sum[i] = 0.0f;
  const int64_t hkv = hq / heads_per_kv(problem);
  for_each_tile(params, chunk, b, hkv, [&](auto vecs, int64_t lane, int64_t, int64_t num_keys) {
    fold_max_sum<decltype(vecs)::value>(chunk, lane, num_keys);
  });
  std::memcpy(states.row_max + item * chunk.num_rows, chunk.row_max,
              chunk.num_rows * sizeof(float));
  std::memcpy(states.row_sum + item * chunk.num_rows, chunk.row_sum,
              chunk.num_rows * sizeof(float));
}

void score_merge(const ScoreKeysParams& params, const ScoreStates& states, int64_t item, float*) {
  const int64_t num_rows = num_score_rows(params.problem, params.blocking);
  const int64_t num_chunks = ceil_div(num_scored_keys(params), kScoreChunk);
  float* row_max = states.row_max + item * num_chunks * num_rows;
  float* row_sum = states.row_sum + item * num_chunks * num_rows;
  for (int64_t r = 0; r < num_rows; ++r) {
    float top = row_max[r];
    for (int64_t c = 1; c < num_chunks; ++c) {
      const float other = row_max[c * num_rows + r];
      top = other > top ? other : top;
    }
    float total = 0.0f;
    for (int64_t c = 0; c < num_chunks; ++c) {
      total += row_sum[c * num_rows + r] * __builtin_exp2f(row_max[c * num_rows + r] - top);
    }
    row_max[r] = top;
    row_sum[r] = total;
  }
}

void score_average(const ScoreKeysParams& params, const ScoreStates& states, int64_t item,
                   float* scratch) {
  const Problem& problem = params.problem;
  const int64_t num_chunks = ceil_div(num_scored_keys(params), kScoreChunk);
  const int64_t head = item / num_chunks;
  const int64_t hp = head % problem.num_perm_heads;
  const int64_t b = head / problem.num_perm_heads;
  const int64_t num_heads = heads_per_perm(problem);
  const Chunk chunk = carve(params, item % num_chunks, scratch);
  float* totals = chunk.row_sum + chunk.padded;  // (kScoreChunk)
  for (int64_t i = 0; i < chunk.end - chunk.begin; ++i) totals[i] = 0.0f;

  for (int64_t hq = hp * num_heads; hq < (hp + 1) * num_heads; ++hq) {
    pack(params, chunk, b, hq);
    const int64_t merged = (b * problem.num_q_heads + hq) * num_chunks * chunk.num_rows;
    for (int64_t r = 0; r < chunk.padded; ++r) {
      // Padding rows have weight 0.
      chunk.row_max[r] = r < chunk.num_rows ? states.row_max[merged + r] : 0.0f;
      chunk.row_sum[r] = r < chunk.num_rows ? 1.0f / states.row_sum[merged + r] : 0.0f;
    }
    const int64_t hkv = hq / heads_per_kv(problem);
    for_each_tile(params, chunk, b, hkv, [&](auto vecs, int64_t lane, int64_t key, int64_t n) {
      constexpr int kVecs = decltype(vecs)::value;
      for (int64_t i = 0; i < n; ++i) {
        Vec weights{};
        for (int c = 0; c < kVecs; ++c) {
          const int64_t row = lane + c * kLanes;
          const Vec score = load(chunk.scores + i * kVecs * kLanes + c * kLanes);
          weights +=
              exp2_nonpositive(score - load(chunk.row_max + row)) * load(chunk.row_sum + row);
        }
        totals[key - chunk.begin + i] += sum(weights);
      }
    });
  }
  float* importance = params.importance + head * problem.num_kv + chunk.begin;
  const float share = 1.0f / static_cast<float>(chunk.num_rows * num_heads);
  for (int64_t i = 0; i < chunk.end - chunk.begin; ++i) importance[i] = totals[i] * share;
}

}  // namespace pbs::cpu::PBS_CPU_ARCH
