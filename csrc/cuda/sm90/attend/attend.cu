// Host side of attend: TMA descriptors, the grid, and the choice of element type and head dim.
#include <cuda_runtime.h>

#include "common/elements.h"
#include "device.h"
#include "instances.h"
#include "pbs/dispatch.h"
#include "sm90/launch.h"
#include "sm90/tma.h"
#include "traits.cuh"

namespace pbs::cuda::sm90 {
namespace {

// Keys and values may fill this much of the 50 MB of L2 before they evict each other.
constexpr int64_t kL2Bytes = int64_t{20} << 20;

const char* encode_all(AttendArgs& args) {
  const AttendParams& params = args.params;
  const Problem& problem = params.problem;
  const int64_t keys = tile_keys(static_cast<int>(problem.head_dim));
  const int64_t chunk = smaller(params.blocking.kv_block_size, keys);
  const int64_t all = problem.head_dim;
  // Parts smaller than a tile are loaded by column groups.
  const int64_t chunk_columns = chunk == keys ? all : group_columns(static_cast<int>(all));
  struct Input {
    CUtensorMap* map;
    const ConstRows* rows;
    int64_t num_batches;
    int64_t num_heads;
    int64_t num_rows;
    int64_t box_rows;
    int64_t box_columns;
  };
  const int64_t batch = problem.batch;
  const int64_t num_own = problem.num_kv - params.first_k_row;
  const bool is_paged = params.pages.table != nullptr;
  const int64_t num_perm_batches = is_paged ? params.pages.num_pages : batch;
  const int64_t num_perm_rows = is_paged ? params.pages.page_size : problem.num_kv;
  const int64_t num_perm_heads = problem.num_perm_heads;
  const Input inputs[] = {
      {&args.q, &params.q, batch, problem.num_q_heads, problem.num_q, kTileRows, all},
      {&args.k, &params.k, batch, problem.num_kv_heads, num_own, keys, all},
      {&args.v, &params.v, batch, problem.num_kv_heads, num_own, keys, all},
      {&args.k_perm, &params.k_perm, num_perm_batches, num_perm_heads, num_perm_rows, chunk,
       chunk_columns},
      {&args.v_perm, &params.v_perm, num_perm_batches, num_perm_heads, num_perm_rows, chunk,
       chunk_columns},
  };
  for (const Input& input : inputs) {
    Problem of_input = problem;
    of_input.batch = input.num_batches;
    const char* error = encode_rows(input.map, *input.rows, of_input, input.num_heads,
                                    input.num_rows, input.box_rows, input.box_columns);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace

int64_t attend_workspace(const AttendParams& params) {
  return order_bytes(attend_groups(params, kL2Bytes));
}

const char* launch_attend(const AttendParams& params, void* workspace, void* stream) {
  AttendArgs args{};
  if (const char* error = fill_draw_args(params, workspace, kL2Bytes, args)) return error;
  if (has_no_work(args)) return nullptr;
  if (const char* error = encode_all(args)) return error;

  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  int num_sms = 0;
  if (const char* error = count_sms(&num_sms)) return error;
  cudaError_t error = launch_order(order_args(args), cuda_stream);
  if (error == cudaSuccess) {
    const auto num_ctas = static_cast<int>(smaller(num_blocks_to_draw(args), num_sms));
    error = dispatch_half(params.problem.dtype, [&](auto element) {
      return dispatch_head_dim(params.problem.head_dim, [&](auto head_dim) {
        return run_attend<decltype(element), head_dim>(args, num_ctas, cuda_stream);
      });
    });
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pbs::cuda::sm90
