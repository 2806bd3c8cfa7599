// Tiles of select_blocks with mean scores on sm_80: the number of query blocks that a CTA works on,
// and their shared memory. Host and device.
#pragma once

#include <cstdint>

#include "pbs/params.h"
#include "pbs/select_rows.h"
#include "pbs/sm80/tile_shape.h"

namespace pbs::cuda::sm80 {

constexpr int kLogitRows = 8;        // query blocks of a tile at most, one per warp
constexpr int kSelectCtasPerSm = 2;  // as registers allow, with 128 per thread

struct SelectTiles {
  int32_t rows;  // query blocks of a tile; 0 if not one fits
  int64_t shared_bytes;
};

// Shared memory of a CTA in addition to the rows of logits: the mean queries, the scratch of the
// warps, and the index of the sink.
constexpr int64_t select_fixed_bytes(int64_t head_dim) {
  return 4 * kLogitRows * (head_dim + kCutScratch) + 16;
}

// As many rows as leave room for two CTAs on a multiprocessor, so that one reads queries while the
// other computes. If these are less than half a tile, one CTA takes all shared memory, so that keys
// are read less often. A short sequence has half a tile, so that all multiprocessors have work.
constexpr SelectTiles select_tiles(const SelectBlocksParams& params, int64_t num_sms,
                                   int64_t shared_bytes_per_sm) {
  constexpr int64_t kTilesPerCta = 2;
  const Problem& problem = params.problem;
  const int64_t num_rows =
      problem.batch * problem.num_q_heads * num_query_blocks(problem, params.blocking);
  const bool is_short = num_rows < kLogitRows * num_sms * kSelectCtasPerSm * kTilesPerCta;
  const int64_t wanted = is_short ? kLogitRows / 2 : kLogitRows;
  const int64_t fixed_bytes = select_fixed_bytes(problem.head_dim);
  const int64_t row_bytes = 4 * logit_stride(num_mass_entries(params));
  int64_t rows = 0;
  for (int64_t num_ctas = kSelectCtasPerSm; num_ctas > 0; --num_ctas) {
    const int64_t room = shared_bytes_per_sm / num_ctas - kReservedBytesPerCta - fixed_bytes;
    rows = smaller(wanted, larger(0, room) / row_bytes);
    if (rows >= kLogitRows / 2) break;
  }
  SelectTiles tiles{};
  tiles.rows = static_cast<int32_t>(rows);
  tiles.shared_bytes = fixed_bytes + rows * row_bytes;
  return tiles;
}

// The largest number of key blocks in a row of logits, on the GPUs with the least shared memory.
constexpr int64_t max_key_blocks(const Problem& problem, const Blocking& blocking) {
  const int64_t room = kSmallSharedBytesPerCta - select_fixed_bytes(problem.head_dim);
  return round_down(room / 4 - 8, 32) - 3 - num_own_entries(blocking);
}

}  // namespace pbs::cuda::sm80
