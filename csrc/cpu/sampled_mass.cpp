// select_blocks with score="sampled": a few queries of a block, evenly spaced, weigh the summary of
// the permuted keys and the own segment's keys; a key block's mass is the largest share of a sample
// that falls on it.
//
// One pass: each key block leaves its own maximum and sum, which are put on a common scale at the
// end. Samples lie along the vector lanes.
#include "gemm.h"
#include "pbs/geometry.h"
#include "stages.h"

namespace pbs::cpu::PBS_CPU_ARCH {
namespace {

constexpr float kNegInf = -__builtin_huge_valf();
constexpr int64_t kOwnTile = 64;  // keys
constexpr int64_t kMostColumns = kSummaryColumns > kOwnTile ? kSummaryColumns : kOwnTile;
constexpr int64_t kRunEntries = 64;  // sums are added up in runs: see kRunDims

struct Samples {
  int64_t count;
  int64_t padded;    // lanes past count repeat the last sample
  float* queries;    // (D, padded), times scale * log2(e)
  float* keys;       // (kOwnTile, D), where inputs are not float32
  float* scores;     // (kMostColumns, group)
  float* share;      // (padded)
  float* block_max;  // (entries, padded)
  float* block_sum;  // (entries, padded), of exponentials against block_max
};

int64_t max_padded(const SelectBlocksParams& params) {
  return padded_rows(params.rule.num_samples);
}

int64_t num_entries_of(const SelectBlocksParams& params) {
  return num_key_blocks(params.problem, params.blocking) +
         ceil_div(params.blocking.segment_size + params.blocking.block_size, kOwnTile);
}

Samples carve(const SelectBlocksParams& params, const QueryBlock& block, float* scratch) {
  const int64_t head_dim = params.problem.head_dim;
  Samples samples{};
  samples.count = num_samples_of<int64_t>(block.num_rows, params.rule.num_samples);
  samples.padded = padded_rows(samples.count);
  samples.queries = scratch;
  samples.keys = samples.queries + head_dim * max_padded(params);
  samples.scores = samples.keys + head_dim * kOwnTile;
  samples.share = samples.scores + kMostColumns * kMaxVecs * kLanes;
  samples.block_max = samples.share + max_padded(params);
  samples.block_sum = samples.block_max + num_entries_of(params) * max_padded(params);
  return samples;
}

// The row, counted from the block's first, that a lane samples.
int64_t sampled_row(const QueryBlock& block, const Samples& samples, int64_t lane) {
  return sample_row(block.num_rows, samples.count, smaller(lane, samples.count - 1));
}

// Sample n is of the n-th head in turn, of those that share the selection.
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

// Leaves the maximum and the sum of one entry; the keys past the first num_exact count four times.
template <int kVecs>
void fold_entry(const Samples& samples, const float* scores, int64_t num_exact, int64_t num_columns,
                int64_t entry, int64_t lane) {
  constexpr int64_t kGroup = kVecs * kLanes;
  for (int c = 0; c < kVecs; ++c) {
    const float* column = scores + c * kLanes;
    Vec top = splat(kNegInf);
    for (int64_t i = 0; i < num_columns; ++i) top = max(load(column + i * kGroup), top);
    // A lane that sees none of the keys keeps -inf and 0.
    const Vec base = top == kNegInf ? Vec{} : top;
    const auto sum_of = [&](int64_t begin, int64_t end) {
      Vec total{};
      for (int64_t i = begin; i < end; ++i) {
        total += exp2_nonpositive(load(column + i * kGroup) - base);
      }
      return total;
    };
    const int64_t place = entry * samples.padded + lane + c * kLanes;
    store(samples.block_max + place, top);
    store(samples.block_sum + place,
          sum_of(0, num_exact) + static_cast<float>(kPoolSize) * sum_of(num_exact, num_columns));
  }
}

// Folds the num_blocks key blocks of a window, whose summary is `keys`; the first is first_entry.
void fold_window(const Samples& samples, const float* keys, int64_t head_dim, int64_t kv_block_size,
                 int64_t num_blocks, int64_t first_entry) {
  for_each_group(samples.padded, [&](auto vecs, int64_t lane) {
    constexpr int kVecs = decltype(vecs)::value;
    score_keys_tile<kVecs>(samples.queries + lane, samples.padded, keys, head_dim, head_dim,
                           summary_column(num_blocks * kv_block_size), samples.scores);
    for (int64_t j = 0; j < num_blocks; ++j) {
      const int64_t begin = summary_column(j * kv_block_size);
      const int64_t end = summary_column((j + 1) * kv_block_size);
      fold_entry<kVecs>(samples, samples.scores + begin * kVecs * kLanes, j == 0 ? kExactKeys : 0,
                        end - begin, first_entry + j, lane);
    }
  });
}

// Folds the own keys [begin, begin + num_keys), one by one and up to each sample's own position.
void fold_own(const SelectBlocksParams& params, const QueryBlock& block, const SelectItem& item,
              const Samples& samples, int64_t begin, int64_t num_keys, int64_t entry) {
  const Problem& problem = params.problem;
  int64_t stride = 0;
  const float* keys = float_rows(params.k, problem, item.b, item.first_head / heads_per_kv(problem),
                                 begin, num_keys, samples.keys, &stride);
  for_each_group(samples.padded, [&](auto vecs, int64_t lane) {
    constexpr int kVecs = decltype(vecs)::value;
    constexpr int64_t kGroup = kVecs * kLanes;
    score_keys_tile<kVecs>(samples.queries + lane, samples.padded, keys, stride, problem.head_dim,
                           num_keys, samples.scores);
    for (int64_t i = 0; params.is_causal && i < kGroup; ++i) {
      const int64_t position = block.first_position + sampled_row(block, samples, lane + i);
      for (int64_t key = larger(0, position + 1 - begin); key < num_keys; ++key) {
        samples.scores[key * kGroup + i] = kNegInf;
      }
    }
    fold_entry<kVecs>(samples, samples.scores, num_keys, num_keys, entry, lane);
  });
}

// Puts the sums of all entries on a common scale, and leaves one over their sum in `share`.
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
    // A sample that sees nothing gives nothing.
    store(samples.share + lane, total == 0.0f ? Vec{} : 1.0f / total);
  }
}

