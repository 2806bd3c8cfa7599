// How score_keys cuts keys into chunks that a CTA holds in shared memory.
#pragma once

namespace pbs {

// A tile of the matrix unit: 128 queries by 128 keys.
constexpr int kScoreTileKeys = 128;

// Tiles of a chunk. With 128 queries beside it, an SM holds two chunks, or one for D=256.
constexpr int score_chunk_tiles(int head_dim) { return head_dim == 64 ? 4 : 2; }

constexpr int score_chunk_keys(int head_dim) {
  return kScoreTileKeys * score_chunk_tiles(head_dim);
}

}  // namespace pbs
