// What headers of newer compilers take from the C and C++ libraries, and those of glibc 2.28 and
// GCC 8 lack. Only a build with PBS_PORTABLE compiles this file; nothing of it is exported.
#include <sstream>

// Members of string streams that GCC 9 and GCC 11 added.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// Whether the process has one thread, from glibc 2.32 on: shared_ptr then counts without atomics.
// False is always right.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
