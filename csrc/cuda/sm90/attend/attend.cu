// Host side of attend: TMA descriptors, grid, and the choice of element type and head dim.
#include <cuda_runtime.h>

#include <limits>

#include "common/elements.h"
#include "device.h"
#include "instances.h"
#include "order.cuh"
#include "pbs/bitmask.h"
#include "pbs/dispatch.h"
#include "sm90/launch.h"
#include "sm90/tma.h"
#include "traits.cuh"

namespace pbs::cuda::sm90 {
namespace {

// Keys and values may fill so much of the 50 MB of L2 before they push each other out.
constexpr int64_t kL2Bytes = int64_t{20} << 20;

// Of a power of two.
int32_t log2_of(int64_t size) {
  int32_t shift = 0;
  while (int64_t{1} << shift < size) ++shift;
  return shift;
}

const char* encode_all(AttendArgs& args) {
  const AttendParams& params = args.params;
  const Problem& problem = params.problem;
  const int64_t keys = tile_keys(static_cast<int>(problem.head_dim));
  const int64_t chunk = smaller(params.blocking.kv_block_size, keys);
  const int64_t all = problem.head_dim;
  // Less than a tile is put together from column groups.
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

WorkGroups attend_groups(const AttendParams& params) {
  const Problem& problem = params.problem;
  return work_groups(num_query_blocks(problem, params.blocking),
                     problem.batch * problem.num_q_heads, heads_per_perm(problem),
                     4 * problem.num_kv * problem.head_dim, kL2Bytes);
}

}  // namespace

int64_t attend_workspace(const AttendParams& params) {
  return order_layout(attend_groups(params)).size * static_cast<int64_t>(sizeof(int32_t));
}

const char* launch_attend(const AttendParams& params, void* workspace, void* stream) {
  const Problem& problem = params.problem;
  AttendArgs args{};
  args.params = params;
  args.groups = attend_groups(params);
  args.layout = order_layout(args.groups);
  args.workspace = static_cast<int32_t*>(workspace);
  if (args.groups.num_heads == 0 || args.groups.num_q_blocks == 0) return nullptr;
  if (args.layout.size > std::numeric_limits<int32_t>::max()) {
    return "too many query blocks for one grid";
  }
  args.num_mask_words =
      static_cast<int32_t>(num_mask_words(num_key_blocks(problem, params.blocking)));
  args.page_shift = 31;
  if (params.pages.table != nullptr) args.page_shift = log2_of(params.pages.page_size);
  if (const char* error = encode_all(args)) return error;

  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  int num_sms = 0;
  if (const char* error = count_sms(&num_sms)) return error;
  cudaError_t error = launch_order(
      OrderArgs{problem, params.blocking, params.is_causal, params.block_mask, args.num_mask_words,
                args.groups, args.layout, args.workspace, /*is_counted=*/false},
      cuda_stream);
  if (error == cudaSuccess) {
    const int64_t num_blocks = int64_t{args.groups.num_heads} * args.groups.num_q_blocks;
    const int num_ctas = static_cast<int>(smaller(num_blocks, num_sms));
    error = dispatch_half(problem.dtype, [&](auto element) {
      return dispatch_head_dim(problem.head_dim, [&](auto head_dim) {
        return run_attend<decltype(element), head_dim>(args, num_ctas, cuda_stream);
      });
    });
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pbs::cuda::sm90
