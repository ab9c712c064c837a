// What a newer compiler and C library than manylinux_2_28's would import from the user's machine,
// defined here instead. scripts/tools/check_wheel.py finds what is missing.
#include <sstream>

// GLIBCXX_3.4.26
template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();

// GLIBC_2.32. std::shared_ptr counts without atomics while it is true; false is always right.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
