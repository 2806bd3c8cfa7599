# PBS_PORTABLE=ON builds a library for every Linux with glibc 2.28 (manylinux_2_28, like torch). The
# glibc and C++ library of the build machine may be newer: csrc/portable.cpp supports up to GCC 12.
# For later compilers, auditwheel in tools/release.sh lists the symbols that are too new. In the
# manylinux_2_28 container, which is as old as the target, this option changes nothing.
#
# libstdc++ stays shared, like that of torch: a static one would contain code that was compiled for
# the glibc of the build machine.
function(pbs_make_portable target)
  target_sources(${target} PRIVATE csrc/portable.cpp)
  execute_process(
    COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/glibc_stubs.py ${CMAKE_CXX_COMPILER}
            ${PROJECT_BINARY_DIR}/glibc
    OUTPUT_VARIABLE stubs OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  string(REPLACE "\n" ";" stubs "${stubs}")
  # They come after the static CUDA runtime, which needs them. --as-needed drops unused ones.
  target_link_libraries(${target} PRIVATE ${stubs})
  target_link_options(${target} PRIVATE -Wl,--strip-all)
endfunction()
