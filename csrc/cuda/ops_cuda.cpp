// The CUDA backend in a build with CUDA kernels. It chooses the GPU family of a call and passes on
// the device, the stream and the memory of torch.
#include <dlfcn.h>

#include <cstdlib>

#include "device.h"
#include "launch.h"
#include "pbs/arch.h"
#include "pbs/driver.h"
#include "sequence_ops.h"

namespace pbs {
namespace {

void check_cuda(const char* error, const char* what) {
  if (error == nullptr) return;
  // If torch has kernels of an older CUDA, an old driver runs those of torch and none of this
  // library.
  const std::string reason = driver_error(cuda::driver_version(), cuda::toolkit_version());
  if (!reason.empty()) fail(reason);
  fail("pbs_attn: ", what, " failed: ", error);
}

// Makes the device of the tensor the current one during the lifetime of this object.
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

// torch's current stream on the device of the tensor. The function is looked up in the loaded
// libtorch_cuda, because the library also loads with a torch without CUDA, which lacks the symbol.
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

// Checks the dtypes that tensor cores take.
void check_half(DType dtype) {
  if (dtype == DType::kFloat32) fail("q must be bfloat16 or float16 on CUDA, got float32");
}

void check_positive(float scale) {
  if (!(scale > 0.0f)) fail("scale must be positive on CUDA, got ", scale);
}

const cuda::Launchers& launchers_for(const Tensor& t) {
  int capability = 0;
  check_cuda(cuda::compute_capability(t.get_device_index(), &capability), "cudaDeviceGetAttribute");
  // The variable is read at each call, so that a program can compare families.
  const char* variable = std::getenv(kFamilyVariable);
  const std::string wanted = variable == nullptr ? "" : variable;
  const int family = find_family(capability, wanted);
  if (family < 0) fail(capability_error(capability, wanted));
  return cuda::launchers(family);
}

class CudaBackend {
 public:
  CudaBackend(const char*, const char* name, const Tensor& t)
      : like_(defined(name, t)), launchers_(launchers_for(t)), guard_(t) {}

  void check_score_keys(const ScoreKeysParams& params) const {
    check_half(params.problem.dtype);
    check_operands(params.q, params.k, params.problem.dtype);
    check_positive(params.scale);
  }

  void check_sort_segments(const SortSegmentsParams& params) const {
    check_segment_fits(params.segment_size);
  }

  static void check_permute_kv(const PermuteKVParams& params) {
    check_aligned("k", params.k, params.problem.dtype);
    check_aligned("v", params.v, params.problem.dtype);
  }

  void check_select_blocks(const SelectBlocksParams& params) const {
    check_operands(params.q, params.k, params.problem.dtype);
    check_rule_fits("k", params.problem, params.blocking, params.rule);
    if (reads_means(params.rule.score)) return;
    check_half(params.problem.dtype);
    check_aligned("k_perm", params.k_perm, params.problem.dtype);
    check_positive(params.scale);
  }

  static void check_attend(const AttendParams& params) {
    const DType dtype = params.problem.dtype;
    check_half(dtype);
    check_operands(params.q, params.k, dtype);
    check_aligned("v", params.v, dtype);
    check_aligned("k_perm", params.k_perm, dtype);
    check_aligned("v_perm", params.v_perm, dtype);
    check_positive(params.scale);
  }

  void check_attention(const Operands& operands, const OperandNames& names, const Problem& problem,
                       const Blocking& blocking, float scale, const SelectRule& rule) const {
    check_half(problem.dtype);
    check_aligned(names.q, operands.q, problem.dtype);
    check_aligned(names.k, operands.k, problem.dtype);
    check_aligned(names.v, operands.v, problem.dtype);
    check_positive(scale);
    check_segment_fits(blocking.segment_size);
    check_rule_fits(names.k, problem, blocking, rule);
  }

  static void check_aligned_rows(const char* name, const ConstRows& rows, DType dtype) {
    check_aligned(name, rows, dtype);
  }

  void score_keys(const ScoreKeysParams& params) const {
    run("score_keys", launchers_.score_keys, params);
  }
  void sort_segments(const SortSegmentsParams& params) const {
    run("sort_segments", launchers_.sort_segments, params);
  }
  void permute_kv(const PermuteKVParams& params) const {
    run("permute_kv", launchers_.permute_kv, params);
  }
  void copy_pages(const CopyPagesParams& params) const {
    run("copy_pages", launchers_.copy_pages, params);
  }
  void select_blocks(const SelectBlocksParams& params) const {
    run("select_blocks", launchers_.select_blocks, params);
  }
  void attend(const AttendParams& params) const { run("attend", launchers_.attend, params); }

 private:
  static const Tensor& defined(const char* name, const Tensor& t) {
    check_defined(name, t);
    return t;
  }

  static void check_operands(const ConstRows& q, const ConstRows& k, DType dtype) {
    check_aligned("q", q, dtype);
    check_aligned("k", k, dtype);
  }

  void check_segment_fits(int64_t segment_size) const {
    if (segment_size > launchers_.max_segment_size) {
      fail("segment_size must be at most ", launchers_.max_segment_size, " on CUDA, got ",
           segment_size);
    }
  }

  void check_rule_fits(const char* k_name, const Problem& problem, const Blocking& blocking,
                       const SelectRule& rule) const {
    if (!reads_means(rule.score)) {
      if (rule.num_samples > launchers_.max_samples) {
        fail("num_samples must be at most ", launchers_.max_samples, " on CUDA, got ",
             rule.num_samples);
      }
      return;
    }
    const int64_t most = launchers_.max_key_blocks(problem, blocking);
    if (num_key_blocks(problem, blocking) > most) {
      fail(k_name, " must have at most ", most, " key blocks of kv_block_size ",
           blocking.kv_block_size, " with these sizes on CUDA, got ",
           num_key_blocks(problem, blocking));
    }
  }

  template <class Params>
  void run(const char* stage, const cuda::StageLaunch<Params>& kernel, const Params& params) const {
    const int64_t bytes = kernel.workspace_bytes(params);
    void* workspace = nullptr;
    Tensor memory;
    if (bytes > 0) {
      memory = new_tensor(like_, {bytes}, ScalarType::Byte);
      workspace = memory.mutable_data_ptr();
    }
    check_cuda(kernel.launch(params, workspace, current_stream(like_)), stage);
  }

  const Tensor& like_;
  const cuda::Launchers& launchers_;
  DeviceGuard guard_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pbs, CUDA, m) {
  StageOps<CudaBackend>::register_all(m);
  SequenceOps<CudaBackend>::register_all(m);
}

}  // namespace pbs
