// Launch arguments that all attend kernels share, and the order of their query blocks. Host side.
#pragma once

#include <limits>

#include "common/attend/order.cuh"
#include "pbs/bitmask.h"
#include "pbs/params.h"
#include "pbs/work_order.h"

namespace pbs::cuda {

struct DrawArgs {
  AttendParams params;
  WorkGroups groups;
  OrderLayout layout;
  int32_t* workspace;
  int32_t num_mask_words;  // words per row of block_mask
  int32_t page_shift;      // base-2 logarithm of the rows of a page; 31 without pages
};

// Keys and values that are read at about the same time may take l2_bytes.
inline WorkGroups attend_groups(const AttendParams& params, int64_t l2_bytes) {
  const Problem& problem = params.problem;
  return work_groups(num_query_blocks(problem, params.blocking),
                     problem.batch * problem.num_q_heads, heads_per_perm(problem),
                     4 * problem.num_kv * problem.head_dim, l2_bytes);
}

inline int64_t order_bytes(const WorkGroups& groups) {
  return order_layout(groups).size * static_cast<int64_t>(sizeof(int32_t));
}

// Returns an error as text, or null.
inline const char* fill_draw_args(const AttendParams& params, void* workspace, int64_t l2_bytes,
                                  DrawArgs& args) {
  args.params = params;
  args.groups = attend_groups(params, l2_bytes);
  args.layout = order_layout(args.groups);
  args.workspace = static_cast<int32_t*>(workspace);
  if (args.layout.size > std::numeric_limits<int32_t>::max()) {
    return "too many query blocks for one grid";
  }
  args.num_mask_words =
      static_cast<int32_t>(num_mask_words(num_key_blocks(params.problem, params.blocking)));
  args.page_shift = 31;
  if (params.pages.table != nullptr) {
    args.page_shift = 0;
    while (int64_t{1} << args.page_shift < params.pages.page_size) ++args.page_shift;
  }
  return nullptr;
}

inline bool has_no_work(const DrawArgs& args) {
  return args.groups.num_heads == 0 || args.groups.num_q_blocks == 0;
}

inline int64_t num_blocks_to_draw(const DrawArgs& args) {
  return int64_t{args.groups.num_heads} * args.groups.num_q_blocks;
}

inline OrderArgs order_args(const DrawArgs& args) {
  const AttendParams& params = args.params;
  return OrderArgs{params.problem,      params.blocking, params.is_causal, params.block_mask,
                   args.num_mask_words, args.groups,     args.layout,      args.workspace,
                   /*is_counted=*/false};
}

}  // namespace pbs::cuda
