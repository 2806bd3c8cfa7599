// Tiles of select_blocks with mean scores on sm_90: the number of query blocks that a CTA works on,
// and their shared memory. Host and device.
#pragma once

#include <cstdint>

#include "pbs/params.h"
#include "pbs/select_rows.h"
#include "pbs/sm90/tile_shape.h"

namespace pbs::cuda::sm90 {

constexpr int kLogitRows = 16;  // rows of one product: query blocks of a tile at most
constexpr int kRowWarps = 16;   // warps that compute rows of logits and cut them
constexpr int kMeanWarps = 4;   // warps that average queries
constexpr int kMeanBuffers = 2;
constexpr int kMaxQuerySlots = 8;
constexpr int kOnesBytes = 256;  // 16 x 8 elements
constexpr int kSelectBarrierBytes = 288;

// A tile has its mean queries as two TF32 halves. Each half takes this many floats.
PBS_HOST_DEVICE constexpr int query_means_floats(int head_dim) { return kLogitRows * head_dim; }

// The number of columns of a query block that are loaded together.
PBS_HOST_DEVICE constexpr int query_slot_columns(int head_dim) {
  return head_dim_tiles(head_dim).mean_columns;
}
PBS_HOST_DEVICE constexpr int query_slot_bytes(int head_dim, int block_size) {
  return 2 * block_size * query_slot_columns(head_dim);
}

struct SelectTiles {
  int32_t rows;       // query blocks of a tile; 0 if not one fits
  int32_t num_slots;  // slots of queries in shared memory
  int64_t shared_bytes;
};

// Shared memory of a CTA in addition to its slots and its rows of logits.
constexpr int64_t select_fixed_bytes(int head_dim) {
  return kSwizzleBytes + kOnesBytes + kSelectBarrierBytes +
         4 * (2 * kMeanBuffers * query_means_floats(head_dim) + kRowWarps * kCutScratch);
}

// Float32 queries are averaged while they are read, without slots.
constexpr int64_t slot_bytes_of(const Problem& problem, const Blocking& blocking) {
  return problem.dtype == DType::kFloat32 ? 0
                                          : query_slot_bytes(static_cast<int>(problem.head_dim),
                                                             static_cast<int>(blocking.block_size));
}

// As many rows as a product has. A short sequence has fewer, so that each CTA has several tiles and
// loads one while it computes another.
constexpr SelectTiles select_tiles(const SelectBlocksParams& params, int64_t num_sms) {
  constexpr int64_t kTilesPerCta = 3;
  const Problem& problem = params.problem;
  const auto head_dim = static_cast<int>(problem.head_dim);
  const int64_t num_rows =
      problem.batch * problem.num_q_heads * num_query_blocks(problem, params.blocking);
  int64_t wanted = kLogitRows;
  while (wanted > kLogitRows / 4 && num_rows < wanted * num_sms * kTilesPerCta) wanted /= 2;
  const int64_t row_bytes = 4 * logit_stride(num_mass_entries(params));
  const int64_t slot_bytes = slot_bytes_of(problem, params.blocking);
  const int64_t room = kSharedBytesPerCta - select_fixed_bytes(head_dim);
  SelectTiles tiles{};
  tiles.rows = static_cast<int32_t>(smaller(wanted, larger(0, room - slot_bytes) / row_bytes));
  if (tiles.rows > 0 && slot_bytes > 0) {
    tiles.num_slots =
        static_cast<int32_t>(smaller(kMaxQuerySlots, (room - tiles.rows * row_bytes) / slot_bytes));
    tiles.shared_bytes = tiles.num_slots * slot_bytes;
  }
  tiles.shared_bytes += select_fixed_bytes(head_dim) + tiles.rows * row_bytes;
  return tiles;
}

// The largest number of key blocks in a row of logits.
constexpr int64_t max_key_blocks(const Problem& problem, const Blocking& blocking) {
  const int64_t room = kSharedBytesPerCta - select_fixed_bytes(static_cast<int>(problem.head_dim)) -
                       slot_bytes_of(problem, blocking);
  return round_down(room / 4 - 8, 32) - 3 - num_own_entries(blocking);
}

}  // namespace pbs::cuda::sm90
