"""Finding compilers, running them, and the cache of what they made."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .errors import CompileError, ToolMissing

RUNTIME = Path(__file__).resolve().parent / "runtime"
# The runtime's folder in debug information: what is cached must not depend on where this package lies.
_RUNTIME_NAME = "msl-runtime"
_CLANGS = [f"clang++-{v}" for v in range(24, 15, -1)] + ["clang++"]


def _version(compiler: str) -> int:
    """Major version of a clang or GCC."""
    out = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=True).stdout
    return int(out.split(".")[0])


@functools.cache
def clang(least: int = 17) -> str:
    """The newest clang++ on the path that is at least of version `least`; ToolMissing where there is none."""
    for name in _CLANGS:
        if (path := shutil.which(name)) and _version(path) >= least:
            return path
    raise ToolMissing(f"[msl] needs clang++ of version {least} or newer but there is none on the path")


@functools.cache
def default_compiler() -> str:
    """$MSL_CXX, else the newest clang++ (from 17), else g++ (from 12), else c++."""
    if given := os.environ.get("MSL_CXX"):
        return given
    try:
        return clang()
    except ToolMissing:
        pass
    for name in ("g++", "c++"):
        if path := shutil.which(name):
            return path
    raise ToolMissing(
        "[msl] needs clang++ (17 or newer) or g++ (12 or newer) but there is neither on the path"
    )


@functools.cache
def _identity(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def is_clang(compiler: str) -> bool:
    return "clang" in _identity(compiler)


@functools.cache
def _machine_flags() -> tuple[str, ...]:
    """Hardware half precision and fused multiply-add, where this processor has them."""
    if platform.machine() != "x86_64":
        return ()
    try:
        flags = set(
            re.findall(r"\w+", Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0])
        )
    except (OSError, IndexError):
        return ()
    return ("-march=x86-64-v3",) if {"avx2", "fma", "f16c", "bmi2", "movbe"} <= flags else ()


@functools.cache
def cache_dir() -> Path:
    """$MSL_CACHE, else the user's cache folder, else a temporary one."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for place in (os.environ.get("MSL_CACHE"), f"{home}/msl-on-cpu"):
        if place:
            try:
                Path(place).mkdir(parents=True, exist_ok=True, mode=0o700)
                if os.access(place, os.W_OK):
                    return Path(place)
            except OSError:
                continue
    return Path(tempfile.mkdtemp(prefix="msl-"))


def run(command: Sequence[str], text: str | None = None) -> str:
    """Standard output of a compiler; CompileError with its messages where it fails."""
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    if result.returncode:
        raise CompileError(result.stderr.strip()[:20000])
    return result.stdout


_STUBS = """
metal_stdlib metal_atomic metal_common metal_compute metal_geometric metal_integer metal_logging metal_math
metal_matrix metal_numeric metal_pack metal_quadgroup metal_relational metal_simdgroup metal_simdgroup_matrix metal_tensor
metal_type_traits metal_types metal_limits metal_array metal_config metal_utility metal_uniform
"""


# MLX's overloads for bfloat call internals of Apple's compiler; the runtime has these functions for bfloat.
_STUBS_OF_MLX = "mlx/backend/metal/kernels/bf16_math.h"


@functools.cache
def _stubs() -> Path:
    """A folder of empty files in the place of Metal's headers: the runtime includes what they declare."""
    folder = cache_dir() / "stubs"
    for name in [*_STUBS.split(), _STUBS_OF_MLX]:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()
    return folder


METAL_VERSION = 320
INLINE = "inline.metal"  # names a source that is not a file


def preprocess(
    source: str, *, include: Sequence[str | os.PathLike], defines: dict[str, object], compiler: str, name: str
) -> str:
    """The source with macros and includes expanded and line markers kept."""
    macros = {
        "__METAL__": 1,
        "__METAL_VERSION__": METAL_VERSION,
        "__METAL_MACOS__": 1,
        "__HAVE_BFLOAT__": 1,
    } | defines
    command = [
        compiler,
        "-E",
        "-x",
        "c++",
        "-std=c++17",
        "-nostdinc",
        "-nostdinc++",
        "-undef",
        f"-I{_stubs()}",
    ]
    command += [f"-I{i}" for i in include] + [f"-D{k}={v}" for k, v in macros.items()]
    return run([*command, "-"], f'# 1 "{name}"\n{source}')


