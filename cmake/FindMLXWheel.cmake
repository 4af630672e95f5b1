# Finds MLX inside a Python environment without importing it, and defines the target `mlx`.
#
#   MLX_WHEEL_DIR  site-packages/mlx; asked from Python when empty
#   MLX_VERSION    version of the headers found there
#
# `python -m mlx --cmake-dir` would load libmlx, which fails for mlx[cuda*] on a machine without a driver, and the
# MLXConfig.cmake of that wheel insists on a CUDA toolkit. The headers are the same in all wheels of one version.
set(MLX_WHEEL_DIR "" CACHE PATH "The folder site-packages/mlx (asked from Python when empty)")
if(NOT MLX_WHEEL_DIR)
  if(NOT Python_EXECUTABLE)
    find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
  endif()
  execute_process(
    COMMAND
      "${Python_EXECUTABLE}" -c
      "import importlib.util, os
spec = importlib.util.find_spec('mlx')
for p in spec.submodule_search_locations if spec else []:
    if os.path.exists(os.path.join(p, 'include', 'mlx', 'mlx.h')):
        print(p.replace(os.sep, '/'))
        break"
    OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE _mlx_dir)
  if(NOT _mlx_dir)
    message(FATAL_ERROR "MLX is not installed for ${Python_EXECUTABLE}. Install it: pip install \"mlx==0.32.4\" on "
                        "macOS, pip install \"mlx[cpu]==0.32.4\" on Linux.")
  endif()
  set(MLX_WHEEL_DIR "${_mlx_dir}" CACHE PATH "" FORCE)
endif()

file(STRINGS "${MLX_WHEEL_DIR}/include/mlx/version.h" _mlx_v REGEX "define MLX_VERSION_(MAJOR|MINOR|PATCH) ")
string(REGEX REPLACE ".*MAJOR ([0-9]+).*MINOR ([0-9]+).*PATCH ([0-9]+).*" "\\1.\\2.\\3" MLX_VERSION "${_mlx_v}")

if(NOT TARGET mlx)
  if(APPLE) # gives -D_METAL_, metal-cpp and mlx_build_metallib()
    list(PREPEND CMAKE_PREFIX_PATH "${MLX_WHEEL_DIR}")
    find_package(MLX CONFIG REQUIRED)
    target_include_directories(mlx INTERFACE "${MLX_WHEEL_DIR}/include/metal_cpp")
  else()
    add_library(mlx SHARED IMPORTED)
    set_target_properties(
      mlx
      PROPERTIES IMPORTED_LOCATION "${MLX_WHEEL_DIR}/lib/libmlx.so"
                 IMPORTED_SONAME libmlx.so
                 INTERFACE_INCLUDE_DIRECTORIES "${MLX_WHEEL_DIR}/include"
                 INTERFACE_COMPILE_FEATURES cxx_std_20)
  endif()
endif()
