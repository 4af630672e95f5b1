#include "gpu/device.h"

#include <string_view>

namespace mlxsae::gpu {

// The last letter of an Apple architecture is its size: p phone, g base and Pro, s Max, d Ultra. The chunk is about two
// thirds of the system level cache of the smallest chip of the row (of the second level cache of NVIDIA's); twelve
// simdgroups for each Apple core, sixteen for each multiprocessor, hide the memory's latency. An NVIDIA GPU without a
// row has that of its generation or the one before. None of these numbers changes a result. They are estimates until
// somebody measures them on the chips.
const std::vector<Device>& devices() {
  constexpr int64_t MiB = 1 << 20;
  static const std::vector<Device> table{
      {"g13g", "M1", 6 * MiB, 96, false},
      {"g13s", "M1 Max", 24 * MiB, 288, false},
      {"g13d", "M1 Ultra", 48 * MiB, 576, false},
      {"g14g", "M2", 6 * MiB, 120, false},
      {"g14s", "M2 Max", 32 * MiB, 360, false},
      {"g14d", "M2 Ultra", 64 * MiB, 720, false},
      {"g15g", "M3", 6 * MiB, 120, false},
      {"g15s", "M3 Max", 32 * MiB, 360, false},
      {"g15d", "M3 Ultra", 64 * MiB, 720, false},
      {"g16g", "M4", 8 * MiB, 120, false},
      {"g16s", "M4 Max", 32 * MiB, 384, false},
      {"g17g", "M5", 8 * MiB, 120, true},
      {"g17s", "M5 Max", 32 * MiB, 384, true},
      {"sm_80", "A100", 24 * MiB, 1728, true},
      {"sm_90", "H100, H200", 32 * MiB, 2112, true},
      {"", "any other", 8 * MiB, 120, true},
  };
  return table;
}

const Device& device_for(const std::string& architecture) {
  std::string_view name = architecture;
  constexpr std::string_view prefix = "applegpu_";
  if (name.starts_with(prefix)) name.remove_prefix(prefix.size());
  for (auto& row : devices())
    if (name == row.architecture) return row;
  if (name.starts_with("sm_")) return device_for(name.size() == 5 && name < "sm_90" ? "sm_80" : "sm_90");
  return devices().back();
}

}  // namespace mlxsae::gpu
