// TMA descriptors. Host side.
#pragma once

#include <cuda.h>

#include "pbs/params.h"

namespace pbs::cuda::sm90 {

// Boxes of `box_rows` rows and `box_columns` columns of a (B, H, N, D) tensor, in groups that fill
// one swizzle span each. Rows past the end read as 0. Returns an error as text, or null.
const char* encode_rows(CUtensorMap* map, const ConstRows& rows, const Problem& problem,
                        int64_t num_heads, int64_t num_rows, int64_t box_rows, int64_t box_columns);

}  // namespace pbs::cuda::sm90
