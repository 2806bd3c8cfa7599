// permute_kv on CUDA: a CTA loads a window of K or V rows to shared memory and stores them in the
// order of each permutation of that key head; means of permuted key blocks come from the same
// registers. Loads are bulk copies: no registers limit how many bytes are in flight. A permutation
// that leaves the window, as only segments longer than it do, loads its rows one by one, mostly
// from L2.
#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>

#include <cute/arch/copy_sm90_tma.hpp>
#include <limits>

#include "common/elements.h"
#include "common/launch_kernel.h"
#include "common/pages.cuh"
#include "pbs/geometry.h"
#include "sm90/launch.h"

namespace pbs::cuda::sm90 {
namespace {

using Barrier = cutlass::arch::ClusterTransactionBarrier;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWindowRows = 256;
constexpr int kMostRowBytes = 256;  // of a window; longer rows go to several
constexpr int kRowsAtOnce = 4;      // of a lane
constexpr int kCtasPerSm = 3;       // some load while others store
static_assert(kThreads == kWindowRows, "thread i has row i, its warp the 32 rows around it");

template <class T>
constexpr int kPiece = 16 / sizeof(T);

template <class T>
using Piece = cutlass::AlignedArray<T, kPiece<T>, 16>;

__host__ __device__ constexpr int num_splits(int64_t head_dim, int element_bytes) {
  return static_cast<int>(ceil_div(head_dim * element_bytes, kMostRowBytes));
}

// What a CTA works on: `width` columns of rows [begin, begin + num_rows) of K or of V, of which it
// writes the first num_copied, permuted.
struct Window {
  int64_t b;
  int64_t kv_head;
  int begin;
  int num_rows;
  int num_copied;
  int first_column;
  int width;
  bool is_key;
};

template <class T>
__device__ Window window_of(const PermuteKVParams& params) {
  const Problem& problem = params.problem;
  const int splits = num_splits(problem.head_dim, sizeof(T));
  const auto num_windows = static_cast<int>(ceil_div(params.num_copied, kWindowRows));
  const auto num_kv_heads = static_cast<int>(problem.num_kv_heads);
  // Heads before windows: those of a (B, N, H, D) tensor have their rows side by side.
  const int part = static_cast<int>(blockIdx.x) % (2 * splits);
  const int item = static_cast<int>(blockIdx.x) / (2 * splits);
  const int window_idx = item / num_kv_heads;
  Window window{};
  window.kv_head = item % num_kv_heads;
  window.b = window_idx / num_windows;
  window.begin = window_idx % num_windows * kWindowRows;
  window.num_rows = static_cast<int>(smaller(kWindowRows, problem.num_kv - window.begin));
  window.num_copied = static_cast<int>(smaller(kWindowRows, params.num_copied - window.begin));
  window.width = static_cast<int>(problem.head_dim) / splits;
  window.first_column = part / 2 * window.width;
  window.is_key = part % 2 == 0;
  return window;
}

// Returns how many of the first num_rows rows of a window belong to this warp.
__device__ int rows_of_warp(int num_rows) {
  return max(0, min(32, num_rows - static_cast<int>(threadIdx.x) / 32 * 32));
}

// Where rows come from: those of a head, from the first column of the window on.
template <class T>
struct Source {
  const T* rows;
  int64_t row_stride;
  int num_rows;
};

// The rows in shared memory, and the barrier that counts the bytes loaded to them.
template <class T>
struct Slots {
  T* data;  // (kWindowRows, width)
  uint64_t* full;
  int width;
  uint32_t parity;

  __device__ T* row(int slot) const { return data + slot * width; }
  __device__ int bytes(int num_rows) const { return num_rows * width * int{sizeof(T)}; }

