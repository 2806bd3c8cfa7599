// copy_pages on CUDA: copies the keys and values of one sequence out of pages of any size. A CTA
// copies kRows rows of one head of K or of V.
#include <cuda_runtime.h>

#include <limits>

#include "common/launch.h"
#include "common/launch_kernel.h"
#include "common/pages.cuh"

namespace pbs::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64;
constexpr int kAtOnce = 4;  // 16-byte pieces that a thread has in flight
// NaN in each dtype.
constexpr uint32_t kNanWord = 0x7fff7fffu;

__global__ void __launch_bounds__(kThreads) copy_pages_kernel(const CopyPagesParams params) {
  // NOTE: a kernel cannot raise an error. NaN shows that the table is bad, without a stray access.
  // Later kernels also read pages that are not copied, so the whole table is checked.
  const bool is_bad = has_bad_page(params.pages);
  const auto num_chunks = static_cast<int>(ceil_div(params.num_rows, kRows));
  const int chunk = static_cast<int>(blockIdx.x) % num_chunks;
  const int part = static_cast<int>(blockIdx.x) / num_chunks;
  const bool is_key = part % 2 == 0;
  const int head = part / 2;
  const auto size = static_cast<int>(element_size(params.dtype));
  const auto num_pieces = static_cast<uint32_t>(params.head_dim) * size / 16;  // per row
  const ConstRows& pages = is_key ? params.k_pages : params.v_pages;
  const MutableRows& rows = is_key ? params.k : params.v;
  const int first = chunk * kRows;
  const auto num_rows = static_cast<uint32_t>(smaller(kRows, params.num_rows - first));
  const uint32_t num_items = num_rows * num_pieces;
#pragma unroll 1
  for (uint32_t base = threadIdx.x; base < num_items; base += kAtOnce * kThreads) {
    uint4 pieces[kAtOnce];
    char* to[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint32_t item = base + i * kThreads;
      if (item >= num_items) continue;
      const auto row = static_cast<int>(item / num_pieces) + first;
      const int64_t column = item % num_pieces * 16;
      const RowPlace in_page =
          is_bad ? RowPlace{0, 0} : place_of(params.pages, 0, params.first_row + row);
      to[i] = static_cast<char*>(rows.data) + size * row_start(rows, {0, row}, head) + column;
      const char* from =
          static_cast<const char*>(pages.data) + size * row_start(pages, in_page, head) + column;
      pieces[i] = is_bad ? uint4{kNanWord, kNanWord, kNanWord, kNanWord}
                         : *reinterpret_cast<const uint4*>(from);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (base + i * kThreads < num_items) *reinterpret_cast<uint4*>(to[i]) = pieces[i];
    }
  }
}

}  // namespace

int64_t copy_pages_workspace(const CopyPagesParams&) { return 0; }

const char* launch_copy_pages(const CopyPagesParams& params, void*, void* stream) {
  const int64_t num_ctas = 2 * params.num_heads * ceil_div(params.num_rows, kRows);
  if (num_ctas == 0) return nullptr;
  if (num_ctas > std::numeric_limits<int32_t>::max()) return "too many keys for one grid";
  const cudaError_t error = launch_kernel(copy_pages_kernel, params, num_ctas, kThreads, 0,
                                          static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pbs::cuda
