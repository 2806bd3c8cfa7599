// Rows of keys and values that may lie in pages, whose size is a power of two here.
#pragma once

#include "pbs/params.h"

namespace pbs::cuda::sm90 {

struct CheckedPlace {
  int b;
  int row;
  bool exists;
};

// As place_of (pbs/params.h). A page that does not exist gives the first one, so that no read
// strays; copy_pages, which runs before, has then made all own keys NaN.
__device__ inline CheckedPlace place_in_pages(const Pages& pages, int b, int row) {
  if (pages.table == nullptr) return CheckedPlace{b, row, true};
  const auto page_size = static_cast<int>(pages.page_size);
  const int page = pages.table[row / page_size];
  const bool is_page = page >= 0 && page < pages.num_pages;
  return CheckedPlace{is_page ? page : 0, row & (page_size - 1), is_page};
}

}  // namespace pbs::cuda::sm90
