"""What can be verified of the CUDA room without a GPU: it compiles for real ones, and libmlxsae needs nothing of CUDA.

NVRTC comes from the package nvidia-cuda-nvrtc, nvcc from nvidia-cuda-nvcc; MLX's CUDA headers and library from an unpacked mlx-cuda-13 wheel in the folder that
MLX_CUDA_WHEEL names, CUDA's own headers from nvidia-cuda-runtime. `.ci/run` gets all three.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import cuda_text
import mlx.core as mx
import pytest

import mlxsae
from mlxsae import _ext

ROOT = cuda_text.ROOT
REGISTERS_OF_BLOCK, SHARED_OF_BLOCK = 65536, 48 << 10
# Threads that the plans launch where the source gives no bound (csrc/gpu).
MOST_THREADS = 512
SPILL_ALLOWED = 64  # bytes of a thread, in the rare kernels for rows that are no whole vectors


def representatives(library: str) -> list[str]:
    """One kernel of each template, for float and whole vectors where there is that choice."""
    chosen: dict[str, str] = {}
    for name, (expression, _) in cuda_text.translated(library)[1].items():
        chosen.setdefault(expression.partition("<")[0], name)
    return list(chosen.values())


def compile_and_check(library: str, architecture: str, names: list[str]) -> None:
    if cuda_text.nvrtc() is None:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    text = cuda_text.HEADER + cuda_text.translated(library)[0]
    check(library, names, cuda_text.compile_for_gpu(text, architecture, names))


def check(library: str, names: list[str], compiled: dict[str, cuda_text.Resources]) -> None:
    kernels = cuda_text.translated(library)[1]
    assert set(names) <= set(compiled)
    for name in names:
        used, bound = compiled[name], kernels[name][1].bound
        assert used.spilled <= SPILL_ALLOWED, (name, used)
        assert used.shared <= SHARED_OF_BLOCK, (name, used)
        if not bound:  # the assembler keeps to a bound by itself
            assert -(-used.registers // 8) * 8 * MOST_THREADS <= REGISTERS_OF_BLOCK, (name, used)


@pytest.mark.parametrize("library", cuda_text.LIBRARIES)
def test_one_kernel_of_each_template_compiles(library: str) -> None:
    """The quick part of `test_every_kernel_compiles`."""
    compile_and_check(library, "sm_80", representatives(library))


@pytest.mark.parametrize("library", cuda_text.LIBRARIES)
def test_nvcc_compiles_them_too(library: str) -> None:
    """The compiler of toolkits, with its own front end and CUDA's headers around the text. What follows them is NVRTC's: one
    architecture says it."""
    if cuda_text.nvcc() is None:
        pytest.skip("nvidia-cuda-nvcc, with nvidia-nvvm and nvidia-cuda-crt, is not installed")
    names = representatives(library)
    text = cuda_text.HEADER + cuda_text.translated(library)[0]
    check(library, names, cuda_text.compile_by_nvcc(text, "sm_90a", names))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("library", cuda_text.LIBRARIES)
def test_every_kernel_compiles(library: str, architecture: str) -> None:
    compile_and_check(library, architecture, list(cuda_text.translated(library)[1]))


@pytest.mark.parametrize("library", cuda_text.LIBRARIES)
def test_nothing_of_metal_is_left(library: str) -> None:
    text = cuda_text.translated(library)[0]
    assert not re.search(
        r"\b(device|threadgroup|constant|METAL_FUNC|host_name)\b(?!_)|\[\[", text.replace("__device__", "")
    )


def test_what_is_not_known_is_refused() -> None:
    """A place that CUDA's library does not have is an error of the build, not of the GPU."""
    source = "[[kernel]] void k(device float* a [[buffer(0)]], uint q [[quadgroup_index_in_threadgroup]]) { a[q] = 0; }"
    with pytest.raises(cuda_text.msl_to_cuda.Untranslatable, match="quadgroup_index"):
        cuda_text.msl_to_cuda.translate(source)


