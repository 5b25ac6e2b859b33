# Read by llama-cpp-python's build (CMAKE_PROJECT_TOP_LEVEL_INCLUDES): only the library that the Python bindings load is compiled.
# Its own CMakeLists.txt switches the helpers of llama.cpp's programs on; a variable of the same name goes before the cache entry.
set(LLAMA_BUILD_COMMON OFF)
set(LLAVA_BUILD OFF)
# The graph building of some hundred architectures costs no time at run time; the kernels (ggml) keep full optimization.
add_compile_options("$<$<STREQUAL:$<TARGET_PROPERTY:NAME>,llama>:-O1>")
