# Read by the build of llama-cpp-python (CMAKE_PROJECT_llama_cpp_INCLUDE, see setup.sh): only the library that its Python bindings load
# is compiled. Its CMakeLists.txt switches the helpers of llama.cpp's programs on; a variable of that name goes before the cache entry.
set(LLAMA_BUILD_COMMON OFF)
set(LLAVA_BUILD OFF)
# Building the graphs of some 150 architectures costs no time later; the kernels (ggml) keep full optimization for this very CPU.
add_compile_options("$<$<STREQUAL:$<TARGET_PROPERTY:NAME>,llama>:-O1>")
