# mlxsae_embed_metal(TARGET): the Metal sources inside the library, compiled by Metal at run time; and, where Xcode's compiler is
# there, compiled ahead of time to mlxsae.metallib beside it, which then is used instead.
function(mlxsae_embed_metal target)
  set(root "${CMAKE_CURRENT_SOURCE_DIR}/metal")
  file(GLOB_RECURSE files CONFIGURE_DEPENDS "${root}/*.metal" "${root}/*.h")
  set(out "${CMAKE_CURRENT_BINARY_DIR}/metal_sources.cpp")
  set(script "${CMAKE_CURRENT_SOURCE_DIR}/cmake/embed_metal.py")
  add_custom_command(
    OUTPUT "${out}"
    COMMAND "${Python_EXECUTABLE}" "${script}" "${root}" "${out}"
    DEPENDS "${script}" ${files}
    VERBATIM)
  target_sources(${target} PRIVATE "${out}")

  execute_process(COMMAND xcrun -sdk macosx metal --version OUTPUT_QUIET ERROR_QUIET RESULT_VARIABLE missing)
  if(missing OR NOT COMMAND mlx_build_metallib)
    message(STATUS "No Metal compiler: kernels are compiled when they are first used")
    return()
  endif()
  file(GLOB sources CONFIGURE_DEPENDS "${root}/*.metal")
  mlx_build_metallib(
    TARGET mlxsae_metallib
    TITLE mlxsae
    SOURCES ${sources}
    INCLUDE_DIRS "${root}"
    OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}")
  add_dependencies(${target} mlxsae_metallib)
  install(FILES "${CMAKE_CURRENT_BINARY_DIR}/mlxsae.metallib" DESTINATION "${_lib}")
endfunction()
