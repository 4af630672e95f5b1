# mlxsae_embed_cuda(TARGET): the Metal sources in CUDA C++ inside the library, compiled by NVRTC at run time.
function(mlxsae_embed_cuda target)
  set(root "${CMAKE_CURRENT_SOURCE_DIR}/metal")
  file(GLOB_RECURSE files CONFIGURE_DEPENDS "${root}/*.metal" "${root}/*.h")
  set(out "${CMAKE_CURRENT_BINARY_DIR}/cuda_sources.cpp")
  set(script "${CMAKE_CURRENT_SOURCE_DIR}/cmake/msl_to_cuda.py")
  set(header "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/msl.cuh")
  add_custom_command(
    OUTPUT "${out}"
    COMMAND "${Python_EXECUTABLE}" "${script}" "${root}" "${header}" "${out}" "${CMAKE_CXX_COMPILER}"
    DEPENDS "${script}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/embed_metal.py" "${header}" ${files}
    VERBATIM)
  target_sources(${target} PRIVATE "${out}")
endfunction()
