// What the sm_80 attend kernel is launched with.
#pragma once

#include "common/attend/draw_args.h"
#include "pbs/sm80/tile_shape.h"

namespace pbs::cuda::sm80 {

struct AttendArgs : DrawArgs {
  int32_t* lists;     // (CTAs, 2, list_size): where selected keys are, behind the order
  int32_t list_size;  // parts of the tiles of a query block at most
};

// Of kPartRows rows; the first tile may have absent ones.
inline int64_t attend_list_size(const Problem& problem) {
  return ceil_div(problem.num_kv, kPartRows) + kMostParts;
}

}  // namespace pbs::cuda::sm80
