// score_keys on CUDA: two passes over the keys of the complete segments, on tensor cores.
#include <cuda_runtime.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <limits>

#include "../device.h"
#include "../launch.h"
#include "../tma.h"
#include "passes.cuh"

namespace pbs::cuda {
namespace {

// States of one query, over parts and heads, that each CTA of the second pass merges for itself.
constexpr int kMostMergedInPass = 256;

// 96 a thread are there at launch.
constexpr int kScoreProducerRegisters = 32;
constexpr int kScoreConsumerRegisters = 112;

template <class Traits, bool kKeysAreRows, class Pass>
__device__ void run_pass(const ScoreArgs& args) {
  extern __shared__ char raw[];
  const ScorePart<Traits> part(args, raw);
  ScoreBarriers& barriers = *part.barriers;
  if (threadIdx.x == 0) {
    constexpr int kPairWarps = kScorePairThreads / 32;
    for (int stage = 0; stage < Traits::kQStages; ++stage) {
      barriers.q_full[stage].init(1);
      barriers.q_empty[stage].init(kScorePairs * kPairWarps);
    }
    for (int tile = 0; tile < args.parts.tiles_per_chunk; ++tile) {
      barriers.k_full[tile].init(1);
      barriers.k_empty[tile].init(kPairWarps);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= kScoreConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<kScoreProducerRegisters>();
    if (threadIdx.x < kScoreConsumers + 32) load_operands(args, part);
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<kScoreConsumerRegisters>();
  Pass pass(args, part);
  if constexpr (kKeysAreRows) {
    cudaGridDependencySynchronize();  // the first pass is written
    pass.prepare();
  }
  consume_products<kKeysAreRows>(part, pass);
  pass.finish();
}

template <class Traits>
__global__ void __launch_bounds__(kScoreThreads, 1)
    row_sums_kernel(const __grid_constant__ ScoreArgs args) {
  cudaTriggerProgrammaticLaunchCompletion();  // the second pass may start to load
  run_pass<Traits, false, RowSums<Traits>>(args);
}

// One query head a CTA: merges the parts into the first, so that not every CTA of the second pass
// has to.
__global__ void __launch_bounds__(1024) merge_parts_kernel(const __grid_constant__ ScoreArgs args) {
  constexpr int kSlices = 1024 / kScoreRows;
  __shared__ float2 slices[kSlices][kScoreRows];
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
  const int row = static_cast<int>(threadIdx.x) % kScoreRows;
  const int slice = static_cast<int>(threadIdx.x) / kScoreRows;
  float2* states = row_states(args, blockIdx.x) + row;
  const RowState own =
      merge_parts(states + slice * kScoreRows, args.parts.num_parts - slice, kSlices);
  slices[slice][row] = float2{own.max, own.sum};
  __syncthreads();
  if (slice != 0) return;
  const RowState all = merge_parts(&slices[0][row], kSlices, 1);
  *states = float2{all.max, all.sum};
}

template <class Traits>
__global__ void __launch_bounds__(kScoreThreads, 1)
    importance_kernel(const __grid_constant__ ScoreArgs args) {
  run_pass<Traits, true, Importance<Traits>>(args);
}

int shared_bytes(const ScoreArgs& args) {
  const Problem& problem = args.params.problem;
  const int head_dim = static_cast<int>(problem.head_dim);
  return kSwizzleBytes + kScoreBarrierBytes +
         (score_q_stages(head_dim) + args.parts.tiles_per_chunk) * score_tile_bytes(head_dim) +
         static_cast<int>(problem.num_q_heads / problem.num_kv_heads) * kScoreHeadTable +
         args.parts.tiles_per_chunk * kScoreTileTable;
}

template <class Element, int kHeadDim>
cudaError_t launch(const ScoreArgs& args, cudaStream_t stream) {
  using Traits = ScoreTraits<Element, kHeadDim>;
  const Problem& problem = args.params.problem;
  const int bytes = shared_bytes(args);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim =
      static_cast<unsigned>(problem.batch * problem.num_kv_heads * args.parts.num_parts);
  config.blockDim = kScoreThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  for (const auto kernel : {row_sums_kernel<Traits>, importance_kernel<Traits>}) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  cudaError_t error = cudaLaunchKernelEx(&config, row_sums_kernel<Traits>, args);
  config.attrs = &attribute;  // what follows starts beside it
  config.numAttrs = 1;
  if (error == cudaSuccess && args.num_merged == 1 && args.parts.num_parts > 1) {
    cudaLaunchConfig_t merge = config;
    merge.gridDim = static_cast<unsigned>(problem.batch * problem.num_q_heads);
    merge.blockDim = 1024;
    merge.dynamicSmemBytes = 0;
    error = cudaLaunchKernelEx(&merge, merge_parts_kernel, args);
  }
  if (error == cudaSuccess) {
    error = cudaLaunchKernelEx(&config, importance_kernel<Traits>, args);
  }
  return error;
}

template <class Element>
cudaError_t launch_head_dim(const ScoreArgs& args, cudaStream_t stream) {
  switch (args.params.problem.head_dim) {
    case 64:
      return launch<Element, 64>(args, stream);
    case 96:
      return launch<Element, 96>(args, stream);
    case 128:
      return launch<Element, 128>(args, stream);
    default:
      return launch<Element, 256>(args, stream);
  }
}

int64_t num_scored_keys(const ScoreKeysParams& params) {
  return round_down(params.problem.num_kv, params.blocking.segment_size);
}

ScoreParts parts_of(const ScoreKeysParams& params, int num_sms) {
  const Problem& problem = params.problem;
  return score_parts(
      ceil_div(num_scored_keys(params), kScoreKeys), problem.batch * problem.num_kv_heads,
      problem.num_q_heads / problem.num_kv_heads, num_sms, static_cast<int>(problem.head_dim));
}

const char* encode_all(ScoreArgs& args) {
  const ScoreKeysParams& params = args.params;
  const Problem& problem = params.problem;
  ConstRows last_q = params.q;
  last_q.data = static_cast<const char*>(params.q.data) +
                2 * (problem.num_q - args.num_rows) * params.q.row_stride;
  if (const char* error = encode_rows(&args.q, last_q, problem, problem.num_q_heads, args.num_rows,
                                      kScoreRows, true)) {
    return error;
  }
  return encode_rows(&args.k, params.k, problem, problem.num_kv_heads, args.num_scored, kScoreKeys,
                     true);
}

}  // namespace

int64_t score_workspace_floats(const ScoreKeysParams& params) {
  int num_sms = 0;
  if (count_sms(&num_sms) != cudaSuccess) num_sms = 1;  // the launch will say why
  const Problem& problem = params.problem;
  return 2 * problem.batch * problem.num_q_heads * parts_of(params, num_sms).num_parts * kScoreRows;
}

const char* launch_score_keys(const ScoreKeysParams& params, float* workspace, void* stream) {
  const Problem& problem = params.problem;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t num_heads = problem.batch * problem.num_perm_heads;
  if (num_heads == 0 || problem.num_kv == 0) return nullptr;
  int num_sms = 0;
  cudaError_t error = count_sms(&num_sms);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  ScoreArgs args{};
  args.params = params;
  args.parts = parts_of(params, num_sms);
  args.state = reinterpret_cast<float2*>(workspace);
  args.num_merged =
      args.parts.num_parts * (problem.num_q_heads / problem.num_kv_heads) > kMostMergedInPass
          ? 1
          : args.parts.num_parts;
  args.num_rows = static_cast<int>(num_score_rows(problem, params.blocking));
  args.num_scored = static_cast<int>(num_scored_keys(params));
  if (args.num_scored == 0 || args.num_rows == 0) {
    error = cudaMemsetAsync(params.importance, 0, num_heads * problem.num_kv * sizeof(float),
                            cuda_stream);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  if (args.parts.tiles_per_chunk == 0) return "too many query heads to a key head";
  if (problem.batch * problem.num_kv_heads * args.parts.num_parts >
      std::numeric_limits<int32_t>::max()) {
    return "too many heads for one grid";
  }
  if (const char* encode_error = encode_all(args)) return encode_error;
  error = problem.dtype == DType::kBFloat16
              ? launch_head_dim<cutlass::bfloat16_t>(args, cuda_stream)
              : launch_head_dim<cutlass::half_t>(args, cuda_stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pbs::cuda
