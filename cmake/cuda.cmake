# Decides PBS_WITH_CUDA and says why in PBS_CUDA_STATUS, which build_info() repeats.
set(PBS_WITH_CUDA OFF)
set(PBS_CUDA_ARCH 90a)

if(PBS_CUDA STREQUAL "OFF")
  set(PBS_CUDA_STATUS "switched off (PBS_CUDA=OFF)")
else()
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CUTLASS_DIR)
    # The package's own import pulls in more than its headers need, so only find_spec.
    execute_process(
      COMMAND
        ${Python_EXECUTABLE} -c
        "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] + '/source' if s else '')"
      OUTPUT_VARIABLE CUTLASS_DIR OUTPUT_STRIP_TRAILING_WHITESPACE)
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    set(PBS_CUDA_STATUS "no CUDA compiler (nvcc) was found")
  elseif(NOT EXISTS "${CUTLASS_DIR}/include/cute/tensor.hpp")
    set(PBS_CUDA_STATUS "no CUTLASS headers (package nvidia-cutlass or CUTLASS_DIR)")
  else()
    set(CMAKE_CUDA_ARCHITECTURES ${PBS_CUDA_ARCH})
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.3)
      set(PBS_CUDA_STATUS "sm_90a needs nvcc >= 12.3, found ${CMAKE_CUDA_COMPILER_VERSION}")
    else()
      set(PBS_WITH_CUDA ON)
      set(PBS_CUDA_STATUS "sm_${PBS_CUDA_ARCH}")
    endif()
  endif()
endif()

if(PBS_WITH_CUDA)
  message(STATUS "pbs_attn: CUDA kernels for ${PBS_CUDA_STATUS}, CUTLASS in ${CUTLASS_DIR}")
elseif(PBS_CUDA STREQUAL "ON")
  message(FATAL_ERROR "pbs_attn: PBS_CUDA=ON, but ${PBS_CUDA_STATUS}")
else()
  message(WARNING "pbs_attn: CPU-only build: ${PBS_CUDA_STATUS}")
endif()

function(pbs_add_cuda_kernels target)
  set(CMAKE_CUDA_STANDARD 17)
  file(READ ${CUTLASS_DIR}/include/cutlass/version.h version_header)
  foreach(part MAJOR MINOR PATCH)
    string(REGEX MATCH "define CUTLASS_${part} +([0-9]+)" _ "${version_header}")
    list(APPEND cutlass_version ${CMAKE_MATCH_1})
  endforeach()
  list(JOIN cutlass_version "." cutlass_version)
  add_library(pbs_cuda OBJECT csrc/cuda/score_keys/score_keys.cu csrc/cuda/sort_segments.cu
                              csrc/cuda/permute_kv.cu csrc/cuda/tma.cu csrc/cuda/select_blocks/select_blocks.cu
                              csrc/cuda/select_sampled/select_sampled.cu
                              csrc/cuda/attend/attend.cu
                              csrc/cuda/attend/order.cu csrc/cuda/attend/attend_d64.cu
                              csrc/cuda/attend/attend_d96.cu csrc/cuda/attend/attend_d128.cu
                              csrc/cuda/attend/attend_d256.cu)
  target_include_directories(pbs_cuda PRIVATE include)
  target_include_directories(pbs_cuda SYSTEM PRIVATE ${CUTLASS_DIR}/include)
  target_compile_options(
    pbs_cuda PRIVATE --expt-relaxed-constexpr -lineinfo -Xcompiler=-fvisibility=hidden
                     -Xptxas=-v,--warn-on-spills)
  find_package(CUDAToolkit REQUIRED)
  target_compile_definitions(
    ${target} PRIVATE PBS_WITH_CUDA PBS_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}"
                      PBS_CUTLASS_VERSION="${cutlass_version}")
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:pbs_cuda>)
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
  # The static runtime's symbols stay inside: torch brings its own copy.
  target_link_options(${target} PRIVATE -Wl,--exclude-libs,ALL)
endfunction()
