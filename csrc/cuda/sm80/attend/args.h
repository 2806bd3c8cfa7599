// Launch arguments of the sm_80 attend kernel.
#pragma once

#include "common/attend/draw_args.h"
#include "pbs/sm80/tile_shape.h"

namespace pbs::cuda::sm80 {

struct AttendArgs : DrawArgs {
  int32_t* lists;     // (CTAs, 2, list_size): rows of selected keys, stored after the order
  int32_t list_size;  // the most parts of tiles of a query block
  int32_t page_mask;  // of the place of a row in its page; all ones without pages
};

// A tile consists of parts of kPartRows rows. The first tile may have absent parts.
inline int64_t attend_list_size(const Problem& problem) {
  return ceil_div(problem.num_kv, kPartRows) + kMostParts;
}

}  // namespace pbs::cuda::sm80
