// The CUDA backend of a build without CUDA kernels. It is registered so that the user reads why
// there are no kernels, instead of the dispatcher's list of backends.
#include "sequence_ops.h"

namespace pbs {
namespace {

struct NoCudaBackend {
  NoCudaBackend(const char* stage, const char* name, const Tensor& t) {
    check_defined(name, t);
    fail(stage,
         " has no CUDA kernel: this is a CPU-only build of pbs_attn (" PBS_CUDA_STATUS
         "), got a tensor on ",
         device_text(t));
  }

  // Never reached.
  template <class... Args>
  void check_score_keys(const Args&...) const {}
  template <class... Args>
  void check_sort_segments(const Args&...) const {}
  template <class... Args>
  void check_permute_kv(const Args&...) const {}
  template <class... Args>
  void check_select_blocks(const Args&...) const {}
  template <class... Args>
  void check_attend(const Args&...) const {}
  template <class... Args>
  void check_attention(const Args&...) const {}
  template <class... Args>
  void check_aligned_rows(const Args&...) const {}
  void score_keys(const ScoreKeysParams&) const {}
  void sort_segments(const SortSegmentsParams&) const {}
  void permute_kv(const PermuteKVParams&) const {}
  void copy_pages(const CopyPagesParams&) const {}
  void select_blocks(const SelectBlocksParams&) const {}
  void attend(const AttendParams&) const {}
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pbs, CUDA, m) {
  StageOps<NoCudaBackend>::register_all(m);
  SequenceOps<NoCudaBackend>::register_all(m);
}

}  // namespace pbs
