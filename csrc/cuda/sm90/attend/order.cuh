// What attend and the kernel that runs before it share.
#pragma once

#include <cuda_runtime.h>

#include "pbs/params.h"
#include "pbs/work_order.h"

namespace pbs::cuda::sm90 {

struct OrderArgs {
  Problem problem;
  Blocking blocking;
  bool is_causal;
  const uint32_t* block_mask;
  int32_t num_mask_words;  // of a row of block_mask
  WorkGroups groups;
  OrderLayout layout;
  int32_t* workspace;
  bool is_counted;  // the workspace holds what each query block selects
};

// Fills the workspace: the counter with 0, and the order.
cudaError_t launch_order(OrderArgs args, cudaStream_t stream);

}  // namespace pbs::cuda::sm90
