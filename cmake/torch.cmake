# pbs_torch: the headers of the installed torch, and the library that has its stable C ABI.
#
# find_package(Torch) would enable CUDA and link all libraries. The stable ABI needs neither.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import os, torch; print(os.path.dirname(torch.__file__)); print(torch.__version__)"
  OUTPUT_VARIABLE torch_facts OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE torch_missing)
if(torch_missing)
  message(FATAL_ERROR "pbs_attn builds against torch >= 2.10, and ${Python_EXECUTABLE} cannot import it")
endif()
string(REPLACE "\n" ";" torch_facts "${torch_facts}")
list(GET torch_facts 0 PBS_TORCH_DIR)
list(GET torch_facts 1 PBS_TORCH_VERSION)
if(PBS_TORCH_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR "pbs_attn builds against torch >= 2.10, got ${PBS_TORCH_VERSION}")
endif()

add_library(pbs_torch INTERFACE)
target_include_directories(pbs_torch SYSTEM INTERFACE ${PBS_TORCH_DIR}/include)
target_link_libraries(pbs_torch INTERFACE ${PBS_TORCH_DIR}/lib/libtorch_cpu.so)
# The dependencies of libtorch_cpu (MKL, OpenMP) are found when torch loads it, not here.
target_link_options(pbs_torch INTERFACE -Wl,--unresolved-symbols=ignore-in-shared-libs)
