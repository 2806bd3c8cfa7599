// What attend and the kernels that run before it share.
#pragma once

#include <cuda_runtime.h>

#include "pbs/params.h"
#include "pbs/work_order.h"

namespace pbs::cuda {

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

// Where masks are long, counts in a kernel of its own what each query block selects.
cudaError_t launch_count(OrderArgs& args, cudaStream_t stream);

}  // namespace pbs::cuda
