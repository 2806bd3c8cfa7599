// TMA descriptors.
#include "sm90/tma.h"

#include <cuda_runtime.h>

#include "pbs/sm90/tile_shape.h"

namespace pbs::cuda::sm90 {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// The driver gives the function at run time, so the library does not link libcuda.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<Encode>(function)
             : nullptr;
}

}  // namespace

const char* encode_rows(CUtensorMap* map, const ConstRows& rows, const Problem& problem,
                        int64_t num_heads, int64_t num_rows, int64_t box_rows,
                        int64_t box_columns) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const int columns = group_columns(static_cast<int>(problem.head_dim));
  const int64_t num_groups = problem.head_dim / columns;
  const cuuint64_t dims[] = {size(columns), size(num_rows), size(num_groups), size(num_heads),
                             size(problem.batch)};
  // In torch a dimension of size 1 may have any stride. TMA needs a valid one.
  const auto stride = [&](int64_t elements, int64_t n) {
    return size(2 * (n == 1 ? problem.head_dim : elements));
  };
  const cuuint64_t strides[] = {stride(rows.row_stride, num_rows), size(2 * columns),
                                stride(rows.head_stride, num_heads),
                                stride(rows.batch_stride, problem.batch)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(box_rows),
                            static_cast<cuuint32_t>(box_columns / columns), 1, 1};
  const cuuint32_t element_strides[] = {1, 1, 1, 1, 1};
  const auto type = problem.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                      : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto swizzle = columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const CUresult result =
      encode(map, type, 5, const_cast<void*>(rows.data), dims, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "TMA refuses the strides of an input";
}

}  // namespace pbs::cuda::sm90
