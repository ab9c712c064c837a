# find_package(fa4_ext): the target fa4_ext::fa4_ext, the library and its C header. It needs torch's libraries, which are the
# program's to find and link: find_package(Torch) would demand a CUDA toolkit, which this library does not need.
if(TARGET fa4_ext::fa4_ext)
  return()
endif()
get_filename_component(_fa4_ext_package "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
add_library(fa4_ext::fa4_ext SHARED IMPORTED)
set_target_properties(
  fa4_ext::fa4_ext
  PROPERTIES IMPORTED_LOCATION "${_fa4_ext_package}/libfa4_ext.so" IMPORTED_SONAME libfa4_ext.so
             INTERFACE_INCLUDE_DIRECTORIES "${_fa4_ext_package}/include")
unset(_fa4_ext_package)
