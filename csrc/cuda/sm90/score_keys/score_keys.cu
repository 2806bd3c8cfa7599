// score_keys on CUDA: two passes over the keys of the complete segments, on tensor cores.
#include <cuda_runtime.h>
#include <cutlass/arch/reg_reconfig.h>

#include <limits>

#include "common/elements.h"
#include "common/launch_kernel.h"
#include "common/score_keys/clear_importance.h"
#include "device.h"
#include "importance.cuh"
#include "pbs/dispatch.h"
#include "row_sums.cuh"
#include "sm90/launch.h"
#include "sm90/tma.h"

namespace pbs::cuda::sm90 {
namespace {

// States of one query, over parts and heads, that each CTA of the second pass merges itself.
constexpr int kMostMergedInPass = 256;

// The launch gives 96 registers per thread.
constexpr int kScoreProducerRegisters = 32;
constexpr int kScoreConsumerRegisters = 112;

constexpr int kWarpsPerGroup = 4;

// Keys of a part that each group of heads reads before the next group does. The keys that all CTAs
// read at once then stay in L2.
constexpr int kChunkKeys = 1024;

// The number of warps that free a stage of keys.
template <class Traits>
__device__ int readers_of_keys(const ScoreArgs& args, const ScorePart<Traits, false>& part) {
  return kWarpsPerGroup * min(kScoreWarpgroups, 2 * part.heads_in_group(args, part.first_group));
}
template <class Traits>
__device__ int readers_of_keys(const ScoreArgs&, const ScorePart<Traits, true>&) {
  return kWarpsPerGroup;
}

template <class Traits, bool kKeysAreRows, class Consume>
__device__ void run_pass(const ScoreArgs& args, Consume consume) {
  extern __shared__ char raw[];
  const ScorePart<Traits, kKeysAreRows> part(args, raw);
  if (threadIdx.x == 0) {
    ScoreBarriers& barriers = *part.barriers;
    for (int i = 0; i < args.plan.heads_per_group; ++i) {
      barriers.q_full[i].init(1);
      barriers.q_empty[i].init(kScoreConsumers / 32);
    }
    for (int stage = 0; stage < args.plan.num_stages; ++stage) {
      for (auto& full : barriers.k_full) full[stage].init(1);
      barriers.k_empty[stage].init(readers_of_keys(args, part));
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= kScoreConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<kScoreProducerRegisters>();
    if (threadIdx.x < kScoreConsumers + 32) {
      ScoreLoader<Traits, kKeysAreRows>(args, part).run();
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kScoreConsumerRegisters>();
    consume(part);
  }
}

template <class Traits>
__global__ void __launch_bounds__(kScoreThreads, 1)
    score_keys_sums_kernel(const __grid_constant__ ScoreArgs args) {
  cudaTriggerProgrammaticLaunchCompletion();  // the second pass may start to load
  run_pass<Traits, false>(args, [&](const ScorePart<Traits, false>& part) {
    sum_rows(args, part);
    write_row_sums(args, part);
  });
}

// Merges the parts into the first one, with one CTA per query head, so that the CTAs of the second
// pass need not do so.
__global__ void __launch_bounds__(kMergeThreads)
    score_keys_merge_kernel(const __grid_constant__ ScoreArgs args) {
  __shared__ MergeSlices slices;
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
  const int row = static_cast<int>(threadIdx.x) % kScoreTileRows;
  const int slice = static_cast<int>(threadIdx.x) / kScoreTileRows;
  float2* states = row_states(args, blockIdx.x) + row;
  const RowState all = merge_slices(states, args.num_states, slice, row, slices);
  if (slice == 0) *states = float2{all.max, all.sum};
}

template <class Traits>
__global__ void __launch_bounds__(kScoreThreads, 1)
    score_keys_importance_kernel(const __grid_constant__ ScoreArgs args) {
  run_pass<Traits, true>(args, [&](const ScorePart<Traits, true>& part) {
    Importance<Traits> importance(args, part);
    cudaGridDependencySynchronize();  // the first pass is complete
    importance.prepare();
    importance.run();
    importance.clear_rest();
  });
}

// Launches both passes. They differ in how they distribute the work and in what they load at once.
struct Passes {
  ScoreArgs sums;
  ScoreArgs importance;
};

int64_t num_sums_ctas(const ScoreArgs& args) {
  const Problem& problem = args.params.problem;
  return problem.batch * problem.num_kv_heads * args.plan.num_groups * args.plan.num_parts;
}

int64_t num_importance_ctas(const ScoreArgs& args) {
  const Problem& problem = args.params.problem;
  return problem.batch * problem.num_kv_heads * args.plan.num_parts;
}

int64_t shared_bytes(const ScoreArgs& args, bool is_first_pass) {
  const Problem& problem = args.params.problem;
  return score_shared_bytes(args.plan, is_first_pass, heads_per_kv(problem),
                            static_cast<int>(problem.head_dim));
}

template <class Element, int kHeadDim>
cudaError_t launch(const Passes& passes, cudaStream_t stream) {
  using Traits = ScoreTraits<Element, kHeadDim>;
  const Problem& problem = passes.sums.params.problem;
  cudaError_t error =
      launch_kernel(score_keys_sums_kernel<Traits>, passes.sums, num_sums_ctas(passes.sums),
                    kScoreThreads, shared_bytes(passes.sums, true), stream);
  if (error == cudaSuccess && passes.importance.num_merged < passes.sums.num_states) {
    error = launch_kernel(score_keys_merge_kernel, passes.sums, problem.batch * problem.num_q_heads,
                          kMergeThreads, 0, stream, true);
  }
  if (error != cudaSuccess) return error;
  return launch_kernel(score_keys_importance_kernel<Traits>, passes.importance,
                       num_importance_ctas(passes.importance), kScoreThreads,
                       shared_bytes(passes.importance, false), stream, true);
}

ScorePlan plan_of(const ScoreKeysParams& params, bool is_first_pass, int num_sms) {
  const Problem& problem = params.problem;
  return score_plan(is_first_pass, num_scored_keys(params), problem.batch * problem.num_kv_heads,
                    heads_per_kv(problem), num_sms, static_cast<int>(problem.head_dim));
}

const char* encode_operands(ScoreArgs& args, int64_t q_box_rows, int64_t k_box_rows) {
  const ScoreKeysParams& params = args.params;
  const Problem& problem = params.problem;
  ConstRows last_q = params.q;
  last_q.data = static_cast<const char*>(params.q.data) +
                2 * (problem.num_q - args.num_rows) * params.q.row_stride;
  if (const char* error = encode_rows(&args.q, last_q, problem, problem.num_q_heads, args.num_rows,
                                      q_box_rows, problem.head_dim)) {
    return error;
  }
  return encode_rows(&args.k, params.k, problem, problem.num_kv_heads, args.num_scored, k_box_rows,
                     problem.head_dim);
}

// Returns an error as text, or null.
const char* plan_passes(const ScoreKeysParams& params, void* workspace, int num_sms,
                        Passes& passes) {
  ScoreArgs args{};
  args.params = params;
  args.state = static_cast<float2*>(workspace);
  args.num_rows = static_cast<int>(num_score_rows(params.problem, params.blocking));
  args.num_scored = static_cast<int>(num_scored_keys(params));
  const ScorePlan first = plan_of(params, true, num_sms);
  const ScorePlan second = plan_of(params, false, num_sms);
  if (first.num_stages == 0 || second.num_stages == 0) return "too many query heads to a key head";
  args.num_states = first.num_parts;
  args.num_merged =
      first.num_parts * heads_per_kv(params.problem) > kMostMergedInPass ? 1 : first.num_parts;
  passes = Passes{args, args};
  passes.sums.plan = first;
  passes.sums.chunk_keys = first.keys_per_part;
  passes.importance.plan = second;
  passes.importance.chunk_keys = second.num_groups > 1 ? kChunkKeys : second.keys_per_part;
  if (larger(num_sums_ctas(passes.sums), num_importance_ctas(passes.importance)) >
      std::numeric_limits<int32_t>::max()) {
    return "too many heads for one grid";
  }
  const char* error = encode_operands(passes.sums, kScoreBlockRows, kScoreTileRows);
  return error != nullptr ? error
                          : encode_operands(passes.importance, kScoreTileRows, kScoreBlockRows);
}

}  // namespace

int64_t score_keys_workspace(const ScoreKeysParams& params) {
  const int num_sms = sms_of_workspace();
  const Problem& problem = params.problem;
  return problem.batch * problem.num_q_heads * plan_of(params, true, num_sms).num_parts *
         kScoreTileRows * static_cast<int64_t>(sizeof(float2));
}

const char* launch_score_keys(const ScoreKeysParams& params, void* workspace, void* stream) {
  const Problem& problem = params.problem;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (problem.batch * problem.num_perm_heads == 0 || problem.num_kv == 0) return nullptr;
  int num_sms = 0;
  if (const char* sms_error = count_sms(&num_sms)) return sms_error;
  if (num_scored_keys(params) == 0 || problem.num_q == 0) {
    return clear_importance(params, cuda_stream);
  }
  Passes passes;
  if (const char* plan_error = plan_passes(params, workspace, num_sms, passes)) return plan_error;
  const cudaError_t error = dispatch_half(problem.dtype, [&](auto element) {
    return dispatch_head_dim(problem.head_dim, [&](auto head_dim) {
      return launch<decltype(element), head_dim>(passes, cuda_stream);
    });
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pbs::cuda::sm90
