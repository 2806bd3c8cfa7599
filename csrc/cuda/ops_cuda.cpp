// The CUDA backend. Registered in every build: in one without CUDA the user learns why instead of
// reading the dispatcher's list of backends.
#include "stage_ops.h"

#ifdef PBS_WITH_CUDA
#include <dlfcn.h>

#include "launch.h"
#include "pbs/arch.h"
#include "pbs/sampled_plan.h"
#include "pbs/select_tiles.h"
#endif

namespace pbs {
namespace {

#ifdef PBS_WITH_CUDA

void check_cuda(const char* error, const char* what) {
  if (error != nullptr) fail("pbs_attn: ", what, " failed: ", error);
}

// Makes the tensor's device current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& t) {
    check_cuda(cuda::current_device(&previous_), "cudaGetDevice");
    check_cuda(cuda::set_device(t.get_device_index()), "cudaSetDevice");
  }
  ~DeviceGuard() { cuda::set_device(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// torch's current stream on the tensor's device. Looked up in the loaded libtorch_cuda, because
// the library also loads beside a torch without CUDA, which has no such symbol to link.
void* current_stream(const Tensor& t) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<GetStream>(symbol);
  }();
  void* stream = nullptr;
  if (get_stream == nullptr || get_stream(t.get_device_index(), &stream) != AOTI_TORCH_SUCCESS) {
    fail("pbs_attn: torch's current CUDA stream cannot be found");
  }
  return stream;
}

void check_aligned(const char* name, const ConstRows& rows, DType dtype) {
  const auto is_aligned = [](int64_t bytes) { return bytes % 16 == 0; };
  const int64_t size = element_size(dtype);
  if (!is_aligned(reinterpret_cast<int64_t>(rows.data)) || !is_aligned(rows.batch_stride * size) ||
      !is_aligned(rows.head_stride * size) || !is_aligned(rows.row_stride * size)) {
    fail(name, " must start at, and have strides of, a multiple of 16 bytes on CUDA, got strides (",
         rows.batch_stride, ", ", rows.head_stride, ", ", rows.row_stride, ") of ", size,
         "-byte elements and a start ", reinterpret_cast<int64_t>(rows.data) % 16,
         " bytes past such a multiple");
  }
}

// What the tensor cores take.
void check_half(DType dtype) {
  if (dtype == DType::kFloat32) fail("q must be bfloat16 or float16 on CUDA, got float32");
}

void check_positive(float scale) {
  if (!(scale > 0.0f)) fail("scale must be positive on CUDA, got ", scale);
}

void check_segment_fits(int64_t segment_size) {
  constexpr int64_t kMost = 4096;
  if (segment_size > kMost) {
    fail("segment_size must be at most ", kMost, " on CUDA, got ", segment_size);
  }
}

void check_score_fits(const Problem& problem, const Blocking& blocking, int64_t num_samples) {
  if (num_samples > kStackRows) {
    fail("num_samples must be at most ", kStackRows, " on CUDA, got ", num_samples);
  }
  if (num_samples > 0) return;
  const int64_t num_blocks = ceil_div(problem.num_kv, blocking.kv_block_size);
  const int64_t most = most_key_blocks(problem, blocking);
  if (num_blocks > most) {
    fail("k must have at most ", most, " key blocks of kv_block_size ", blocking.kv_block_size,
         " with these sizes on CUDA, got ", num_blocks);
  }
}

#endif

struct CudaBackend {
  static void require([[maybe_unused]] const char* stage, const Tensor& t) {
    if (!t.defined()) return;  // None, which the checks refuse by its name
#ifdef PBS_WITH_CUDA
    int capability = 0;
    check_cuda(cuda::compute_capability(t.get_device_index(), &capability),
               "cudaDeviceGetAttribute");
    const std::string error = capability_error(capability);
    if (!error.empty()) fail(error);
#else
    fail(stage,
         " has no CUDA kernel: this is a CPU-only build of pbs_attn (" PBS_CUDA_STATUS
         "), got a tensor on ",
         device_text(t));
#endif
  }

