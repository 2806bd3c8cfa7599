// Means of rows.
#pragma once

#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>

#include <cstdint>

namespace pbs::cuda {

template <class T>
using Piece = cutlass::AlignedArray<T, 16 / sizeof(T), 16>;

// Calls write(d, mean) with the mean of rows [begin, end) of one head, times `factor`, in one warp.
// Each lane holds pieces of as many rows as possible.
template <class T, class Write>
__device__ void mean_rows(const T* rows, int64_t row_stride, int64_t begin, int64_t end,
                          int head_dim, float factor, Write write) {
  constexpr int kPiece = 16 / sizeof(T);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const cutlass::NumericArrayConverter<float, T, kPiece> to_floats;
  const float share = factor / static_cast<float>(end - begin);
  // If a row has few pieces, other lanes take more rows. At the end, lanes of the same piece are
  // summed.
  const int num_pieces = head_dim / kPiece;
  const int lanes_per_row = num_pieces <= 8 ? 8 : num_pieces <= 16 ? 16 : 32;
  for (int first = 0; first < num_pieces; first += lanes_per_row) {
    const int piece = first + lane % lanes_per_row;
    cutlass::Array<float, kPiece> total;
    total.clear();
    if (piece < num_pieces) {
      const T* src = rows + piece * kPiece;
      constexpr int kAtOnce = 8;  // loads in flight
      const int step = 32 / lanes_per_row;
      for (int64_t row = begin + lane / lanes_per_row; row < end; row += kAtOnce * step) {
        Piece<T> values[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          values[i].clear();
          if (row + i * step < end) {
            values[i] = *reinterpret_cast<const Piece<T>*>(src + (row + i * step) * row_stride);
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const cutlass::Array<float, kPiece> widened = to_floats(values[i]);
#pragma unroll
          for (int e = 0; e < kPiece; ++e) total[e] += widened[e];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      for (int step = lanes_per_row; step < 32; step *= 2) {
        total[i] += __shfl_xor_sync(~0u, total[i], step);
      }
      if (piece < num_pieces && lane < lanes_per_row) write(piece * kPiece + i, total[i] * share);
    }
  }
}

}  // namespace pbs::cuda