  // Says how many rows this warp is about to load.
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

// Starts to load the window in its own order; each warp its share.
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
    // NOTE: a kernel cannot raise; NaN makes a bad permutation visible without a stray read.
    Piece<T> piece;
    piece.fill(T(std::numeric_limits<float>::quiet_NaN()));
    for (int column = 0; column < slots.width; column += kPiece<T>) {
      *reinterpret_cast<Piece<T>*>(slots.row(thread) + column) = piece;
    }
    cutlass::arch::fence_view_async_shared();  // a bulk copy may write there next
  }
}

// Stores the num_rows output rows of this warp, lane i of which knows the slot of the i-th, and
// writes their sum where it is asked for. Lanes hold pieces of as many rows as they can. (A bulk
// copy a row would be shorter, but takes about 25 cycles of an SM whatever its length.)
template <bool kAdds, class T>
__device__ void store_rows(const Slots<T>& slots, int slot, int num_rows, T* out, int out_stride,
                           float* sums) {
  const cutlass::NumericArrayConverter<float, T, kPiece<T>> to_floats;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int num_pieces = slots.width / kPiece<T>;
  const bool is_narrow = num_pieces <= 8;
  const int lanes_per_row = is_narrow ? 8 : 16;
  const int step = is_narrow ? 4 : 2;
  const int piece = lane & (lanes_per_row - 1);
  const int first_row = is_narrow ? lane / 8 : lane / 16;
  const T* column = slots.data + min(piece, num_pieces - 1) * kPiece<T>;
  const int num_stored = piece < num_pieces ? num_rows : 0;
  out += piece * kPiece<T>;
  cutlass::AlignedArray<float, kPiece<T>, 16> total;
  total.clear();
  __syncwarp();  // a lane may have filled its slot with NaN
#pragma unroll 1
  for (int i = 0; i < lanes_per_row; i += kRowsAtOnce) {
    const int row = first_row + i * step;
    Piece<T> pieces[kRowsAtOnce];
    // Slots of absent rows are read, too, so that no branch keeps the reads apart.
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const int from = __shfl_sync(~0u, slot, row + j * step);
      pieces[j] = *reinterpret_cast<const Piece<T>*>(column + from * slots.width);
    }
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      if (row + j * step >= num_stored) continue;
      *reinterpret_cast<Piece<T>*>(out + (row + j * step) * out_stride) = pieces[j];
      if constexpr (kAdds) {
        const cutlass::Array<float, kPiece<T>> widened = to_floats(pieces[j]);
#pragma unroll
        for (int e = 0; e < kPiece<T>; ++e) total[e] += widened[e];
      }
    }
  }
  if constexpr (kAdds) {
    for (int lanes = lanes_per_row; lanes < 32; lanes *= 2) {
#pragma unroll
      for (int e = 0; e < kPiece<T>; ++e) total[e] += __shfl_xor_sync(~0u, total[e], lanes);
    }
    if (lane < min(lanes_per_row, num_pieces)) {
      *reinterpret_cast<decltype(total)*>(sums + piece * kPiece<T>) = total;
    }
  }
}