  static void check_attention([[maybe_unused]] const Tensor& q, [[maybe_unused]] const Tensor& k,
                              [[maybe_unused]] const Tensor& v, [[maybe_unused]] float scale,
                              [[maybe_unused]] const Problem& problem,
                              [[maybe_unused]] const Blocking& blocking,
                              [[maybe_unused]] int64_t num_samples) {
#ifdef PBS_WITH_CUDA
    const DType dtype = problem.dtype;
    check_half(dtype);
    check_aligned("q", const_rows(q), dtype);
    check_aligned("k", const_rows(k), dtype);
    check_aligned("v", const_rows(v), dtype);
    check_positive(scale);
    check_segment_fits(blocking.segment_size);
    check_score_fits(problem, blocking, num_samples);
#endif
  }

  static void score_keys([[maybe_unused]] const ScoreKeysParams& params,
                         [[maybe_unused]] const Tensor& like) {
#ifdef PBS_WITH_CUDA
    const DType dtype = params.problem.dtype;
    check_half(dtype);
    check_aligned("q", params.q, dtype);
    check_aligned("k", params.k, dtype);
    check_positive(params.scale);
    run_with_workspace<float>("score_keys", like, ScalarType::Float, params,
                              cuda::score_workspace_floats, cuda::launch_score_keys);
#endif
  }

  static void sort_segments([[maybe_unused]] const SortSegmentsParams& params,
                            [[maybe_unused]] const Tensor& like) {
#ifdef PBS_WITH_CUDA
    check_segment_fits(params.segment_size);
    const DeviceGuard guard(like);
    check_cuda(cuda::launch_sort_segments(params, current_stream(like)), "sort_segments");
#endif
  }

  static void permute_kv([[maybe_unused]] const PermuteKVParams& params,
                         [[maybe_unused]] const Tensor& like) {
#ifdef PBS_WITH_CUDA
    check_aligned("k", params.k, params.problem.dtype);
    check_aligned("v", params.v, params.problem.dtype);
    const DeviceGuard guard(like);
    check_cuda(cuda::launch_permute_kv(params, current_stream(like)), "permute_kv");
#endif
  }

  static void select_blocks([[maybe_unused]] const SelectBlocksParams& params,
                            [[maybe_unused]] const Tensor& like) {
#ifdef PBS_WITH_CUDA
    check_aligned("q", params.q, params.problem.dtype);
    check_aligned("k", params.k, params.problem.dtype);
    check_score_fits(params.problem, params.blocking, params.num_samples);
    if (params.num_samples == 0) {
      run_with_workspace<float>("select_blocks", like, ScalarType::Float, params,
                                cuda::select_workspace_floats, cuda::launch_select_blocks);
      return;
    }
    check_half(params.problem.dtype);
    check_aligned("k_perm", params.k_perm, params.problem.dtype);
    check_positive(params.scale);
    run_with_workspace<float>("select_blocks", like, ScalarType::Float, params,
                              cuda::sampled_workspace_floats, cuda::launch_select_sampled);
#endif
  }

  static void attend([[maybe_unused]] const AttendParams& params,
                     [[maybe_unused]] const Tensor& like) {
#ifdef PBS_WITH_CUDA
    const DType dtype = params.problem.dtype;
    check_half(dtype);
    check_aligned("q", params.q, dtype);
    check_aligned("k", params.k, dtype);
    check_aligned("v", params.v, dtype);
    check_aligned("k_perm", params.k_perm, dtype);
    check_aligned("v_perm", params.v_perm, dtype);
    check_positive(params.scale);
    run_with_workspace<int32_t>("attend", like, ScalarType::Int, params,
                                cuda::attend_workspace_ints, cuda::launch_attend);
#endif
  }

#ifdef PBS_WITH_CUDA
 private:
  template <class T, class Params>
  static void run_with_workspace(const char* stage, const Tensor& like, ScalarType dtype,
                                 const Params& params, int64_t (*size)(const Params&),
                                 const char* (*launch)(const Params&, T*, void*)) {
    const DeviceGuard guard(like);
    const Tensor workspace = StageOps<CudaBackend>::new_tensor(like, {size(params)}, dtype);
    check_cuda(launch(params, workspace.mutable_data_ptr<T>(), current_stream(like)), stage);
  }
#endif
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pbs, CUDA, m) { StageOps<CudaBackend>::register_all(m); }

}  // namespace pbs
