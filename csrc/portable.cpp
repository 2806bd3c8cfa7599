// Functions that headers of newer compilers need and that glibc 2.28 and GCC 8 do not have. Only a
// build with PBS_PORTABLE compiles this file, and it exports nothing.
#include <sstream>

// Members of string streams that GCC 9 and GCC 11 added.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// Whether the process has one thread, which glibc tells from 2.32 on: shared_ptr then counts
// without atomics. False is always correct.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
