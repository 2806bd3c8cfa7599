// permute_kv on CUDA: a CTA loads a window of K or V rows to shared memory, and stores them in the
// order of each permutation of that key head. The means of permuted key blocks come from the same
// registers. Loads are bulk copies, so registers do not limit the bytes in flight. Only segments
// longer than the window have permutations that leave it. Their rows are loaded one by one, mostly
// from L2.
#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "common/elements.h"
#include "common/permute_kv.cuh"
#include "sm90/launch.h"

namespace pbs::cuda::sm90 {
namespace {

using Barrier = cutlass::arch::ClusterTransactionBarrier;

constexpr int kCtasPerSm = 3;  // some load while others store

// The rows in shared memory, and the barrier that counts the bytes loaded to them.
template <class T>
struct Slots {
  T* data;  // (kWindowRows, width)
  uint64_t* full;
  int width;
  uint32_t parity;

  __device__ T* row(int slot) const { return data + slot * width; }
  __device__ int bytes(int num_rows) const { return num_rows * width * int{sizeof(T)}; }

  // Announces how many rows this warp is about to load.
  __device__ void expect(int num_rows) const {
    if (threadIdx.x % 32 == 0) Barrier::arrive_and_expect_tx(full, bytes(num_rows));
    __syncwarp();
  }

  __device__ void load(const T* from, int slot, int num_rows) const {
    cute::SM90_BULK_COPY_G2S::copy(from, full, row(slot), bytes(num_rows));
  }

  __device__ void wait() {
    Barrier::wait(full, parity);
    parity ^= 1;
  }
};

// Starts to load the window in its own order. Each warp loads its share.
template <class T>
__device__ void load_window(const Source<T>& source, const Window& window, const Slots<T>& slots) {
  const int thread = static_cast<int>(threadIdx.x);
  const int num_rows = rows_of_warp(window.num_rows);
  const bool is_contiguous = source.row_stride == window.width;
  slots.expect(num_rows);
  if (thread % 32 < (is_contiguous ? min(1, num_rows) : num_rows)) {
    slots.load(source.rows + (window.begin + thread) * source.row_stride, thread,
               is_contiguous ? num_rows : 1);
  }
}

// Starts to load row `row` to the slot of this thread, if it takes part.
template <class T>
__device__ void load_row(const Source<T>& source, int32_t row, bool takes_part,
                         const Slots<T>& slots) {
  const int thread = static_cast<int>(threadIdx.x);
  const bool is_valid = takes_part && row >= 0 && row < source.num_rows;
  slots.expect(__popc(__ballot_sync(~0u, is_valid)));
  if (is_valid) {
    slots.load(source.rows + row * source.row_stride, thread, 1);
  } else if (takes_part) {
    // NOTE: a kernel cannot raise an error. NaN shows a bad permutation, without a stray read.
    for (int column = 0; column < slots.width; column += kPiece<T>) {
      *reinterpret_cast<Piece<T>*>(slots.row(thread) + column) = nan_piece<T>();
    }
    cutlass::arch::fence_view_async_shared();  // the next bulk copy may write there
  }
}

template <class T>
__global__ void __launch_bounds__(kWindowThreads, kCtasPerSm)
    permute_kv_kernel(const PermuteKVParams params) {
  extern __shared__ uint4 raw[];
  __shared__ uint64_t full;
  const Problem& problem = params.problem;
  if (has_bad_page(params.pages)) return;  // nothing is written
  const Window window = window_of<T>(params);
  const int thread = static_cast<int>(threadIdx.x);
  Slots<T> slots{reinterpret_cast<T*>(raw), &full, window.width, 0};
  float* sums = reinterpret_cast<float*>(slots.row(kWindowRows));  // (kWindowWarps, width)
  if (thread == 0) {
    Barrier::init(&full, kWindowWarps);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const Source<T> source = source_of<T>(params, window);
  load_window(source, window, slots);
  const int num_perms =
      static_cast<int>(problem.num_perm_heads) / static_cast<int>(problem.num_kv_heads);
  const int64_t first_head = window.b * problem.num_perm_heads + window.kv_head * num_perms;
  const int64_t first_row = first_head * problem.num_kv + window.begin;
  const bool takes_part = thread < window.num_copied;
  const int32_t* perm = params.perm + first_row + thread;
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
  const auto read = [&](int column, int slot) {
    return *reinterpret_cast<const Piece<T>*>(slots.data + column + slot * slots.width);
  };
  int32_t next = takes_part ? *perm : 0;
  slots.wait();

  bool holds_window = true;
  for (int p = 0; p < num_perms; ++p) {
    const int32_t row = next;
    perm += problem.num_kv;
    if (takes_part && p + 1 < num_perms) next = *perm;
    // A row before the window, or a negative one, wraps around to a large number.
    const uint32_t in_window = static_cast<uint32_t>(row) - static_cast<uint32_t>(window.begin);
    // The vote is also a barrier: after it, no thread reads the contents of the slots.
    const bool is_local =
        __syncthreads_and(!takes_part || in_window < static_cast<uint32_t>(window.num_rows));
    if (!is_local || !holds_window) {
      if (is_local) {
        load_window(source, window, slots);
      } else {
        load_row(source, row, takes_part, slots);
      }
      slots.wait();
      holds_window = is_local;
    }
    const int slot = is_local && takes_part ? static_cast<int>(in_window) : thread;
    if (window.is_key && params.k_mean != nullptr) {
      store_rows<true>(read, window.width, slot, num_rows, out, out_stride, sums_of_warp);
      __syncthreads();
      write_means(params, window, first_head + p, sums);
    } else {
      store_rows<false>(read, window.width, slot, num_rows, out, out_stride, sums_of_warp);
    }
    out += output.head_stride;
  }
}

}  // namespace

int64_t permute_kv_workspace(const PermuteKVParams&) { return 0; }

const char* launch_permute_kv(const PermuteKVParams& params, void*, void* stream) {
  return dispatch_element(params.problem.dtype, [&](auto element) {
    using T = decltype(element);
    return launch_windows<T>(permute_kv_kernel<T>, params,
                             kWindowRows * int{sizeof(T)} + kWindowWarps * int{sizeof(float)},
                             static_cast<cudaStream_t>(stream));
  });
}

}  // namespace pbs::cuda::sm90
