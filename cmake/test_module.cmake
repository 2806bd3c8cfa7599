# pbs_native: the header-only parts as a Python module. Only the tests use it. Unlike the library,
# it works with one version of Python only.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir OUTPUT_VARIABLE pybind11_DIR
                OUTPUT_STRIP_TRAILING_WHITESPACE)
find_package(pybind11 CONFIG REQUIRED)
pybind11_add_module(pbs_native tests/native/bindings.cpp)
target_include_directories(pbs_native PRIVATE include csrc/cpu)
target_compile_definitions(pbs_native PRIVATE PBS_CPU_ARCH=native_test)
target_compile_options(pbs_native PRIVATE -Wall -Wextra)
