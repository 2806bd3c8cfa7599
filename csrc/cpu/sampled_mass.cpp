// select_blocks with score="sampled". A few evenly spaced queries of a block attend to every
// candidate key and to the keys of the own segment. The mass of a key block is the largest share of
// attention that a sampled query gives it.
//
// There is one pass. Each key block gets its own maximum and sum, and at the end all are rescaled
// to a common maximum. Samples are along the vector lanes.
#include "gemm.h"
#include "pbs/geometry.h"
#include "stages.h"

namespace pbs::cpu::PBS_CPU_ARCH {
namespace {

constexpr float kNegInf = -__builtin_huge_valf();
constexpr int64_t kRunEntries = 64;  // sums are added up in runs, as with kRunDims

struct Samples {
  int64_t count;
  int64_t padded;    // lanes past count repeat the last sample
  float* queries;    // (D, padded), times scale * log2(e)
  float* keys;       // (kv_block_size, D), used if inputs are not float32
  float* scores;     // (kv_block_size, group)
  float* share;      // (padded)
  float* block_max;  // (entries, padded)
  float* block_sum;  // (entries, padded), sum of exp2(score - block_max)
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
  samples.scores = samples.keys + head_dim * params.blocking.kv_block_size;
  samples.share = samples.scores + params.blocking.kv_block_size * kMaxVecs * kLanes;
  samples.block_max = samples.share + max_padded(params);
  samples.block_sum = samples.block_max + num_mass_entries(params) * max_padded(params);
  return samples;
}

// The query row that a lane samples, counted from the first row of the block.
int64_t sampled_row(const QueryBlock& block, const Samples& samples, int64_t lane) {
  return sample_row(block.num_rows, samples.count, smaller(lane, samples.count - 1));
}

// Samples rotate over the heads that share the selection: sample n is from the n-th head in turn.
void pack_samples(const SelectBlocksParams& params, const QueryBlock& block, const SelectItem& item,
                  const Samples& samples) {
  const int64_t num_heads = heads_per_selection(params.problem, params.rule);
  const int64_t head_dim = params.problem.head_dim;
  for (int64_t lane = 0; lane < samples.padded; ++lane) {
    const int64_t hq = item.first_head + smaller(lane, samples.count - 1) % num_heads;
    const int64_t row = block.first_row + sampled_row(block, samples, lane);
    int64_t stride = 0;
    const float* src =
        float_rows(params.q, params.problem, item.b, hq, row, 1, samples.keys, &stride);
    for (int64_t d = 0; d < head_dim; ++d) {
      samples.queries[d * samples.padded + lane] = src[d] * params.scale * kLog2e;
    }
  }
}

// Writes the maximum and the sum of one entry, from the scores of num_keys keys.
template <int kVecs>
void fold_entry(const Samples& samples, int64_t num_keys, int64_t entry, int64_t lane) {
  constexpr int64_t kGroup = kVecs * kLanes;
  for (int c = 0; c < kVecs; ++c) {
    const float* scores = samples.scores + c * kLanes;
    Vec top = splat(kNegInf);
    for (int64_t key = 0; key < num_keys; ++key) top = max(load(scores + key * kGroup), top);
    // A lane that sees none of the keys keeps -inf and 0.
    const Vec base = top == kNegInf ? Vec{} : top;
    Vec total{};
    for (int64_t key = 0; key < num_keys; ++key) {
      total += exp2_nonpositive(load(scores + key * kGroup) - base);
    }
    const int64_t place = entry * samples.padded + lane + c * kLanes;
    store(samples.block_max + place, top);
    store(samples.block_sum + place, total);
  }
}

// Adds num_keys rows, at most kv_block_size, to one entry. mask(scores, lanes, first lane) may hide
// some of them.
template <class Mask>
void fold_keys(const Samples& samples, const float* keys, int64_t stride, int64_t head_dim,
               int64_t num_keys, int64_t entry, Mask&& mask) {
  for_each_group(samples.padded, [&](auto vecs, int64_t lane) {
    constexpr int kVecs = decltype(vecs)::value;
    score_keys_tile<kVecs>(samples.queries + lane, samples.padded, keys, stride, head_dim, num_keys,
                           samples.scores);
    mask(samples.scores, kVecs * kLanes, lane);
    fold_entry<kVecs>(samples, num_keys, entry, lane);
  });
}

void fold_candidates(const SelectBlocksParams& params, const QueryBlock& block,
                     const SelectItem& item, const Samples& samples) {
  const Problem& problem = params.problem;
  const int64_t num_keys = params.blocking.kv_block_size;
  const int64_t hp = item.first_head / heads_per_perm(problem);
  for (int64_t j = 0; j < block.num_candidates; ++j) {
    int64_t stride = 0;
    const RowPlace place = place_of(params.pages, item.b, j * num_keys);
    const float* keys =
        float_rows(params.k_perm, problem, place.b, hp, place.row, num_keys, samples.keys, &stride);
    fold_keys(samples, keys, stride, problem.head_dim, num_keys, j,
              [](float*, int64_t, int64_t) {});
  }
}

// Adds the own keys, up to the position of each sample, to entries after those of the candidates.
// Returns the number of entries.
int64_t fold_own(const SelectBlocksParams& params, const QueryBlock& block, const SelectItem& item,
                 const Samples& samples) {
  const Problem& problem = params.problem;
  const int64_t tile = params.blocking.kv_block_size;
  const int64_t hkv = item.first_head / heads_per_kv(problem);
  int64_t entry = block.num_candidates;
  for (int64_t begin = block.own_begin; begin < block.own_end; begin += tile, ++entry) {
    const int64_t num_keys = smaller(tile, block.own_end - begin);
    int64_t stride = 0;
    const float* keys = float_rows(params.k, problem, item.b, hkv, begin - params.first_k_row,
                                   num_keys, samples.keys, &stride);
    const auto until_own_position = [&](float* scores, int64_t group, int64_t lane) {
      for (int64_t i = 0; params.is_causal && i < group; ++i) {
        const int64_t position = block.first_position + sampled_row(block, samples, lane + i);
        for (int64_t key = larger(0, position + 1 - begin); key < num_keys; ++key) {
          scores[key * group + i] = kNegInf;
        }
      }
    };
    fold_keys(samples, keys, stride, problem.head_dim, num_keys, entry, until_own_position);
  }
  return entry;
}

// Rescales the sums of all entries to a common maximum. `share` becomes the inverse of their total.
void weigh_entries(const Samples& samples, int64_t num_entries) {
  for (int64_t lane = 0; lane < samples.padded; lane += kLanes) {
    Vec top = splat(kNegInf);
    for (int64_t j = 0; j < num_entries; ++j) {
      top = max(load(samples.block_max + j * samples.padded + lane), top);
    }
    const Vec base = top == kNegInf ? Vec{} : top;
    Vec total{};
    for (int64_t run = 0; run < num_entries; run += kRunEntries) {
      Vec part{};
      for (int64_t j = run; j < smaller(run + kRunEntries, num_entries); ++j) {
        const int64_t place = j * samples.padded + lane;
        const Vec weight = load(samples.block_sum + place) *
                           exp2_nonpositive(load(samples.block_max + place) - base);
        store(samples.block_sum + place, weight);
        part += weight;
      }
      total += part;
    }
    // A sample that sees nothing has no share.
    store(samples.share + lane, total == 0.0f ? Vec{} : 1.0f / total);
  }
}

// The largest share that a sample gives to entry j, or NaN if any share is NaN.
float largest_share(const Samples& samples, int64_t j) {
  Vec largest{};
  for (int64_t lane = 0; lane < samples.padded; lane += kLanes) {
    const Vec found =
        load(samples.block_sum + j * samples.padded + lane) * load(samples.share + lane);
    largest = found > largest ? found : (found == found ? largest : found);
  }
  float mass = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (largest[lane] > mass || largest[lane] != largest[lane]) mass = largest[lane];
  }
  return mass;
}

}  // namespace

int64_t sampled_scratch(const SelectBlocksParams& params) {
  const int64_t tile = params.blocking.kv_block_size;
  return params.problem.head_dim * (max_padded(params) + tile) + tile * kMaxVecs * kLanes +
         (1 + 2 * num_mass_entries(params)) * max_padded(params);
}

void sampled_mass(const SelectBlocksParams& params, const QueryBlock& block, const SelectItem& item,
                  float* mass, float* scratch) {
  const Samples samples = carve(params, block, scratch);
  pack_samples(params, block, item, samples);
  fold_candidates(params, block, item, samples);
  const int64_t num_entries = fold_own(params, block, item, samples);
  weigh_entries(samples, num_entries);
  for (int64_t j = 0; j < block.num_candidates; ++j) mass[j] = largest_share(samples, j);
}

}  // namespace pbs::cpu::PBS_CPU_ARCH
