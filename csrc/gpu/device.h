#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mlxsae::gpu {

/** What the plans need to know of a GPU; one row of a table by generation and size. */
struct Device {
  const char* architecture;  // Metal's name without applegpu_, or CUDA's; "" is any other
  const char* chip;
  int64_t chunk_bytes;  // of a product that is filtered while it still lies in the system's cache
  int64_t simdgroups;   // that keep the GPU busy
  bool tf32;            // MLX multiplies float32 with inputs cut to 10 bits
};

/** The row for an architecture such as "applegpu_g14s" or "sm_90". */
const Device& device_for(const std::string& architecture);

/** All rows. */
const std::vector<Device>& devices();

}  // namespace mlxsae::gpu
