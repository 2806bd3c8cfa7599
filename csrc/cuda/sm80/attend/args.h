// What the sm_80 attend kernel is launched with.
#pragma once

#include "common/attend/draw_args.h"
#include "pbs/sm80/tile_shape.h"

namespace pbs::cuda::sm80 {

struct AttendArgs : DrawArgs {
  int32_t* lists;     // (CTAs, 2, list_size): where the keys of query blocks are, behind the order
  int32_t list_size;  // parts of the tiles of a query block at most
  int32_t num_own;    // keys in their own order that lie in memory
};

// Parts of kPartRows rows. The last own tile and the first one of selected keys may have absent
// ones.
inline int64_t attend_list_size(const Problem& problem) {
  return ceil_div(problem.num_kv, kPartRows) + 2 * kMostParts;
}

}  // namespace pbs::cuda::sm80
