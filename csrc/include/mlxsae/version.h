#pragma once

// The one source of the version: CMake and pyproject.toml read it here.
#define MLXSAE_VERSION "0.1.0"
