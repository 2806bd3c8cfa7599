// Host side of attend: the grid, and the choice of element type, head dim and tile.
#include <cuda_runtime.h>

#include "common/elements.h"
#include "device.h"
#include "instances.h"
#include "pbs/dispatch.h"
#include "pbs/sm80/tile_shape.h"
#include "sm80/launch.h"

namespace pbs::cuda::sm80 {
namespace {

// Keys and values may fill this much of L2, which is 40 MB on most GPUs, before they evict each
// other.
constexpr int64_t kL2Bytes = int64_t{20} << 20;

template <class Element, int kHeadDim>
cudaError_t run(const AttendArgs& args, int num_sms, bool has_large_shared, cudaStream_t stream) {
  if (has_large_shared) {
    return run_attend<Element, kHeadDim, tile_keys(kHeadDim, true)>(args, num_sms, stream);
  }
  return run_attend<Element, kHeadDim, tile_keys(kHeadDim, false)>(args, num_sms, stream);
}

}  // namespace

int64_t attend_workspace(const AttendParams& params) {
  const Problem& problem = params.problem;
  const int num_sms = sms_of_workspace();
  const int64_t num_lists = 2 * num_sms * attend_ctas_per_sm(static_cast<int>(problem.head_dim));
  return order_bytes(attend_groups(params, kL2Bytes)) +
         num_lists * attend_list_size(problem) * static_cast<int64_t>(sizeof(int32_t));
}

const char* launch_attend(const AttendParams& params, void* workspace, void* stream) {
  AttendArgs args{};
  if (const char* error = fill_draw_args(params, workspace, kL2Bytes, args)) return error;
  if (has_no_work(args)) return nullptr;
  args.lists = args.workspace + args.layout.size;
  args.list_size = static_cast<int32_t>(attend_list_size(params.problem));
  args.page_mask = static_cast<int32_t>((uint32_t{1} << args.page_shift) - 1);
  int num_sms = 0;
  if (const char* error = count_sms(&num_sms)) return error;
  int64_t shared_bytes = 0;
  if (const char* error = shared_bytes_per_sm(&shared_bytes)) return error;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = launch_order(order_args(args), cuda_stream);
  if (error == cudaSuccess) {
    error = dispatch_half(params.problem.dtype, [&](auto element) {
      return dispatch_head_dim(params.problem.head_dim, [&](auto head_dim) {
        return run<decltype(element), head_dim>(args, num_sms, shared_bytes >= kLargeSharedBytes,
                                                cuda_stream);
      });
    });
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pbs::cuda::sm80
