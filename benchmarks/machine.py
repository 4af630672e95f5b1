"""What a result is worth nothing without: processor, threads, load, versions, memory."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

FORCED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""Variables that make OpenBLAS run kernels of another processor: they would halve a floor."""


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        if platform.system() == "Darwin":  # platform.processor() says no more than "arm"
            asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        return platform.processor() or platform.machine()
    name = re.search(r"model name\s*:\s*(.+)", text)
    family = re.search(r"cpu family\s*:\s*(\d+)", text)
    model = re.search(r"model\s*:\s*(\d+)", text)
    return f"{name[1] if name else platform.machine()}" + (
        f" family {family[1]} model {model[1]}" if family and model else ""
    )


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe(threads: int) -> dict:
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average": [round(v, 2) for v in os.getloadavg()],
    }


def run_delay() -> float:
    """Seconds that this process' threads have waited for a core, in all: somebody else had it. 0 where not told."""
    waited = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited += int(task.read_text().split()[1])
        except (OSError, IndexError, ValueError):
            continue
    return waited / 1e9


def rss() -> int:
    """Resident bytes of this process, 0 where the system does not tell."""
    return _status("VmRSS")


def peak_rss() -> int:
    """Largest resident bytes since :func:`reset_peak_rss`."""
    return _status("VmHWM")


def reset_peak_rss() -> bool:
    """Forget the peak; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    try:
        match = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


class BandwidthProbe:
    """In-place read and write over three arrays, as Adam walks parameter and moments: the roof of the update pass.

    Compiled once for this very processor; where there is no compiler, NumPy serves (one thread, a lower roof).
    """

    def __init__(self, floats: int, threads: int):
        self.floats, self.threads = floats, threads
        self._native = self._load()
        if self._native is None:
            self._arrays = [np.ones(floats, np.float32) for _ in range(3)]
        else:
            self._native.probe_make.restype = ctypes.c_void_p
            self._native.probe_run.argtypes = [ctypes.c_void_p]
            self._native.probe_run.restype = ctypes.c_double
            self._state = ctypes.c_void_p(self._native.probe_make(ctypes.c_size_t(floats), threads))

    @property
    def native(self) -> bool:
        return self._native is not None

    def bytes_per_second(self) -> float:
        if self._native is not None:
            return 24.0 * self.floats / self._native.probe_run(self._state)
        start = time.perf_counter()
        for a in self._arrays:
            a += 1
        return 24.0 * self.floats / (time.perf_counter() - start)

    @staticmethod
    def _load() -> ctypes.CDLL | None:
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "probe.so")
            source = Path(__file__).with_name("probe.cpp")
            options = ["-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread"]
            try:
                subprocess.run(
                    [compiler, *options, str(source), "-o", str(library)], check=True, capture_output=True
                )
            except subprocess.CalledProcessError:
                return None
            return ctypes.CDLL(str(library))
