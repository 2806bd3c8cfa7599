# Sets PBS_WITH_CUDA, and the reason in PBS_CUDA_STATUS, which build_info() shows.
#
# AUTO builds the kernels if nvcc is on PATH. If nvcc is found but something else is missing, the
# build fails: pip hides warnings, so the owner of a GPU would get a library without kernels.
set(PBS_WITH_CUDA OFF)
# Each GPU family has a folder in csrc/cuda and is compiled for these architectures. GPUs that are
# newer than all of them use the PTX of the virtual one.
set(PBS_GPU_FAMILIES sm90 sm80)
set(PBS_ARCH_sm90 90a-real)
set(PBS_ARCH_sm80 80-real 86-real 89-real 100-real 120-real 80-virtual
    CACHE STRING "Architectures of the sm80 family")
if(NOT PBS_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "PBS_CUDA must be AUTO, ON or OFF, got ${PBS_CUDA}")
endif()

if(PBS_CUDA STREQUAL "OFF")
  set(PBS_CUDA_STATUS "switched off (PBS_CUDA=OFF)")
else()
  # Same search as in setup.py, which fetches the headers for an isolated build.
  find_program(PBS_NVCC NAMES $ENV{CUDACXX} nvcc NO_CMAKE_PATH NO_CMAKE_SYSTEM_PATH)
  if(PBS_NVCC)
    execute_process(COMMAND ${PBS_NVCC} --version OUTPUT_VARIABLE nvcc_version)
    string(REGEX MATCH "release ([0-9.]+)" _ "${nvcc_version}")
    set(nvcc_version ${CMAKE_MATCH_1})
  endif()
  if(NOT CUTLASS_DIR)
    # Importing the package would load more than the headers need, so only find_spec is used.
    execute_process(
      COMMAND
        ${Python_EXECUTABLE} -c
        "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] + '/source' if s else '')"
      OUTPUT_VARIABLE CUTLASS_DIR OUTPUT_STRIP_TRAILING_WHITESPACE)
  endif()
  if(NOT PBS_NVCC)
    set(PBS_CUDA_STATUS "no CUDA compiler (nvcc) was found")
  elseif(NOT nvcc_version VERSION_GREATER_EQUAL 12.8)
    set(PBS_CUDA_STATUS "sm_120 needs nvcc >= 12.8, found ${nvcc_version}")
  elseif(NOT EXISTS "${CUTLASS_DIR}/include/cute/tensor.hpp")
    set(PBS_CUDA_STATUS "no CUTLASS headers: pip install --no-deps nvidia-cutlass==4.2.0.0")
  else()
    # If nvcc does not work, CMake shows its output and stops here.
    message(STATUS "pbs_attn: CUDA kernels with ${PBS_NVCC} (PBS_CUDA=OFF leaves them out)")
    set(CMAKE_CUDA_COMPILER ${PBS_NVCC})
    foreach(family ${PBS_GPU_FAMILIES})
      list(APPEND PBS_CUDA_ARCH ${PBS_ARCH_${family}})
    endforeach()
    set(CMAKE_CUDA_ARCHITECTURES ${PBS_CUDA_ARCH})
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    enable_language(CUDA)
    set(PBS_WITH_CUDA ON)
    list(JOIN PBS_CUDA_ARCH ", sm_" architectures)
    string(REPLACE "-real" "" architectures "${architectures}")
    string(REGEX REPLACE "sm_([0-9]+)-virtual" "PTX of \\1" architectures "${architectures}")
    set(PBS_CUDA_STATUS "sm_${architectures}")
  endif()
endif()

if(PBS_WITH_CUDA)
  message(STATUS "pbs_attn: CUDA kernels for ${PBS_CUDA_STATUS}, CUTLASS in ${CUTLASS_DIR}")
elseif(PBS_CUDA STREQUAL "ON")
  message(FATAL_ERROR "pbs_attn: PBS_CUDA=ON, but ${PBS_CUDA_STATUS}")
elseif(PBS_NVCC)
  message(FATAL_ERROR "pbs_attn: nvcc was found, but ${PBS_CUDA_STATUS} (PBS_CUDA=OFF leaves the CUDA kernels out)")
else()
  message(WARNING "pbs_attn: CPU-only build: ${PBS_CUDA_STATUS}")
endif()

# An object library of CUDA sources for some architectures.
function(pbs_add_cuda_objects name architectures)
  add_library(${name} OBJECT ${ARGN})
  set_target_properties(${name} PROPERTIES CUDA_STANDARD 17 CUDA_ARCHITECTURES "${architectures}")
  target_include_directories(${name} PRIVATE include csrc/cuda)
  target_include_directories(${name} SYSTEM PRIVATE ${CUTLASS_DIR}/include)
  target_compile_options(
    ${name} PRIVATE --expt-relaxed-constexpr -Xcompiler=-fvisibility=hidden,-Werror=switch
                    -Xcompiler=-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=,-ffile-prefix-map=${CUTLASS_DIR}/=
                    -Xptxas=-v,--warn-on-spills)
  # Profilers need it. It contains the full paths of the sources.
  if(NOT PBS_PORTABLE)
    target_compile_options(${name} PRIVATE -lineinfo)
  endif()
endfunction()

function(pbs_add_cuda_kernels target)
  file(READ ${CUTLASS_DIR}/include/cutlass/version.h version_header)
  foreach(part MAJOR MINOR PATCH)
    string(REGEX MATCH "define CUTLASS_${part} +([0-9]+)" _ "${version_header}")
    list(APPEND cutlass_version ${CMAKE_MATCH_1})
  endforeach()
  list(JOIN cutlass_version "." cutlass_version)
  foreach(family ${PBS_GPU_FAMILIES})
    file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/${family}/*.cu)
    pbs_add_cuda_objects(pbs_${family} "${PBS_ARCH_${family}}" ${sources})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:pbs_${family}>)
  endforeach()
  # With the default of 5, ptxas spills in the main loops of these kernels: of attend_d96.cu on sm_86
  # and sm_89, and of the others on sm_100.
  set_source_files_properties(
    ${PROJECT_SOURCE_DIR}/csrc/cuda/sm80/attend/attend_d96.cu
    ${PROJECT_SOURCE_DIR}/csrc/cuda/sm80/select_blocks/sampled/sampled_d128.cu
    ${PROJECT_SOURCE_DIR}/csrc/cuda/sm80/select_blocks/sampled/sampled_d256.cu
    PROPERTIES COMPILE_OPTIONS -Xptxas=--register-usage-level=2)
  # The code that all families share.
  file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu)
  file(GLOB_RECURSE common_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/common/*.cu)
  pbs_add_cuda_objects(pbs_cuda_common "${PBS_CUDA_ARCH}" ${sources} ${common_sources})
  file(GLOB_RECURSE host_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cpp)
  list(FILTER host_sources EXCLUDE REGEX "/no_cuda\\.cpp$")
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:pbs_cuda_common> ${host_sources})
  find_package(CUDAToolkit REQUIRED)
  target_compile_definitions(
    ${target} PRIVATE PBS_WITH_CUDA PBS_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}"
                      PBS_CUTLASS_VERSION="${cutlass_version}")
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
  # The symbols of the static runtime are not exported, because torch has its own copy.
  target_link_options(${target} PRIVATE -Wl,--exclude-libs,ALL)
endfunction()
