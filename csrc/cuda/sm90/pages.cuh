// Rows of keys and values that may lie in pages, whose size is a power of two here.
#pragma once

#include "pbs/params.h"

namespace pbs::cuda::sm90 {

// As place_of (pbs/params.h). A page that does not exist gives the first one, so that no access
// strays; copy_pages, which runs before, has then made all own keys NaN.
__device__ inline RowPlace place_in_pages(const Pages& pages, int b, int row) {
  if (pages.table == nullptr) return RowPlace{b, row};
  const auto page_size = static_cast<int>(pages.page_size);
  const int page = pages.table[row / page_size];
  const bool is_page = page >= 0 && page < pages.num_pages;
  return RowPlace{is_page ? page : 0, row & (page_size - 1)};
}

}  // namespace pbs::cuda::sm90
