"""The CUDA text of our kernels: made by the build's translation, compiled for GPUs by NVRTC and run on this CPU."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import embed_metal
import msl_to_cuda
from msl import toolchain
from msl.frontend import KernelSource, Parameter, Program
from msl.library import Library

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
HEADER = (ROOT / "csrc" / "cuda" / "msl.cuh").read_text()
LIBRARIES = sorted(p.stem for p in (ROOT / "metal").glob("*.metal"))


@functools.cache
def translated(library: str) -> tuple[str, dict[str, tuple[str, msl_to_cuda.Kernel]]]:
    """The CUDA text of a library, and its kernels."""
    text = embed_metal.libraries(ROOT / "metal")[library]
    return msl_to_cuda.translate(msl_to_cuda.preprocess(text, "g++"))


# ------------------------------------------------------------------------------------------------- on this CPU


@functools.cache
def on_cpu(library: str) -> Library:
    """The kernels of a library on the harness: launched as on a GPU, by the `extern "C"` functions."""
    text, kernels = translated(library)
    table, run = [], []
    for k, (name, (expression, kernel)) in enumerate(kernels.items()):
        function, _, arguments = expression.partition("<")
        body = f"{function.strip()}_body" + (f"<{arguments}" if arguments else "")
        indices = sorted(p.index for p in kernel.parameters if p.index is not None)
        run.append(
            f"static constexpr int indices_{k}[] = {{{', '.join(map(str, indices))}}};\n"
            f"static void run_{k}() {{ cuda_on_cpu::call(&{name}, indices_{k}); }}"
        )
        table.append(f'{{"{name}", run_{k}, {len(kernel.parameters)}, cuda_on_cpu::describe_all(&{body})}}')
    unit = "\n".join(
        [
            "#define MSL_ALL_KERNELS",
            (HERE / "emulation.h").read_text().replace("#pragma once", ""),
            HEADER,
            (HERE / "table.h").read_text(),
            text,
            "namespace metal::kernels {",
            *run,
            'extern "C" __attribute__((visibility("default"))) const cuda_on_cpu::Kernel msl_kernels[] = {',
            *(f"  {row}," for row in table),
            "  {nullptr, nullptr, 0, nullptr}};\n}",
        ]
    )
    path = toolchain.build(unit, mode="fast", compiler="g++")
    sources = {
        n: KernelSource(n, tuple(parameter(p) for p in k.parameters), False, 0, most_threads(k))
        for n, (_, k) in kernels.items()
    }
    return Library(Program("", sources, {n: n for n in kernels}), path, "fast")


def most_threads(kernel: msl_to_cuda.Kernel) -> int | None:
    return int(kernel.bound) if kernel.bound.isdigit() else None


def parameter(p: msl_to_cuda.Parameter) -> Parameter:
    source = p.place or "buffer"
    return Parameter(p.name, source, p.index or 0, "", p.value, p.value, None, f"{p.type} {p.name}")


# ------------------------------------------------------------------------------------------------- for GPUs


@dataclass(frozen=True)
class Resources:
    """What the assembler says of a kernel: registers of a thread, bytes it spills, shared bytes of a block."""

    registers: int
    spilled: int
    shared: int


def from_packages(pattern: str) -> list[Path]:
    """Files of the Python packages nvidia-*, where some are installed."""
    spec = importlib.util.find_spec("nvidia")
    folders = (spec.submodule_search_locations if spec else None) or []
    return [path for folder in folders for path in sorted(Path(folder).glob(pattern))]


@functools.cache
def nvrtc() -> ctypes.CDLL | None:
    """NVRTC of the package nvidia-cuda-nvrtc."""
    return next((ctypes.CDLL(str(path)) for path in from_packages("*/lib/libnvrtc.so.1[3-9]")), None)


@functools.cache
def nvcc() -> Path | None:
    """nvcc of the package nvidia-cuda-nvcc, with the packages that it needs, or of a toolkit on the path."""
    for path in from_packages("*/bin/nvcc"):
        if (path.parents[1] / "include" / "crt").exists() and (
            path.parents[1] / "nvvm" / "bin" / "cicc"
        ).exists():
            return path
    found = shutil.which("nvcc")
    return Path(found) if found else None


def compile_for_gpu(text: str, architecture: str, kernels: list[str]) -> dict[str, Resources]:
    """Compiles kernels of a text as csrc/cuda does; raises with the compiler's messages."""
    lib = nvrtc()
    assert lib is not None
    program = ctypes.c_void_p()
    lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
    options = [f"--gpu-architecture={architecture}", "-std=c++17", "--ptxas-options=-v"]
    options += [f"-DMSL_KERNEL_{k}" for k in kernels]
    status = lib.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    )
    size = ctypes.c_size_t()
    lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetProgramLog(program, log)
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    if status:
        raise RuntimeError(log.value.decode())
    return resources(log.value.decode())


def compile_by_nvcc(text: str, architecture: str, kernels: list[str]) -> dict[str, Resources]:
    """The same by nvcc."""
    command = [str(nvcc()), "-x", "cu", "-std=c++17", "-cubin", f"-arch={architecture}", "-Xptxas", "-v"]
    command += [f"-DMSL_KERNEL_{k}" for k in kernels]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernels.cu")
        source.write_text(text)
        done = subprocess.run(
            [*command, "-o", Path(folder, "kernels.cubin"), source],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return resources(done.stderr)


def resources(log: str) -> dict[str, Resources]:
    out = {}
    for part in log.split("Function properties for ")[1:]:
        name = part.split()[0]
        registers = re.search(r"Used (\d+) registers", part)
        spilled = re.search(r"(\d+) bytes spill stores", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers
        assert spilled
        out[name] = Resources(int(registers[1]), int(spilled[1]), int(shared[1]) if shared else 0)
    return out
