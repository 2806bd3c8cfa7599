// copy_pages: rows of keys and values out of pages, or into them.
#include <cstring>

#include "kernels.h"

namespace pbs::cpu {
namespace {

char* address(const MutableRows& rows, const RowPlace& place, int64_t head, DType dtype) {
  const int64_t element =
      place.b * rows.batch_stride + head * rows.head_stride + place.row * rows.row_stride;
  return static_cast<char*>(rows.data) + element * element_size(dtype);
}

}  // namespace

void copy_page_row(const CopyPagesParams& params, int64_t item) {
  const int64_t head = item / params.num_rows;
  const int64_t row = item % params.num_rows;
  const RowPlace in_page = place_of(params.pages, 0, params.first_row + row);
  const auto bytes = static_cast<size_t>(params.head_dim * element_size(params.dtype));
  const auto copy = [&](const MutableRows& pages, const MutableRows& rows) {
    char* page_row = address(pages, in_page, head, params.dtype);
    char* own_row = address(rows, RowPlace{0, row}, head, params.dtype);
    std::memcpy(params.to_pages ? page_row : own_row, params.to_pages ? own_row : page_row, bytes);
  };
  copy(params.k_pages, params.k);
  copy(params.v_pages, params.v);
}

}  // namespace pbs::cpu
