"""The Metal side of the library in C++, which Linux does not build, compiles against the headers of MLX's macOS wheel."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest

ROOT = Path(__file__).resolve().parents[2]
SDK = Path(__file__).parent / "apple_sdk"  # what metal-cpp needs of the macOS SDK, declared only


@pytest.fixture(scope="session")
def macos_headers() -> Path:
    """MLX's headers for macOS, with metal-cpp: of $MLX_METAL_WHEEL or build/mlx-metal, an unpacked wheel, or of MLX itself."""
    for wheel in (os.environ.get("MLX_METAL_WHEEL"), ROOT / "build/mlx-metal", Path(mx.__file__).parents[1]):
        if wheel and (Path(wheel) / "mlx/include/metal_cpp").is_dir():
            return Path(wheel) / "mlx/include"
    pytest.skip("the headers of the wheel mlx-metal are not here (.ci/run unpacks it to build/mlx-metal)")


def complaints(text: str, headers: Path, compiler: str) -> str:
    command = [compiler, "-std=c++20", "-fsyntax-only", "-fblocks", "-include", "cmath"]
    for folder in (SDK, headers / "metal_cpp", headers):
        command += ["-isystem", str(folder)]
    command += ["-D_METAL_", "-DACCELERATE_NEW_LAPACK", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    command += [f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include", "-x", "c++", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True).stderr


@pytest.mark.parametrize("source", sorted((ROOT / "csrc/metal").glob("*.cpp")), ids=lambda p: p.name)
def test_compiles_for_macos(source, macos_headers, strict_compiler):
    assert complaints(source.read_text(), macos_headers, strict_compiler) == ""


def test_a_mistake_would_be_seen(macos_headers, strict_compiler):
    text = '#include "mlx/backend/metal/device.h"\nvoid f(mlx::core::metal::CommandEncoder& e) { e.set_bytez(1, 0); }\n'
    assert "no member named 'set_bytez'" in complaints(text, macos_headers, strict_compiler)
