// copy_pages: copies rows of keys and values out of pages.
#include <cstring>

#include "kernels.h"

namespace pbs::cpu {

void copy_page_row(const CopyPagesParams& params, int64_t item) {
  const int64_t head = item / params.num_rows;
  const int64_t row = item % params.num_rows;
  const RowPlace in_page = place_of(params.pages, 0, params.first_row + row);
  const int64_t size = element_size(params.dtype);
  const auto copy = [&](const ConstRows& from, const MutableRows& to) {
    std::memcpy(static_cast<char*>(to.data) + size * row_start(to, RowPlace{0, row}, head),
                static_cast<const char*>(from.data) + size * row_start(from, in_page, head),
                static_cast<size_t>(size * params.head_dim));
  };
  copy(params.k_pages, params.k);
  copy(params.v_pages, params.v);
}

}  // namespace pbs::cpu
