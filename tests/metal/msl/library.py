"""Loading MSL and launching its kernels on NumPy arrays."""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from . import toolchain
from .counts import Counts, RawCounts
from .errors import BY_KIND, Divergence, KernelError, LaunchError
from .frontend import Parameter, Program, rewrite

MAX_BUFFERS = 31


class _Buffer(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint64) for n in ("data", "size")] + [
        (n, ctypes.c_uint32) for n in ("cell", "writable", "undefined", "unused")
    ]


_U3 = ctypes.c_uint32 * 3


class _Launch(ctypes.Structure):
    _fields_ = [
        ("buffers", _Buffer * MAX_BUFFERS),
        ("dynamic", ctypes.c_uint64 * MAX_BUFFERS),
        ("grid", _U3),
        ("group", _U3),
        ("schedule", ctypes.c_uint32),
        ("allow_uninitialised", ctypes.c_uint32),
        ("stacks", ctypes.c_void_p),
        ("seconds", ctypes.c_double),
    ]


class _Outcome(ctypes.Structure):
    _fields_ = [
        ("switches", ctypes.c_uint64),
        ("accesses", ctypes.c_uint64),
        ("threadgroup_bytes", ctypes.c_uint64),
        ("sites", ctypes.c_uint64 * 2),
        ("failed", ctypes.c_uint32),
        ("meetings", ctypes.c_uint32),
        ("meeting", ctypes.c_uint64 * 128),
        ("kind", ctypes.c_char * 32),
        ("message", ctypes.c_char * 512),
    ]


class _Described(ctypes.Structure):
    _fields_ = [("scalar", ctypes.c_char)] + [
        (n, ctypes.c_int) for n in ("scalar_bytes", "bytes", "constant")
    ]


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("run", ctypes.c_void_p),
        ("parameters", ctypes.c_int),
        ("described", ctypes.POINTER(_Described)),
    ]


@dataclass(frozen=True)
class Argument:
    """One parameter of a kernel as the compiler sees it.

    `source`: 'buffer', 'threadgroup' (memory whose size the launch gives) or the name of a builtin attribute.
    `element`: NumPy's name of the scalar type, 'bfloat16', or 'struct'; `bytes`: of the type behind the pointer or reference.
    """

    name: str
    source: str
    index: int
    space: str
    constant: bool
    reference: bool
    element: str
    bytes: int
    optional_by: str | None
    text: str


@dataclass(frozen=True)
class Signature:
    """A kernel that can be launched."""

    name: str
    arguments: tuple[Argument, ...]

    @property
    def buffers(self) -> dict[int, Argument]:
        return {a.index: a for a in self.arguments if a.source == "buffer"}

    @property
    def threadgroup(self) -> dict[int, Argument]:
        return {a.index: a for a in self.arguments if a.source == "threadgroup"}

    @property
    def builtins(self) -> dict[str, str]:
        return {a.name: a.source for a in self.arguments if a.source not in ("buffer", "threadgroup")}


@dataclass(frozen=True)
class Report:
    """What a launch did. `accesses` and `counts` are of observed modes; `threadgroup_bytes` is the largest use of a group."""

    switches: int
    accesses: int
    threadgroup_bytes: int
    counts: Counts | None


def _element(d: _Described) -> str:
    letter = d.scalar.decode()
    if letter == "V":
        return "struct"
    if letter == "b":
        return "bfloat16"
    return "bool" if letter == "?" else np.dtype(f"{letter}{d.scalar_bytes}").name


def launch_table(program: Program) -> str:
    """C++ that lists the kernels and calls each with the arguments of a launch: the end of a rewritten program."""
    lines = ['\n#line 1 "launch table"']
    table = []
    for k, (name, expression) in enumerate(_entries(program).items()):
        kernel = program.kernels[_base(expression)]
        sources = ", ".join(f"{{msl::Source::{p.source}, {p.index}}}" for p in kernel.parameters)
        lines.append(f"static constexpr msl::Parameter msl_p{k}[] = {{{sources or '{}'}}};")
        lines.append(f"static void msl_k{k}() {{ msl::call(&{expression}, msl_p{k}); }}")
        quoted = name.replace("\\", "\\\\").replace('"', '\\"')
        count = len(kernel.parameters)
        table.append(f'{{"{quoted}", msl_k{k}, {count}, msl::describe_all(&{expression})}}')
    lines.append('extern "C" __attribute__((visibility("default"))) const msl::Kernel msl_kernels[] = {')
    lines += [f"  {entry}," for entry in table]
    lines.append("  {nullptr, nullptr, 0, nullptr}};")
    return "\n".join(lines) + "\n"


