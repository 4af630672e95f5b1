"""The host side of Metal, as far as a machine without it can check: csrc/metal against the macOS wheel's headers, and the sources that
are embedded in the library."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import msl
import pytest
import run_plan
from msl import toolchain

ROOT = Path(__file__).resolve().parents[2]

EMBED = runpy.run_path(str(ROOT / "cmake/embed_metal.py"))


@pytest.fixture(scope="module")
def headers() -> Path:
    """MLX's headers for macOS, with metal-cpp: of $MLX_METAL_WHEEL or build/mlx-metal, an unpacked wheel, or of MLX itself."""
    for wheel in (
        os.environ.get("MLX_METAL_WHEEL", ""),
        ROOT / "build/mlx-metal",
        Path(mx.__file__).parents[1],
    ):
        include = Path(wheel) / "mlx/include"
        if wheel and (include / "metal_cpp").is_dir():
            return include
    pytest.skip("the headers of the wheel mlx-metal are not here (.ci/run unpacks it to build/mlx-metal)")


def check(headers: Path, text: str) -> subprocess.CompletedProcess[str]:
    try:
        compiler = toolchain.clang(16)
    except msl.ToolMissing as e:
        pytest.skip(str(e))
    sdk = Path(__file__).parent / "apple_sdk"
    systems = [f for path in (sdk, headers / "metal_cpp", headers) for f in ("-isystem", str(path))]
    flags = [
        "-std=c++20",
        "-fsyntax-only",
        "-fblocks",
        "-w",
        "-D_METAL_",
        "-DACCELERATE_NEW_LAPACK",
        "-include",
        "cmath",
    ]
    ours = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    return subprocess.run(
        [compiler, *flags, *systems, *ours, "-x", "c++", "-"], input=text, text=True, capture_output=True
    )


def test_the_adapter_fits_the_headers(headers: Path) -> None:
    text = (ROOT / "csrc/metal/metal.cpp").read_text()
    result = check(headers, text)
    assert result.returncode == 0, result.stderr[:4000]
    # And the check sees a call that MLX does not have.
    assert "dispatch_threadgroups" in text
    assert check(headers, text.replace("dispatch_threadgroups", "dispatch_thread_groups")).returncode != 0


def test_embedded_sources_are_the_files() -> None:
    texts = EMBED["libraries"](run_plan.METAL)
    assert set(texts) == {p.stem for p in run_plan.METAL.glob("*.metal")}
    for name, text in texts.items():
        assert '#include "' not in text
        assert "#pragma once" not in text
        embedded = msl.load(text, mode="fast").kernels
        assert list(embedded) == list(run_plan.library(name, "fast").kernels)


def test_no_two_kernels_share_a_name() -> None:
    """All of them are in one metallib."""
    names = [k for p in run_plan.METAL.glob("*.metal") for k in run_plan.library(p.stem, "fast").kernels]
    assert len(names) == len(set(names))


def test_embedded_sources_compile(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or pytest.skip("there is no C++ compiler")
    source = tmp_path / "sources.cpp"
    source.write_text(EMBED["as_cpp"]({"a": 'x "quoted" \\ \n' * 2000, "b_c": "y"}))
    program = tmp_path / "main.cpp"
    program.write_text(
        '#include "metal/sources.h"\n#include <iostream>\nint main() { std::cout << mlxsae::gpu::source_of("a"); }\n'
    )
    binary = tmp_path / "main"
    subprocess.run([compiler, "-std=c++20", f"-I{ROOT / 'csrc'}", source, program, "-o", binary], check=True)
    assert (
        subprocess.run([binary], capture_output=True, text=True, check=True).stdout
        == 'x "quoted" \\ \n' * 2000
    )
