// permute_kv on CUDA: a warp reads the source rows of its output rows of K or V, and stores them.
// The means of permuted key blocks come from the same registers. Rows are read again only for other
// permutations of the same head, and then mostly from L2.
#include <cuda_runtime.h>

#include "common/elements.h"
#include "common/permute_kv.cuh"
#include "sm80/launch.h"

namespace pbs::cuda::sm80 {
namespace {

constexpr int kCtasPerSm = 3;  // with 80 registers per thread

template <class T>
__global__ void __launch_bounds__(kWindowThreads, kCtasPerSm)
    permute_kv_kernel(const PermuteKVParams params) {
  extern __shared__ float sums[];  // (kWindowWarps, width)
  const Problem& problem = params.problem;
  if (has_bad_page(params.pages)) return;  // nothing is written
  const Window window = window_of<T>(params);
  const int thread = static_cast<int>(threadIdx.x);
  const Source<T> source = source_of<T>(params, window);
  const int num_perms =
      static_cast<int>(problem.num_perm_heads) / static_cast<int>(problem.num_kv_heads);
  const int64_t first_head = window.b * problem.num_perm_heads + window.kv_head * num_perms;
  const bool takes_part = thread < window.num_copied;
  const int32_t* perm = params.perm + first_head * problem.num_kv + window.begin + thread;
  const int first_of_warp = thread / 32 * 32;
  // All rows of a warp are in one page.
  const MutableRows& output = window.is_key ? params.k_perm : params.v_perm;
  RowPlace place{};  // used by warps without rows
  if (first_of_warp < window.num_copied) {
    place = place_in_pages(params.pages, static_cast<int>(window.b),
                           static_cast<int>(params.first_page_row) + window.begin + first_of_warp);
  }
  T* out = static_cast<T*>(output.data) + row_start(output, place, window.kv_head * num_perms) +
           window.first_column;
  const auto out_stride = static_cast<int>(output.row_stride);
  const int num_rows = rows_of_warp(window.num_copied);
  float* sums_of_warp = sums + first_of_warp / 32 * window.width;
  // NOTE: a kernel cannot raise an error. NaN shows a bad permutation, without a stray read.
  const auto read = [&](int column, int row) {
    const bool is_valid = row >= 0 && row < source.num_rows;
    const T* from = source.rows + (is_valid ? row : 0) * source.row_stride + column;
    const Piece<T> piece = *reinterpret_cast<const Piece<T>*>(from);
    return is_valid ? piece : nan_piece<T>();
  };
  int32_t next = takes_part ? *perm : 0;
  for (int p = 0; p < num_perms; ++p) {
    const int32_t row = next;
    perm += problem.num_kv;
    if (takes_part && p + 1 < num_perms) next = *perm;
    if (window.is_key && params.k_mean != nullptr) {
      store_rows<true>(read, window.width, row, num_rows, out, out_stride, sums_of_warp);
      __syncthreads();
      write_means(params, window, first_head + p, sums);
      __syncthreads();  // all warps have finished with these sums
    } else {
      store_rows<false>(read, window.width, row, num_rows, out, out_stride, sums_of_warp);
    }
    out += output.head_stride;
  }
}

}  // namespace

int64_t permute_kv_workspace(const PermuteKVParams&) { return 0; }

const char* launch_permute_kv(const PermuteKVParams& params, void*, void* stream) {
  return dispatch_element(params.problem.dtype, [&](auto element) {
    using T = decltype(element);
    return launch_windows<T>(permute_kv_kernel<T>, params, kWindowWarps * int{sizeof(float)},
                             static_cast<cudaStream_t>(stream));
  });
}

}  // namespace pbs::cuda::sm80