# A tail call would hide where a barrier was called from.
_COMMON = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-ffp-contract=fast",
    "-g1",
    "-fno-optimize-sibling-calls",
)
_OBSERVED = ("-O1", "-fsanitize=thread")
_MODES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # flags of the kernels, sources of the runtime
    "fast": (("-O2",), ("machine.cpp",)),
    "checked": (_OBSERVED, ("machine.cpp", "tsan.cpp", "check.cpp")),
    "counted": (_OBSERVED, ("machine.cpp", "tsan.cpp", "count.cpp")),
}
MODES = tuple(_MODES)


def _kernel_flags(compiler: str, mode: str) -> list[str]:
    flags = [*_COMMON, *_machine_flags(), *_MODES[mode][0]]
    if is_clang(compiler):  # every operation on half rounds, as on a GPU
        flags += ["-Xclang", "-ffloat16-excess-precision=none", "-Wno-everything"]
        if mode != "fast":
            flags += ["-fno-vectorize", "-fno-slp-vectorize", "-fno-unroll-loops"]
            flags += ["-mllvm", "-tsan-instrument-func-entry-exit=0"]
            flags += ["-mllvm", "-tsan-instrument-read-before-write=1"]
    else:  # a barrier in each branch stays two barriers
        flags += ["-w", "-fno-crossjumping", "-fno-tree-tail-merge"]
    return flags


@functools.cache
def _runtime_digest() -> str:
    digest = hashlib.sha256()
    for file in sorted(RUNTIME.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _built(path: Path, command: Sequence[str], text: str | None = None) -> Path:
    """Runs a command that writes to the last argument, once; several processes may want the same file."""
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}{path.suffix}")
        run([*command, str(partial)], text)
        partial.rename(path)
    return path


def build(text: str, *, mode: str, compiler: str) -> Path:
    """The shared library of a rewritten program."""
    flags = _kernel_flags(compiler, mode)
    key = digest(_identity(compiler), _runtime_digest(), " ".join(flags), mode, _RUNTIME_NAME)
    library = cache_dir() / f"{digest(key, text)}-{mode}.so"
    if library.exists():
        library.touch()
        return library
    objects = []
    for source in _MODES[mode][1]:
        observed = ["-DMSL_OBSERVED"] if mode != "fast" else []
        command = [
            compiler,
            "-std=c++17",
            "-O2",
            "-g1",
            "-fPIC",
            "-fvisibility=hidden",
            "-fno-exceptions",
            *observed,
        ]
        command += [str(RUNTIME / source), "-c", "-o"]
        objects.append(_built(cache_dir() / f"{key}-{Path(source).stem}.o", command))
    kernels = library.with_suffix(f".{os.getpid()}.o")  # another process may be making the same library
    flags.append(f"-ffile-prefix-map={RUNTIME}={_RUNTIME_NAME}")
    _built(kernels, [compiler, *flags, f"-I{RUNTIME}", "-x", "c++", "-c", "-", "-o"], text)
    _built(library, [compiler, "-shared", str(kernels), *map(str, objects), "-lm", "-o"])
    kernels.unlink(missing_ok=True)
    return library


@functools.cache
def _symbolizer() -> str | None:
    for name in ("llvm-symbolizer", *(f"llvm-symbolizer-{v}" for v in range(24, 13, -1)), "addr2line"):
        if path := shutil.which(name):
            return path
    return None


def places(library: Path, addresses: Sequence[int]) -> list[tuple[str, int] | None]:
    """(file, line) of the kernel source behind each code address, seen through inlined functions of the runtime."""
    tool = _symbolizer()
    found: list[tuple[str, int] | None] = []
    for address in addresses:
        place = None
        if tool and address:
            short = "addr2line" in tool
            command = [tool, "-i", "-e", str(library), hex(address)] if short else [
                tool, f"--obj={library}", "--output-style=GNU", "-i", hex(address)]  # fmt: skip
            for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines():
                file, _, number = line.split(" (discriminator")[0].rpartition(":")
                if (
                    not file
                    or file == "??"
                    or Path(file).parent.name == _RUNTIME_NAME
                    or not number.isdigit()
                ):
                    continue
                place = (INLINE if file.endswith(f"/{INLINE}") else file, int(number))
                break
        found.append(place)
    return found