def _base(expression: str) -> str:
    return expression.split("<", 1)[0].rsplit("::", 1)[-1].strip()


def _entries(program: Program) -> dict[str, str]:
    return {n: e for n, e in program.entries.items() if _base(e) in program.kernels}


Value = np.ndarray | np.generic | int | float | bool | bytes | None


class Library:
    """The kernels of one MSL source, compiled for this CPU. Made by `msl.load`.

    One launch runs at a time in a process; launches of several libraries are independent.
    """

    _stacks: int | None = None  # of the threads of a threadgroup, made by the first library for all

    def __init__(self, program: Program, path: Path, mode: str) -> None:
        self.mode = mode
        self.path = path
        self._program = program
        self._dll = ctypes.CDLL(str(path))
        table = ctypes.cast(self._dll.msl_kernels, ctypes.POINTER(_Kernel))
        self.kernels: dict[str, Signature] = {}
        self._run: dict[str, int] = {}
        for k, (name, expression) in enumerate(_entries(program).items()):
            parameters = program.kernels[_base(expression)].parameters
            arguments = tuple(self._argument(p, table[k].described[i]) for i, p in enumerate(parameters))
            self.kernels[name] = Signature(name, arguments)
            self._run[name] = table[k].run
        self.constants = dict(program.constants)
        if Library._stacks is None:
            self._dll.msl_make_stacks.restype = ctypes.c_void_p
            Library._stacks = self._dll.msl_make_stacks()
            if not Library._stacks:
                raise MemoryError("[load] no address space for the threads of a threadgroup")
        self._dll.msl_set_constant.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int]

    @staticmethod
    def _argument(p: Parameter, d: _Described) -> Argument:
        return Argument(p.name, p.source, p.index, p.space, p.constant or bool(d.constant), p.reference, _element(d), d.bytes, p.optional_by, p.text)  # fmt: skip

    def launch(
        self,
        name: str,
        buffers: Mapping[int | str, Value],
        *,
        grid: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
        threadgroup: Sequence[int],
        constants: Mapping[int | str, object] | None = None,
        threadgroup_memory: Mapping[int | str, int] | None = None,
        schedule: int = 0,
        undefined: Sequence[int | str] = (),
        allow_uninitialised: bool = False,
        seconds: float = 60.0,
    ) -> Report:
        """Runs kernel `name` and writes its outputs into the given arrays.

        `buffers`: by [[buffer(i)]] index or parameter name: C-contiguous arrays; for `constant T&` also a scalar or bytes.
        `grid`: threads in x, y, z (dispatchThreads, ragged last groups), or `groups`: threadgroups (dispatchThreadgroups).
        `constants`: function constants by index or name. `threadgroup_memory`: bytes of each [[threadgroup(i)]] argument.
        `schedule`: 0 runs threads in order; odd numbers seed random orders, even ones random priorities of simdgroups.
        `undefined`: buffers whose content is undefined before the launch: checked mode refuses reads before writes.
        Raises LaunchError where bindings do not fit, KernelError where the kernel misbehaves.
        """
        signature = self.kernels.get(name)
        if signature is None:
            raise LaunchError(f"[launch] kernel must be one of {sorted(self.kernels)} but got '{name}'.")
        launch = _Launch(stacks=self._stacks)
        launch.schedule, launch.allow_uninitialised, launch.seconds = schedule, allow_uninitialised, seconds
        self._bind_sizes(name, launch, grid, groups, threadgroup, self._most_threads(name))
        keep = self._bind_buffers(signature, launch, buffers, undefined)
        self._bind_threadgroup(signature, launch, threadgroup_memory or {})
        self._bind_constants(signature, constants or {})
        outcome = _Outcome()
        if (
            self._dll.msl_run(ctypes.c_void_p(self._run[name]), ctypes.byref(launch), ctypes.byref(outcome))
            < 0
        ):
            raise MemoryError(f"[launch] {name}: no memory for a copy of the buffers")
        for target, copy in keep:
            if copy is not target:
                target[...] = copy
        if outcome.failed:
            raise self._failure(name, outcome)
        self._refuse_mixed_meetings(name, outcome)
        counts = None
        if self.mode == "counted":
            raw = RawCounts()
            self._dll.msl_counts(ctypes.byref(raw))
            counts = Counts.of(raw, {i: a.name for i, a in signature.buffers.items()})
        return Report(outcome.switches, outcome.accesses, outcome.threadgroup_bytes, counts)

    # ------------------------------------------------------------------ bindings

    @staticmethod
    def _three(what: str, v: Sequence[int]) -> tuple[int, int, int]:
        x, y, z = (*map(int, v), 1, 1)[:3]
        if len(v) > 3 or min(x, y, z) < 1 or max(x, y, z) >= 2**32:
            raise LaunchError(f"[launch] {what} must be one to three positive numbers but got {tuple(v)}.")
        return x, y, z

    def _most_threads(self, name: str) -> int:
        declared = self._program.kernels[_base(self._program.entries[name])].most_threads
        return min(declared or 1024, 1024)

    def _bind_sizes(self, name, launch, grid, groups, threadgroup, most_threads) -> None:
        if (grid is None) == (groups is None):
            raise LaunchError(f"[launch] {name}: exactly one of grid and groups must be given.")
        size = self._three("threadgroup", threadgroup)
        if size[0] * size[1] * size[2] > most_threads:
            raise LaunchError(
                f"[launch] {name}: a threadgroup has at most {most_threads} threads but got {size}."
            )
        if grid is None:
            grid = [g * s for g, s in zip(self._three("groups", groups), size, strict=True)]
        launch.grid, launch.group = _U3(*self._three("grid", grid)), _U3(*size)

    @staticmethod
    def _by_index(signature: Signature, given: Mapping, arguments: Mapping[int, Argument], what: str) -> dict:
        names = {a.name: i for i, a in arguments.items()}
        out = {}
        for key, value in given.items():
            index = names.get(key) if isinstance(key, str) else key
            if index not in arguments:
                known = ", ".join(f"{i}: {a.name}" for i, a in sorted(arguments.items()))
                raise LaunchError(
                    f"[launch] {signature.name} has no {what} {key!r}; it has {known or 'none'}."
                )
            if index in out:
                raise LaunchError(f"[launch] {signature.name}: {what} {index} is given twice.")
            out[index] = value
        return out

    def _bind_buffers(self, signature: Signature, launch: _Launch, given: Mapping, undefined) -> list:
        arguments = signature.buffers
        values = self._by_index(signature, given, arguments, "buffer")
        unset = set(self._by_index(signature, dict.fromkeys(undefined), arguments, "buffer"))
        keep = []
        for index, a in arguments.items():
            value = values.get(index)
            if value is None:
                if a.optional_by is None and index not in values:
                    raise LaunchError(f"[launch] {signature.name}: buffer {index} ({a.text}) is not given.")
                continue
            array = self._array(signature, a, value)
            if not a.constant and not array.flags.writeable:
                raise LaunchError(f"[launch] {signature.name}: buffer {index} ({a.text}) must be writable.")
            data = np.ascontiguousarray(array)
            if data is not array and not a.constant:
                raise LaunchError(
                    f"[launch] {signature.name}: buffer {index} ({a.text}) must be C-contiguous."
                )
            keep.append((array, data))
            launch.buffers[index] = _Buffer(
                data.ctypes.data,
                data.nbytes,
                max(1, min(data.itemsize, 8)),
                not a.constant,
                index in unset,
                0,
            )
        return keep

    @staticmethod
    def _array(signature: Signature, a: Argument, value) -> np.ndarray:
        where = f"[launch] {signature.name}: buffer {a.index} ({a.text})"
        expected = (
            None if a.element == "struct" else np.dtype("uint16" if a.element == "bfloat16" else a.element)
        )
        if isinstance(value, bytes | bytearray):
            array = np.frombuffer(value, np.uint8)
        elif isinstance(value, np.ndarray | np.generic):
            array = np.asarray(value)
        elif expected is not None and isinstance(value, int | float) and a.element != "bfloat16":
            try:
                array = np.asarray(value, expected)
            except OverflowError:
                raise LaunchError(f"{where} cannot hold {value}.") from None
            if array != value and expected.kind in "iu":
                raise LaunchError(f"{where} cannot hold {value}.")
        else:
            raise LaunchError(
                f"{where} needs an array, a NumPy scalar or bytes but got {type(value).__name__}."
            )
        raw = array.dtype == np.uint8 and isinstance(value, bytes | bytearray)
        if expected is not None and not raw and array.dtype != expected:
            named = array.dtype.name == a.element or (
                array.dtype.kind == "V" and array.dtype.itemsize == expected.itemsize
            )
            if not named:
                note = " (as uint16, see msl.bfloat16)" if a.element == "bfloat16" else ""
                raise LaunchError(f"{where} must be of type {a.element}{note} but got {array.dtype}.")
        if a.reference and array.nbytes < a.bytes:
            raise LaunchError(f"{where} must hold {a.bytes} bytes but got {array.nbytes}.")
        return array

    def _bind_threadgroup(self, signature: Signature, launch: _Launch, given: Mapping) -> None:
        arguments = signature.threadgroup
        sizes = self._by_index(signature, given, arguments, "threadgroup argument")
        for index, a in arguments.items():
            size = sizes.get(index, 0)
            if size <= 0 or size % 16:
                raise LaunchError(
                    f"[launch] {signature.name}: threadgroup_memory of {index} ({a.text}) must be a positive multiple of 16 "
                    f"bytes but got {size}."
                )
            launch.dynamic[index] = size

    def _bind_constants(self, signature: Signature, given: Mapping) -> None:
        self._dll.msl_clear_constants()
        indices = {c.name: c.index for c in self.constants.values()}
        done = set()
        for key, value in given.items():
            index = indices.get(key) if isinstance(key, str) else key
            if index not in indices.values():
                raise LaunchError(f"[launch] there is no function constant {key!r}; there are {indices}.")
            declared = next(c for c in self.constants.values() if c.index == index)
            data = self._constant_bytes(declared.type, value)
            if (size := self._dll.msl_set_constant(index, data, len(data))) != len(data):
                raise LaunchError(
                    f"[launch] function constant {key!r} ({declared.type}) takes {size} bytes but got {len(data)}."
                )
            done.add(index)
        for c in self.constants.values():
            if (
                c.index not in done
                and c.name not in self._program.defaulted
                and c.name in self._reached(signature.name)
            ):
                raise LaunchError(
                    f"[launch] {signature.name} needs function constant {c.index} ({c.type} {c.name}), which is not given."
                )

    @staticmethod
    def _constant_bytes(kind: str, value) -> bytes:
        names = {
            "bool": "?",
            "float": "f4",
            "half": "f2",
            "char": "i1",
            "uchar": "u1",
            "short": "i2",
            "ushort": "u2",
        }
        names |= {"int": "i4", "uint": "u4", "long": "i8", "ulong": "u8", "int32_t": "i4", "uint32_t": "u4"}
        names |= {"unsigned int": "u4", "int64_t": "i8", "uint64_t": "u8", "size_t": "u8"}
        if isinstance(value, np.ndarray | np.generic):
            return value.tobytes()
        return np.asarray(value, names.get(kind)).tobytes()

    @functools.cache  # noqa: B019 libraries live as long as the process
    def _reached(self, name: str) -> frozenset[str]:
        """Names that a kernel mentions, directly or through what it calls."""
        start = set(re.findall(r"\w+", self._program.entries[name]))
        reached: set[str] = set()
        while start:
            n = start.pop()
            reached.add(n)
            start |= self._program.uses.get(n, frozenset()) - reached
        return frozenset(reached)

    # ------------------------------------------------------------------ failures

    def _failure(self, name: str, outcome: _Outcome) -> KernelError:
        found = toolchain.places(self.path, list(outcome.sites))
        text = outcome.message.decode()
        for k, place in enumerate(found):
            text = text.replace(
                f"{{{k}}}", f"{os.path.basename(place[0])}:{place[1]}" if place else "an unknown place"
            )
        return BY_KIND[outcome.kind.decode()](f"[{name}] {text}", tuple(p for p in found if p))

    def _refuse_mixed_meetings(self, name: str, outcome: _Outcome) -> None:
        """Lanes that met in one operation from different lines took different branches."""
        for k in range(outcome.meetings):
            pair = toolchain.places(self.path, list(outcome.meeting[2 * k : 2 * k + 2]))
            a, b = pair
            if a and b and a != b:
                lines = " and ".join(f"{os.path.basename(file)}:{line}" for file, line in (a, b))
                raise Divergence(
                    f"[{name}] threads reach one barrier or simd operation from different lines: {lines}",
                    (a, b),
                )


