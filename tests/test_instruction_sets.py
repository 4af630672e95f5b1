"""The kernels on other processors: built by a cross compiler, run under emulation, equal to ours bit for bit."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-w", "-static"]


def run(*command):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def results(compiler, isa, folder, *flags, emulator=()):
    program = folder / isa
    sources = [ROOT / "csrc/cpu/kernels.cpp", ROOT / "tests/cpp/kernels_check.cpp"]
    run(
        compiler,
        *FLAGS,
        *flags,
        f"-DMLXSAE_ISA={isa}",
        f"-DISA={isa}",
        f"-I{ROOT / 'csrc'}",
        *sources,
        "-o",
        program,
    )
    return run(*emulator, program)


@pytest.mark.slow
def test_neon_kernels_give_the_bits_of_this_processor(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if not compiler or not emulator:
        pytest.skip(
            "needs a cross compiler and an emulator (Debian: g++-aarch64-linux-gnu, qemu-user-static)"
        )
    if platform.machine() != "x86_64" or "fma" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("compares with an x86-64 processor that has fused multiply-add")
    ours = results("g++", "avx2", tmp_path, "-mavx2", "-mfma", "-mf16c")
    neon = results(compiler, "neon", tmp_path, emulator=[emulator])
    assert re.findall(r"wrong (\d+)", neon) == ["0"] * 4
    assert neon == ours
