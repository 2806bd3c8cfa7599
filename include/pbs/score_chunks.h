// How score_keys cuts keys into chunks that a CTA holds in shared memory.
#pragma once

namespace pbs {

// Keys of 2-byte elements. With 128 queries, and 16 bytes of padding a row, an SM holds two such
// chunks, or one for D=256.
constexpr int score_chunk_keys(int head_dim) {
  switch (head_dim) {
    case 64:
      return 512;
    case 96:
      return 384;
    case 128:
      return 256;
    default:
      return 192;
  }
}

}  // namespace pbs