@functools.cache
def _loaded(text: str, program_key: str, mode: str, compiler: str) -> Library:
    program = _programs[program_key]
    return Library(program, toolchain.build(text, mode=mode, compiler=compiler), mode)


_programs: dict[str, Program] = {}


def source_of(path_or_text: str | os.PathLike) -> tuple[str, str, list[str]]:
    """(text, name for messages, folder of the file) of a path, or of a text that holds MSL itself."""
    if isinstance(path_or_text, str) and ("\n" in path_or_text or "{" in path_or_text):
        return path_or_text, toolchain.INLINE, []
    path = Path(path_or_text).resolve()
    return path.read_text(), str(path), [str(path.parent)]


def expand(
    path_or_text: str | os.PathLike,
    *,
    include: Sequence[str | os.PathLike] = (),
    defines: Mapping[str, object] | None = None,
    compiler: str | None = None,
) -> str:
    """The source with macros and includes expanded."""
    text, name, folder = source_of(path_or_text)
    compiler = compiler or toolchain.default_compiler()
    return toolchain.preprocess(
        text, include=[*folder, *include], defines=dict(defines or {}), compiler=compiler, name=name
    )


def _refuse_unknown(mode: str) -> None:
    if mode not in toolchain.MODES:
        raise ValueError(f"[load] mode must be one of {toolchain.MODES} but got {mode!r}.")


