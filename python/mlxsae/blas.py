"""A real BLAS under MLX on Linux.

MLX's Linux wheels multiply matrices with netlib's reference BLAS: one thread, no SIMD, about 7 GFLOP/s where
OpenBLAS reaches hundreds on two cores. `enable()`, run once by ``import mlxsae``, loads the OpenBLAS of the
``scipy-openblas32`` wheel and sets the pointers through which ``libmlx.so`` calls ``cblas_sgemm``, the other
gemms and LAPACK. The dynamic linker fills those very pointers (the "global offset table"), so nothing is
compiled, no code is patched, and it does not matter whether ``mlx.core`` was imported first.

OpenBLAS itself is held to one thread, and ``libmlxsae`` shares a product out in tiles: OpenBLAS' own threads
wait for one another inside a product, which on a busy machine costs a factor of 100 (csrc/cpu/blas_redirect).

    >>> mlxsae.blas.status()     # what runs now
    >>> mlxsae.blas.disable()    # back to the reference BLAS

``MLXSAE_BLAS=off`` in the environment switches it off; ``MLXSAE_BLAS=/path/to/libopenblas.so`` names another
library, with 32-bit integers ("LP64"). A real BLAS that is there already (``LD_PRELOAD``, an MLX built with
one) is left alone. On macOS MLX uses Accelerate and there is nothing to do. float16, bfloat16 and quantised
products do not go through BLAS in MLX and stay as they are.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import mmap
import os
import platform
import re
import struct
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["BlasStatus", "disable", "enable", "get_num_threads", "library_path", "set_num_threads", "status"]

# ELF constants (System V gABI, <elf.h>): relocation types of a pointer to an imported function, per machine.
_GLOB_DAT_JUMP_SLOT = {"x86_64": (6, 7), "aarch64": (1025, 1026)}
_DT_NULL, _DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_JMPREL = 0, 2, 5, 6, 7, 8, 23
_RTLD_DI_LINKMAP = 2
_BLAS_NAME = re.compile(rb"cblas_[a-z]+|[sdcz][a-z]{4,6}_")  # cblas_sgemm; LAPACK's sgesdd_, dpotrf_, ...
_PREFIXES = ("scipy_", "")  # the wheel renames every symbol so as not to clash with another OpenBLAS
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")  # those OpenBLAS obeys


class BlasStatus(NamedTuple):
    """What MLX's CPU matrix products run on at this moment.

    Attributes
    ----------
    active : bool
        True where that is a real BLAS, by our doing or not; False where it is the reference BLAS or unknown.
    library : str or None
        File of the library that now serves ``cblas_sgemm``.
    config, core : str or None
        OpenBLAS' own description and the CPU core it chose its kernels for. A core older than the machine's
        (often through ``OPENBLAS_CORETYPE``) costs speed.
    threads : int or None
        Threads of one product; None where the library cannot tell.
    symbols : tuple of str
        The imports of ``libmlx.so`` that point to a library of our choice.
    reason : str
        One sentence: why it is so.
    """

    active: bool
    library: str | None
    config: str | None
    core: str | None
    threads: int | None
    symbols: tuple[str, ...]
    reason: str


class _UnavailableError(Exception):
    """A sentence that says why no real BLAS can be put under MLX, and what to do about it."""


class _DlInfo(ctypes.Structure):
    _fields_ = (("fname", ctypes.c_char_p), ("fbase", ctypes.c_void_p))
    _fields_ += (("sname", ctypes.c_char_p), ("saddr", ctypes.c_void_p))


class _LinkMap(ctypes.Structure):  # the public head of <link.h>'s struct link_map
    _fields_ = (("addr", ctypes.c_uint64), ("name", ctypes.c_char_p), ("dynamic", ctypes.c_uint64))


class _Redirect(NamedTuple):
    """What `enable` did; `tiles` is libmlxsae where that shares the products out, else None."""

    library: _Library
    tiles: ctypes.CDLL | None
    slots: dict[str, tuple[int, int, int]]  # symbol -> (slot, what it held, what we wrote)


_lock = threading.RLock()
_redirect: _Redirect | None = None
_reason = "mlxsae.blas.enable() has not run"


class _Library:
    """An open BLAS: addresses of its routines, and OpenBLAS' controls where it has them."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.handle = ctypes.CDLL(self.path)  # RTLD_LOCAL: its names are nobody else's business
        self.prefix = next((p for p in _PREFIXES if _address(self.handle, p + "cblas_sgemm")), None)

    def address(self, name: str) -> int | None:
        return None if self.prefix is None else _address(self.handle, self.prefix + name)

    def call(self, name: str, *args: int, restype: type = ctypes.c_int) -> int | str | None:
        """Result of OpenBLAS' control function `name`, or None where the library has none of that name."""
        if self.prefix is None or not hasattr(self.handle, self.prefix + name):
            return None
        function = getattr(self.handle, self.prefix + name)
        function.restype = restype
        value = function(*args)
        return value.decode() if isinstance(value, bytes) else value

    @property
    def is_reference(self) -> bool:
        """Netlib's CBLAS is known by a global variable of its error handler that optimised libraries lack."""
        return _address(self.handle, "CBLAS_CallFromC") is not None


