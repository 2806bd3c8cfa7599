// Access to rows of keys and values that may be in pages.
#pragma once

#include "pbs/params.h"

namespace pbs::cuda {

// Called by all threads of a CTA. Returns false without pages.
__device__ inline bool has_bad_page(const Pages& pages) {
  if (pages.table == nullptr) return false;
  bool is_bad = false;
  for (auto i = static_cast<int64_t>(threadIdx.x); i < pages.num_entries; i += blockDim.x) {
    const int32_t page = pages.table[i];
    is_bad |= page < 0 || page >= pages.num_pages;
  }
  return __syncthreads_or(is_bad) != 0;
}

// The same as place_of (pbs/params.h), for pages whose size is a power of two. A page that does not
// exist is replaced by the first page, so that no read is out of bounds.
__device__ inline RowPlace place_in_pages(const Pages& pages, int b, int row) {
  if (pages.table == nullptr) return RowPlace{b, row};
  const auto page_size = static_cast<int>(pages.page_size);
  const int page = pages.table[row / page_size];
  const bool is_page = page >= 0 && page < pages.num_pages;
  return RowPlace{is_page ? page : 0, row & (page_size - 1)};
}

}  // namespace pbs::cuda