def compile_program(
    program: Program, *, mode: str, compiler: str | None, kernels: Sequence[str] | None
) -> Library:
    """The library of a rewritten program, or of some of its kernels."""
    _refuse_unknown(mode)
    if kernels is not None:
        if missing := set(kernels) - set(program.entries):
            raise LaunchError(
                f"[load] kernels must be of {sorted(program.entries)} but got {sorted(missing)}."
            )
        program = replace(program, entries={n: program.entries[n] for n in kernels})
    text = '#include "metal.h"\n' + program.text + launch_table(program)
    key = toolchain.digest(text)
    _programs.setdefault(key, program)
    return _loaded(text, key, mode, compiler or toolchain.default_compiler())


def load(
    path_or_text: str | os.PathLike,
    *,
    include: Sequence[str | os.PathLike] = (),
    mode: str = "fast",
    defines: Mapping[str, object] | None = None,
    compiler: str | None = None,
    kernels: Sequence[str] | None = None,
) -> Library:
    """Compiles the kernels of a .metal file, or of a text with MSL, for this CPU.

    `include`: folders of headers. `mode`: 'fast' (no checks but divergence), 'checked', 'counted'. `defines`: macros.
    `compiler`: a clang++ or g++; by default $MSL_CXX, else the newest found. `kernels`: only these host names, which is quicker.
    What was built once is cached by content.
    """
    _refuse_unknown(mode)
    program = rewrite(expand(path_or_text, include=include, defines=defines, compiler=compiler))
    return compile_program(program, mode=mode, compiler=compiler, kernels=kernels)
