// Exposes the header-only parts to tests/test_native.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "pbs/arch.h"
#include "pbs/bitmask.h"
#include "pbs/geometry.h"
#include "simd.h"

namespace py = pybind11;
namespace cpu = pbs::cpu::native_test;

PYBIND11_MODULE(pbs_native, m) {
  py::class_<pbs::QueryBlock>(m, "QueryBlock")
      .def_readonly("first_row", &pbs::QueryBlock::first_row)
      .def_readonly("num_rows", &pbs::QueryBlock::num_rows)
      .def_readonly("first_position", &pbs::QueryBlock::first_position)
      .def_readonly("own_begin", &pbs::QueryBlock::own_begin)
      .def_readonly("own_end", &pbs::QueryBlock::own_end)
      .def_readonly("num_candidates", &pbs::QueryBlock::num_candidates);
  m.def("query_block", &pbs::query_block);
  m.def("capability_error", &pbs::capability_error);
  m.def("selected", [](const std::vector<uint32_t>& words, int64_t num_candidates) {
    std::vector<int64_t> blocks;
    pbs::for_each_selected(words.data(), num_candidates,
                           [&](int64_t block_idx) { blocks.push_back(block_idx); });
    return blocks;
  });
  m.def("exp2", [](float x) { return cpu::exp2_nonpositive(cpu::splat(x))[0]; });
  m.def("half_to_float", &cpu::half_to_float);
  m.def("float_to_half", &cpu::float_to_half);
  m.def("float_to_bfloat16", &cpu::float_to_bfloat16);
}
