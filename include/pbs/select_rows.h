// Rows of the logits of mean scores, as a warp of select_blocks holds them in shared memory on
// CUDA. Host and device.
#pragma once

#include <cstdint>

#include "pbs/geometry.h"

namespace pbs::cuda {

constexpr int kCutScratch = 128;  // words per warp for the weights that it cuts in registers

// Floats from one row of logits to the next. Rows start 8 banks apart, and have room for three
// zeros at the end.
constexpr int64_t logit_stride(int64_t num_entries) {
  return ceil_div(num_entries + 3, 32) * 32 + 8;
}

}  // namespace pbs::cuda