// The largest share of entry j that a sample gives, NaN where one is.
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
  return params.problem.head_dim * (max_padded(params) + kOwnTile) +
         kMostColumns * kMaxVecs * kLanes + (1 + 2 * num_entries_of(params)) * max_padded(params);
}

void sampled_mass(const SelectBlocksParams& params, const KeySummary& summary,
                  const QueryBlock& block, const SelectItem& item, float* mass, float* scratch) {
  const Problem& problem = params.problem;
  const int64_t head_dim = problem.head_dim, kv_block_size = params.blocking.kv_block_size;
  const int64_t hp = item.first_head / heads_per_perm(problem);
  const Samples samples = carve(params, block, scratch);
  pack_samples(params, block, item, samples);

  const int64_t blocks_per_window = kSummaryKeys / kv_block_size;
  const float* keys = summary.keys + (item.b * problem.num_perm_heads + hp) * summary.num_windows *
                                         kSummaryColumns * head_dim;
  for (int64_t j = 0; j < block.num_candidates; j += blocks_per_window) {
    fold_window(samples, keys, head_dim, kv_block_size,
                smaller(blocks_per_window, block.num_candidates - j), j);
    keys += kSummaryColumns * head_dim;
  }
  int64_t num_entries = block.num_candidates;
  for (int64_t begin = block.own_begin; begin < block.own_end; begin += kOwnTile) {
    fold_own(params, block, item, samples, begin, smaller(kOwnTile, block.own_end - begin),
             num_entries++);
  }
  weigh_entries(samples, num_entries);
  for (int64_t j = 0; j < block.num_candidates; ++j) mass[j] = largest_share(samples, j);
}

}  // namespace pbs::cpu::PBS_CPU_ARCH
