# PBS_PORTABLE=ON: a library for every Linux with glibc 2.28 (manylinux_2_28, as torch's own), also
# where the build machine's glibc and C++ library are newer: up to GCC 12, which csrc/portable.cpp
# is made for. auditwheel, in tools/release.sh, names what a later one takes beyond it. In the
# manylinux_2_28 container, which is as old as the target, all of this changes nothing.
#
# libstdc++ stays shared, as torch's is: a static one would bring code of its own that was compiled
# for the build machine's glibc.
function(pbs_make_portable target)
  target_sources(${target} PRIVATE csrc/portable.cpp)
  execute_process(
    COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/glibc_stubs.py ${CMAKE_CXX_COMPILER}
            ${PROJECT_BINARY_DIR}/glibc
    OUTPUT_VARIABLE stubs OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  string(REPLACE "\n" ";" stubs "${stubs}")
  # After the static CUDA runtime, which needs them; --as-needed drops those that nothing needs.
  target_link_libraries(${target} PRIVATE ${stubs})
  target_link_options(${target} PRIVATE -Wl,--strip-all)
endfunction()
