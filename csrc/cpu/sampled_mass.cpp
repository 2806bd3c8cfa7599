// select_blocks with score="sampled": a few queries of a block, evenly spaced, weigh every key that
// they may see; a key block's mass is the largest share that falls on its keys, of the sum of these
// unless each block is judged by itself.
//
// One pass: each key block leaves its own maximum and sum, which are put on a common scale at the
// end. Samples lie along the vector lanes.
#include <cstring>

#include "gemm.h"
#include "pbs/geometry.h"
#include "stages.h"

namespace pbs::cpu::PBS_CPU_ARCH {
namespace {

constexpr float kNegInf = -__builtin_huge_valf();

struct Samples {
  int64_t count;
  int64_t padded;
  float* queries;    // (D, padded), times scale * log2(e); 0 in the padding
  float* keys;       // (kv_block_size, D), where inputs are not float32
  float* row;        // (D), where inputs are not float32
  float* scores;     // (kv_block_size, group)
  float* block_max;  // (entries, padded)
  float* block_sum;  // (entries, padded), of exponentials against block_max
};

int64_t max_padded(const SelectBlocksParams& params) {
  return padded_rows(params.rule.num_samples);
}

Samples carve(const SelectBlocksParams& params, const QueryBlock& block, float* scratch) {
  const int64_t head_dim = params.problem.head_dim;
  Samples samples{};
  samples.count = num_samples_of<int64_t>(block.num_rows, params.rule.num_samples);
  samples.padded = padded_rows(samples.count);
  samples.queries = scratch;
  samples.keys = samples.queries + head_dim * max_padded(params);
  samples.row = samples.keys + head_dim * params.blocking.kv_block_size;
  samples.scores = samples.row + head_dim;
  samples.block_max = samples.scores + params.blocking.kv_block_size * kMaxVecs * kLanes;
  samples.block_sum = samples.block_max + num_mass_entries(params) * max_padded(params);
  return samples;
}

void pack_samples(const SelectBlocksParams& params, const QueryBlock& block, int64_t b, int64_t hq,
                  const Samples& samples) {
  const int64_t head_dim = params.problem.head_dim;
  std::memset(samples.queries, 0, head_dim * samples.padded * sizeof(float));
  for (int64_t s = 0; s < samples.count; ++s) {
    const int64_t row = block.first_row + sample_row(block.num_rows, samples.count, s);
    int64_t stride = 0;
    const float* src = float_rows(params.q, params.problem, b, hq, row, 1, samples.row, &stride);
    for (int64_t d = 0; d < head_dim; ++d) {
      samples.queries[d * samples.padded + s] = src[d] * params.scale * kLog2e;
    }
  }
}

// Leaves the maximum and the sum of one key block; `keys` are num_keys rows.
template <class Mask>
void fold_block(const Samples& samples, const float* keys, int64_t stride, int64_t head_dim,
                int64_t num_keys, int64_t entry, Mask&& mask) {
  for_each_group(samples.padded, [&](auto vecs, int64_t lane) {
    constexpr int kVecs = decltype(vecs)::value;
    constexpr int64_t kGroup = kVecs * kLanes;
    score_keys_tile<kVecs>(samples.queries + lane, samples.padded, keys, stride, head_dim, num_keys,
                           samples.scores);
    mask(samples.scores, kGroup, lane);
    for (int c = 0; c < kVecs; ++c) {
      const float* scores = samples.scores + c * kLanes;
      Vec top = splat(kNegInf);
      for (int64_t key = 0; key < num_keys; ++key) top = max(load(scores + key * kGroup), top);
      Vec total{};
      // A lane that sees none of the keys keeps -inf and 0.
      const Vec base = top == kNegInf ? Vec{} : top;
      for (int64_t key = 0; key < num_keys; ++key) {
        total += exp2_nonpositive(load(scores + key * kGroup) - base);
      }
      store(samples.block_max + entry * samples.padded + lane + c * kLanes, top);
      store(samples.block_sum + entry * samples.padded + lane + c * kLanes, total);
    }
  });
}

// mass[j]: the largest share that a sample gives to block j. NaN where a sample's weights are.
void merge_blocks(const Samples& samples, int64_t num_entries, float* mass) {
  for (int64_t j = 0; j < num_entries; ++j) mass[j] = 0.0f;
  for (int64_t s = 0; s < samples.count; ++s) {
    float top = kNegInf;
    for (int64_t j = 0; j < num_entries; ++j) {
      const float other = samples.block_max[j * samples.padded + s];
      top = other > top ? other : top;
    }
    const auto weight = [&](int64_t j) {
      const float block_max = samples.block_max[j * samples.padded + s];
      const float sum = samples.block_sum[j * samples.padded + s];
      return block_max == kNegInf ? sum : sum * __builtin_exp2f(block_max - top);
    };
    double total = 0.0;
    for (int64_t j = 0; j < num_entries; ++j) total += weight(j);
    if (total == 0.0) continue;  // it sees nothing
    const float share = static_cast<float>(1.0 / total);
    for (int64_t j = 0; j < num_entries; ++j) {
      const float found = weight(j) * share;
      const bool is_nan = mass[j] != mass[j];  // and stays it, whatever the later samples give
      if (!is_nan && !(found <= mass[j])) mass[j] = found;
    }
  }
}

void divide_by_sum(int64_t num_entries, float* mass) {
  double total = 0.0;
  for (int64_t j = 0; j < num_entries; ++j) total += mass[j];
  const float share = total == 0.0 ? 0.0f : static_cast<float>(1.0 / total);
  for (int64_t j = 0; j < num_entries; ++j) mass[j] *= share;
}

}  // namespace

int64_t sampled_scratch(const SelectBlocksParams& params) {
  const int64_t head_dim = params.problem.head_dim;
  const int64_t kv_block_size = params.blocking.kv_block_size;
  return head_dim * (max_padded(params) + kv_block_size + 1) + kv_block_size * kMaxVecs * kLanes +
         2 * num_mass_entries(params) * max_padded(params);
}

void sampled_mass(const SelectBlocksParams& params, const QueryBlock& block, int64_t b, int64_t hq,
                  float* mass, float* scratch) {
  const Problem& problem = params.problem;
  const int64_t head_dim = problem.head_dim, kv_block_size = params.blocking.kv_block_size;
  const int64_t hkv = hq / heads_per_kv(problem);
  const int64_t hp = hq / heads_per_perm(problem);
  const Samples samples = carve(params, block, scratch);
  pack_samples(params, block, b, hq, samples);

  const auto all_seen = [](float*, int64_t, int64_t) {};
  for (int64_t j = 0; j < block.num_candidates; ++j) {
    int64_t stride = 0;
    const float* keys = float_rows(params.k_perm, problem, b, hp, j * kv_block_size, kv_block_size,
                                   samples.keys, &stride);
    fold_block(samples, keys, stride, head_dim, kv_block_size, j, all_seen);
  }
  int64_t num_entries = block.num_candidates;
  if (counts_own_mass(params.rule)) {
    for (int64_t begin = block.own_begin; begin < block.own_end; begin += kv_block_size) {
      const int64_t num_keys = smaller(kv_block_size, problem.num_kv - begin);
      int64_t stride = 0;
      const float* keys =
          float_rows(params.k, problem, b, hkv, begin, num_keys, samples.keys, &stride);
      const auto until_own_position = [&](float* scores, int64_t group, int64_t lane) {
        for (int64_t i = 0; params.is_causal && i < smaller(group, samples.count - lane); ++i) {
          const int64_t position =
              block.first_position + sample_row(block.num_rows, samples.count, lane + i);
          for (int64_t key = larger(0, position + 1 - begin); key < num_keys; ++key) {
            scores[key * group + i] = kNegInf;
          }
        }
      };
      fold_block(samples, keys, stride, head_dim, num_keys, num_entries++, until_own_position);
    }
  }
  merge_blocks(samples, num_entries, mass);
  if (params.rule.mass != MassRule::kBlock) divide_by_sum(num_entries, mass);
}

}  // namespace pbs::cpu::PBS_CPU_ARCH
