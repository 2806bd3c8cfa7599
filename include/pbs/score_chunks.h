// How score_keys cuts keys into chunks that a CTA holds in shared memory.
#pragma once

namespace pbs {

// Keys of 2-byte elements; with 16 bytes of padding a row, at most 106 KB, so that an SM holds two.
constexpr int score_chunk_keys(int head_dim) {
  return head_dim == 256 ? 192 : head_dim == 128 ? 256 : 512;
}

}  // namespace pbs
