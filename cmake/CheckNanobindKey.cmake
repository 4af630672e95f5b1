# An mlx.core.array crosses into our module only if both were built with the same nanobind internals. A mismatch would
# show at the first call, as "incompatible function arguments"; here it stops the build with a sentence.
file(GLOB _core "${MLX_WHEEL_DIR}/core.*.so" "${MLX_WHEEL_DIR}/core.so")
if(NOT _core)
  message(
    FATAL_ERROR
      "No mlx/core.*.so in '${MLX_WHEEL_DIR}': MLX is not installed for this Python, or a folder of the name mlx lies "
      "before it on its path. Install it: pip install \"mlx[cpu]==0.32.4\".")
endif()
list(GET _core 0 _core)
file(STRINGS "${_core}" _mlx_key REGEX "(_a[0-9]+_v[0-9]+|^v[0-9]+_system)" LIMIT_COUNT 1)
string(REGEX MATCH "_a[0-9]+_v[0-9]+(_stable)?" _mlx_key "${_mlx_key}")
set(_header "${NB_DIR}/src/nb_internals.h") # nanobind 3; nanobind 2 keeps it in nb_abi.h
if(EXISTS "${NB_DIR}/src/nb_abi.h")
  set(_header "${NB_DIR}/src/nb_abi.h")
endif()
file(STRINGS "${_header}" _nb_v REGEX "define NB_INTERNALS_VERSION")
string(REGEX MATCH "[0-9]+" _nb_v "${_nb_v}")
set(_nb_a "none")
if(EXISTS "${NB_DIR}/include/nanobind/nb_backend.h")
  file(STRINGS "${NB_DIR}/include/nanobind/nb_backend.h" _nb_a REGEX "define NB_BACKEND_ABI_MAJOR ")
  string(REGEX MATCH "[0-9]+" _nb_a "${_nb_a}")
endif()
if(NOT _mlx_key STREQUAL "_a${_nb_a}_v${_nb_v}")
  message(
    FATAL_ERROR
      "nanobind at ${NB_DIR} has internals _a${_nb_a}_v${_nb_v}, but mlx ${MLX_VERSION} (${_core}) was built with "
      "'${_mlx_key}': mlx.core.array could not cross into this module. Install what fits: "
      "pip install \"nanobind==3.1.0\" \"mlx==0.32.4\".")
endif()
message(STATUS "nanobind internals ${_mlx_key}, the same as MLX's")