// Writes the means of the key blocks of the window, from the sums of its warps: a thread works for
// the key block that its row is in.
__device__ void write_means(const PermuteKVParams& params, const Window& window, int64_t head,
                            const float* sums) {
  const auto head_dim = static_cast<int>(params.problem.head_dim);
  const auto kv_block_size = static_cast<int>(params.kv_block_size);
  const int thread = static_cast<int>(threadIdx.x);
  const int first_column = thread % kv_block_size;
  const int first_row = thread - first_column;
  const int num_rows = min(kv_block_size, window.num_copied - first_row);
  if (num_rows <= 0) return;
  const int num_kv_blocks = (static_cast<int>(params.problem.num_kv) - 1) / kv_block_size + 1;
  const int64_t kv_block = head * num_kv_blocks + (window.begin + first_row) / kv_block_size;
  float* means = params.k_mean + kv_block * head_dim + window.first_column;
  sums += first_row / 32 * window.width;
  for (int column = first_column; column < window.width; column += kv_block_size) {
    float sum = 0.0f;
#pragma unroll 1
    for (int w = 0; w < kv_block_size / 32; ++w) sum += sums[w * window.width + column];
    means[column] = sum / static_cast<float>(num_rows);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    permute_kv_kernel(const PermuteKVParams params) {
  extern __shared__ uint4 raw[];
  __shared__ uint64_t full;
  const Problem& problem = params.problem;
  if (has_bad_page(params.pages)) return;  // nothing is written
  const Window window = window_of<T>(params);
  const int thread = static_cast<int>(threadIdx.x);
  Slots<T> slots{reinterpret_cast<T*>(raw), &full, window.width, 0};
  float* sums = reinterpret_cast<float*>(slots.row(kWindowRows));  // (kWarps, width)
  if (thread == 0) {
    Barrier::init(&full, kWarps);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const ConstRows& input = window.is_key ? params.k : params.v;
  const Source<T> source{static_cast<const T*>(input.data) + window.b * input.batch_stride +
                             window.kv_head * input.head_stride + window.first_column,
                         input.row_stride, static_cast<int>(problem.num_kv)};
  load_window(source, window, slots);
  const int num_perms =
      static_cast<int>(problem.num_perm_heads) / static_cast<int>(problem.num_kv_heads);
  const int64_t first_head = window.b * problem.num_perm_heads + window.kv_head * num_perms;
  const int64_t first_row = first_head * problem.num_kv + window.begin;
  const bool takes_part = thread < window.num_copied;
  const int32_t* perm = params.perm + first_row + thread;
  const int first_of_warp = thread / 32 * 32;
  // The rows of a warp are in one page.
  const MutableRows& output = window.is_key ? params.k_perm : params.v_perm;
  RowPlace place{};  // of a warp that has none
  if (first_of_warp < window.num_copied) {
    place = place_in_pages(params.pages, static_cast<int>(window.b),
                           static_cast<int>(params.first_page_row) + window.begin + first_of_warp);
  }
  T* out = static_cast<T*>(output.data) + row_start(output, place, window.kv_head * num_perms) +
           window.first_column;
  const auto out_stride = static_cast<int>(output.row_stride);
  const int num_rows = rows_of_warp(window.num_copied);
  float* sums_of_warp = sums + first_of_warp / 32 * window.width;
  int32_t next = takes_part ? *perm : 0;
  slots.wait();

  bool holds_window = true;
  for (int p = 0; p < num_perms; ++p) {
    const int32_t row = next;
    perm += problem.num_kv;
    if (takes_part && p + 1 < num_perms) next = *perm;
    // A row before the window, or a negative one, wraps around to a large number.
    const uint32_t in_window = static_cast<uint32_t>(row) - static_cast<uint32_t>(window.begin);
    // The vote is also the barrier behind which no thread reads what the slots hold.
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
      store_rows<true>(slots, slot, num_rows, out, out_stride, sums_of_warp);
      __syncthreads();
      write_means(params, window, first_head + p, sums);
    } else {
      store_rows<false>(slots, slot, num_rows, out, out_stride, sums_of_warp);
    }
    out += output.head_stride;
  }
}

template <class T>
const char* launch(const PermuteKVParams& params, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const int splits = num_splits(problem.head_dim, sizeof(T));
  const int64_t num_ctas =
      2 * splits * problem.batch * problem.num_kv_heads * ceil_div(params.num_copied, kWindowRows);
  if (num_ctas == 0 || problem.num_perm_heads == 0) return nullptr;
  if (num_ctas > std::numeric_limits<int32_t>::max()) return "too many keys for one grid";
  const int width = static_cast<int>(problem.head_dim) / splits;
  const int bytes = width * static_cast<int>(kWindowRows * sizeof(T) + kWarps * sizeof(float));
  const cudaError_t error =
      launch_kernel(permute_kv_kernel<T>, params, num_ctas, kThreads, bytes, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

int64_t permute_kv_workspace(const PermuteKVParams&) { return 0; }

const char* launch_permute_kv(const PermuteKVParams& params, void*, void* stream) {
  return dispatch_element(params.problem.dtype, [&](auto element) {
    return launch<decltype(element)>(params, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace pbs::cuda::sm90