def test_kernels_of_metal_and_cuda_have_the_same_names_and_parameters() -> None:
    """Everything a plan launches is there under its name, with a parameter for each index that the harness sees."""
    import run_plan

    for library in ("sparse_decode", "tokens_since_fired"):
        metal = run_plan.library(library, "checked").kernels
        cuda = cuda_text.translated(library)[1]
        assert set(metal) == set(cuda)
        for name, signature in metal.items():
            parameters = cuda[name][1].parameters
            assert sorted(signature.buffers) == sorted(p.index for p in parameters if p.index is not None)


def installed_library() -> Path:
    return Path(_ext.__file__).parent / "lib" / "libmlxsae.so"


@pytest.mark.skipif(
    not shutil.which("readelf") or not installed_library().exists(), reason="needs readelf and a Linux build"
)
def test_libmlxsae_needs_nothing_of_cuda() -> None:
    library = installed_library()
    dynamic = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libmlx.so" in needed
    assert not [n for n in needed if re.search(r"cuda|nv|cublas|cudnn", n)]
    # Each name of MLX's that it wants is one that MLX without CUDA has, and it wants none of CUDA's.
    table = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    wanted = {line.split()[-1] for line in table.splitlines() if re.match(r"\s+[Uwv] ", line)}
    assert not [n for n in wanted if re.match(r"(cu|nvrtc|cuda|cublas)[A-Z_]", n)]
    mlx = next(Path(p) for p in __import__("mlx").__path__) / "lib" / "libmlx.so"
    table = subprocess.run(
        ["nm", "-D", "--defined-only", mlx], capture_output=True, text=True, check=True
    ).stdout
    offered = {line.split()[-1] for line in table.splitlines()}
    assert {n for n in wanted if n.startswith("_ZN3mlx") or n.startswith("_ZNK3mlx")} <= offered


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="here is a GPU")
def test_without_a_gpu_nothing_is_claimed() -> None:
    assert all("gpu" not in row or row["gpu"] == "fallback" for row in mlxsae.backends().values())


# ------------------------------------------------------------------------------- against MLX's CUDA wheel


def cuda_wheel() -> Path:
    folder = Path(os.environ.get("MLX_CUDA_WHEEL", ROOT / "build" / "mlx-cuda"))
    if not (folder / "mlx" / "include" / "mlx" / "backend" / "cuda" / "device.h").exists():
        pytest.skip("MLX_CUDA_WHEEL names no unpacked mlx-cuda-13 wheel")
    return folder / "mlx"


def test_declarations_are_those_of_mlx() -> None:
    wheel = cuda_wheel()
    includes = cuda_text.from_packages("*/include")
    for header, package in (
        ("cuda_runtime.h", "runtime"),
        ("crt/host_config.h", "crt"),
        ("cccl/cuda/std/complex", "cccl"),
    ):
        if not any((p / header).exists() for p in includes):
            pytest.skip(f"nvidia-cuda-{package} is not installed")
    command = ["g++", "-std=c++20", "-fsyntax-only", f"-I{wheel / 'include'}"]
    command += [f"-I{p}" for p in includes] + [f"-I{cuda_text.HERE / 'stubs'}", f"-I{ROOT / 'csrc'}"]
    result = subprocess.run(
        [*command, cuda_text.HERE / "declarations.cpp"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_names_that_are_looked_up_are_there() -> None:
    library = cuda_wheel() / "lib" / "libmlx.so"
    if not library.exists() or not shutil.which("nm"):
        pytest.skip("needs the wheel's library and nm")
    table = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    offered = {line.split()[-1] for line in table.splitlines()}
    names = re.findall(r'"(_ZN3mlx4core2cu\w+)"', (ROOT / "csrc" / "cuda" / "runtime.cpp").read_text())
    assert len(names) == 5
    assert set(names) <= offered
    if (lib := cuda_text.nvrtc()) is not None:
        for name in re.findall(r'"(nvrtc[A-Z]\w+)"', (ROOT / "csrc" / "cuda" / "runtime.cpp").read_text()):
            assert hasattr(lib, name)