def _address(handle: ctypes.CDLL, symbol: str) -> int | None:
    try:
        return ctypes.cast(getattr(handle, symbol), ctypes.c_void_p).value
    except AttributeError:
        return None


def _owner(address: int) -> str | None:
    """File of the loaded library that holds `address`."""
    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    info = _DlInfo()
    return os.fsdecode(info.fname) if dladdr(address, ctypes.byref(info)) and info.fname else None


class _Image:
    """``libmlx.so`` as it lies in memory: the slots through which it calls BLAS and LAPACK."""

    def __init__(self) -> None:
        types = _GLOB_DAT_JUMP_SLOT.get(platform.machine())
        if types is None or sys.maxsize < 2**32:
            raise _UnavailableError(f"no redirection is written for {platform.machine()} processors")
        try:  # RTLD_NOLOAD with the SONAME finds the copy that mlx.core uses, or none
            self.handle = ctypes.CDLL("libmlx.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except OSError as error:
            raise _UnavailableError("libmlx.so is not loaded: this MLX is no Linux wheel") from error
        dlinfo = ctypes.CDLL(None).dlinfo
        dlinfo.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        found = ctypes.POINTER(_LinkMap)()
        if dlinfo(self.handle._handle, _RTLD_DI_LINKMAP, ctypes.byref(found)):
            raise _UnavailableError("the dynamic linker does not tell where libmlx.so lies")
        self.path = os.fsdecode(found.contents.name)
        self.slots = dict(self._read_slots(found.contents.addr, found.contents.dynamic, types))

    @staticmethod
    def _read_slots(base: int, dynamic: int, types: tuple[int, int]) -> Iterator[tuple[str, int]]:
        """Walk both relocation tables and yield (symbol, address of its slot)."""
        tags: dict[int, int] = {}
        while (entry := struct.unpack("<qQ", ctypes.string_at(dynamic, 16)))[0] != _DT_NULL:
            tags[entry[0]] = entry[1]
            dynamic += 16

        def pointer(tag: int) -> int:  # glibc has added the base already, other linkers do not
            return tags[tag] + (base if tags[tag] < base else 0)

        symbols, names = pointer(_DT_SYMTAB), pointer(_DT_STRTAB)
        for table, size in ((_DT_JMPREL, _DT_PLTRELSZ), (_DT_RELA, _DT_RELASZ)):
            if table not in tags:
                continue
            for offset, info, _ in struct.iter_unpack("<QQq", ctypes.string_at(pointer(table), tags[size])):
                if info & 0xFFFFFFFF in types:
                    (name,) = struct.unpack("<I", ctypes.string_at(symbols + 24 * (info >> 32), 4))
                    symbol = ctypes.string_at(names + name)
                    if _BLAS_NAME.fullmatch(symbol):
                        yield symbol.decode(), base + offset

    def target(self, symbol: str) -> int | None:
        """Where a call of `symbol` goes; before the first one its slot may hold a stub in libmlx."""
        if symbol not in self.slots:
            return None
        address = _load(self.slots[symbol])
        if _owner(address) == self.path:
            address = _address(ctypes.CDLL(None), symbol) or _address(self.handle, symbol)
        return address


@functools.cache  # libmlx.so is never unloaded; an exception is not kept
def _image() -> _Image:
    return _Image()


def _load(slot: int) -> int:
    return ctypes.c_uint64.from_address(slot).value


def _store(slot: int, value: int) -> None:
    """Write a pointer; a page that the linker sealed after relocation ("RELRO") is opened for the moment."""
    page = slot & -mmap.PAGESIZE
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, rights = line.split(maxsplit=2)[:2]
            first, last = (int(end, 16) for end in span.split("-"))
            if first <= slot < last:
                break
        else:
            raise _UnavailableError(f"no memory is mapped at {slot:#x}")
    if "w" not in rights:
        _protect(page, mmap.PROT_READ | mmap.PROT_WRITE)
    # One aligned store: a thread in between sees the old routine or the new one.
    ctypes.c_uint64.from_address(slot).value = value
    if "w" not in rights:
        _protect(page, mmap.PROT_READ)


def _protect(page: int, rights: int) -> None:
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if mprotect(page, mmap.PAGESIZE, rights):
        raise OSError(ctypes.get_errno(), f"mprotect: {os.strerror(ctypes.get_errno())}")


def _default_threads() -> int:
    """What the environment tells OpenBLAS, else the physical cores this process may use.

    Hyperthreads share one multiplier, and OpenBLAS would not see that a container has a quota.
    """
    for name in _THREAD_VARIABLES:
        if (value := os.environ.get(name, "")).isdigit() and int(value) >= 1:
            return int(value)
    cpus = os.sched_getaffinity(0)
    cores = set()
    for cpu in cpus:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    try:  # control groups v2: microseconds of CPU time per period, or "max"
        group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
        quota, period = (Path("/sys/fs/cgroup") / group / "cpu.max").read_text().split()
        return max(1, min(len(cores), -(-int(quota) // int(period))))
    except (OSError, ValueError):
        return len(cores)


def library_path() -> Path | None:
    """The BLAS that `enable` would load: ``MLXSAE_BLAS``, else the wheel's OpenBLAS, else None.

    Its routines may carry the prefix ``scipy_``. `enable` holds it to one thread.
    """
    choice = os.environ.get("MLXSAE_BLAS", "")
    if choice and choice.lower() != "off":
        return Path(choice)
    wheel = importlib.util.find_spec("scipy_openblas32")  # not imported: that would make its symbols global
    for folder in (wheel and wheel.submodule_search_locations) or ():
        for path in sorted(Path(folder, "lib").glob("libscipy_openblas*.so*")):
            return path
    return None


def _open_library(path: Path | None) -> _Library:
    if path is None:
        raise _UnavailableError("scipy-openblas32 is not installed")
    try:
        library = _Library(path)
    except OSError as error:
        raise _UnavailableError(f"{path} cannot be loaded ({error})") from error
    if library.prefix is None:
        raise _UnavailableError(f"{path} has no cblas_sgemm")
    if library.is_reference:
        raise _UnavailableError(f"{path} is a reference BLAS itself")
    if "USE64BITINT" in str(library.call("openblas_get_config", restype=ctypes.c_char_p)):
        raise _UnavailableError(f"{path} takes 64-bit integers (ILP64) where MLX passes 32-bit ones (LP64)")
    return library


def enable(library: str | Path | None = None) -> BlasStatus:
    """Make MLX's CPU matrix products and decompositions run on a real BLAS; only Linux needs it.

    ``import mlxsae`` does this; call it again after `disable` or to change the library. It may be called at
    any time and from any thread: products under way end where they began. An OpenBLAS is held to one thread,
    for everybody who uses that very file in this process: several threads of ours call it side by side.

    Parameters
    ----------
    library : str or Path, optional
        BLAS to use, LP64. Default: ``MLXSAE_BLAS``, else that of the ``scipy-openblas32`` wheel. A library
        given here is used even where ``MLXSAE_BLAS=off`` or another real BLAS is in place.

    Returns
    -------
    BlasStatus

    Warns
    -----
    RuntimeWarning
        Where it cannot be done: the sentence says why and what to install.
    """
    global _reason
    with _lock:
        if sys.platform != "linux":
            return status()
        if library is None and os.environ.get("MLXSAE_BLAS", "").lower() == "off":
            _reason = "switched off by MLXSAE_BLAS=off"
            return status()
        try:
            import mlx.core  # noqa: F401  (puts libmlx.so, whose pointers we set, in memory)

            _point_to(library)
        except (_UnavailableError, OSError) as error:
            _reason = str(error)
            warnings.warn(
                f"[mlxsae.blas] MLX keeps its own BLAS, as a rule the slow reference one: {error}. Install "
                "OpenBLAS by `pip install scipy-openblas32`, name it by MLXSAE_BLAS=/path/to/libopenblas.so, "
                "or silence this by MLXSAE_BLAS=off.",
                RuntimeWarning,
                stacklevel=2,
            )
        return status()


def _point_to(choice: str | Path | None) -> None:
    global _redirect, _reason
    image = _image()
    serving = image.target("cblas_sgemm")
    if serving is None:
        raise _UnavailableError("libmlx.so imports no cblas_sgemm")
    owner = _owner(serving)
    if choice is None and owner and not _Library(owner).is_reference:
        if _redirect is None:
            _reason = "MLX already runs on a real BLAS, which is left alone"
        return
    library = _open_library(library_path() if choice is None else Path(choice))
    disable()
    tiles = _tiles(library)
    slots = {}
    for symbol, slot in image.slots.items():
        target = (tiles and _address(tiles, f"mlxsae_{symbol}")) or library.address(symbol)
        if target is not None:
            slots[symbol] = (slot, _load(slot), target)
    _redirect = _Redirect(library, tiles, slots)  # before the stores: disable() then undoes a half-done job
    for slot, _, target in slots.values():
        _store(slot, target)
    _reason = "mlxsae.blas.enable() pointed libmlx.so to this library"


def _tiles(library: _Library) -> ctypes.CDLL | None:
    """Let libmlxsae call `library`, held to one thread, where that can be had; set the number of threads."""
    if library.call("openblas_get_num_threads") is None:
        return None  # not an OpenBLAS: it keeps threads that we do not control
    try:
        tiles = ctypes.CDLL("libmlxsae.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        tiles = None
    routines = [library.address(f"cblas_{name}") for name in ("sgemm", "dgemm", "cgemm", "sgemv", "dgemv")]
    # OpenBLAS over OpenMP (2) takes its number of threads from each calling thread: it cannot be held to one.
    if tiles is None or None in routines or library.call("openblas_get_parallel") == 2:
        library.call("openblas_set_num_threads", _default_threads())
        return None
    library.call("openblas_set_num_threads", 1)
    tiles.mlxsae_blas_use((ctypes.c_void_p * len(routines))(*routines))
    tiles.mlxsae_blas_set_num_threads(_default_threads())
    return tiles


def disable() -> BlasStatus:
    """Give ``libmlx.so`` the routines back that it had before `enable`; what `enable` did not touch stays."""
    global _redirect, _reason
    with _lock:
        if _redirect is not None:
            for slot, original, target in _redirect.slots.values():
                if _load(slot) == target:
                    _store(slot, original)
            _redirect, _reason = None, "switched off by mlxsae.blas.disable()"
        return status()


def status() -> BlasStatus:
    """What serves MLX's CPU matrix products now, read from the pointers themselves."""
    with _lock:
        if sys.platform != "linux":
            mac = sys.platform == "darwin"
            why = "MLX uses Accelerate on macOS" if mac else f"nothing is done on {sys.platform}"
            return BlasStatus(mac, "Accelerate" if mac else None, None, None, None, (), why)
        library = _serving()
        if library is None:
            return BlasStatus(False, None, None, None, None, (), _reason)
        slots = _redirect.slots.items() if _redirect else ()
        return BlasStatus(
            active=not library.is_reference,
            library=library.path,
            config=_text(library, "openblas_get_config"),
            core=_text(library, "openblas_get_corename"),
            threads=get_num_threads(),
            symbols=tuple(sorted(name for name, (slot, _, target) in slots if _load(slot) == target)),
            reason=_reason,
        )


def _serving() -> _Library | None:
    """The library that serves ``cblas_sgemm``, None where MLX is not loaded or cannot be read."""
    try:
        address = _image().target("cblas_sgemm")
    except _UnavailableError:
        return None
    if _redirect and _redirect.slots["cblas_sgemm"][2] == address:
        return _redirect.library
    owner = address and _owner(address)
    return _Library(owner) if owner else None


def _text(library: _Library, name: str) -> str | None:
    return value if isinstance(value := library.call(name, restype=ctypes.c_char_p), str) else None


def get_num_threads() -> int | None:
    """Most threads of one matrix product; None where the library that serves MLX does not tell."""
    with _lock:
        library = _serving() if sys.platform == "linux" else None
        if library is None:
            return None
        if _redirect and _redirect.tiles and library is _redirect.library:
            return _redirect.tiles.mlxsae_blas_get_num_threads()
        threads = library.call("openblas_get_num_threads")
        return threads if isinstance(threads, int) else None


def set_num_threads(n: int) -> None:
    """Let MLX's products use at most `n` threads.

    The default is what ``OPENBLAS_NUM_THREADS`` says, else one per physical core that the process may use (a
    container's CPU quota counts).

    Raises
    ------
    ValueError
        Where `n` is less than 1.
    RuntimeError
        Where the library that serves MLX is not an OpenBLAS.
    """
    if n < 1:
        raise ValueError(f"[set_num_threads] n must be at least 1 but got {n}.")
    with _lock:
        if get_num_threads() is None:
            raise RuntimeError(f"[set_num_threads] MLX must run on OpenBLAS but runs on {status().library}.")
        library = _serving()
        if _redirect and _redirect.tiles and library is _redirect.library:
            _redirect.tiles.mlxsae_blas_set_num_threads(n)
        elif library:
            library.call("openblas_set_num_threads", n)
