"""Strict compile: MSL's rules for address spaces, by clang's OpenCL C++ with its generic address space switched off."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from . import toolchain
from .frontend import rewrite
from .library import expand
from .tokens import Tokens, spell

_VECTORS = frozenset(
    f"{t}{n}"
    for t in (
        "bool",
        "char",
        "uchar",
        "short",
        "ushort",
        "int",
        "uint",
        "long",
        "ulong",
        "half",
        "bfloat",
        "float",
    )
    for n in (2, 3, 4)
)
_MATRICES = frozenset({"simdgroup_matrix", "simdgroup_float8x8", "simdgroup_half8x8", "simdgroup_bfloat8x8"})
_FLAGS = [
    *(
        "-x",
        "cl",
        "-cl-std=clc++2021",
        "-target",
        "x86_64-linux-gnu",
        "-cl-no-stdinc",
        "-cl-single-precision-constant",
    ),
    *("-fsyntax-only", "-Wno-everything", "-ferror-limit=50", "-Xclang", "-cl-ext=+cl_khr_fp16"),
    *(
        "-Xclang",
        "-cl-ext=+__cl_clang_function_pointers",
        "-Xclang",
        "-cl-ext=-__opencl_c_generic_address_space",
    ),
    *("-Xclang", "-cl-ext=-__opencl_c_pipes", "-Xclang", "-cl-ext=-__opencl_c_device_enqueue"),
    *("-Xclang", "-cl-ext=-cl_khr_fp64", "-Xclang", "-cl-ext=-__opencl_c_fp64"),
]


def _spell_constructors(text: str) -> str:
    """`float4(a, b)` and `vec<T, 4>(a, b)`, also by an alias, become calls: clang has no such constructors."""
    t = Tokens(text)
    names = set(_VECTORS)
    for i in range(len(t) - 3):
        if t[i].text == "using" and t.text(i + 2) == "=":
            end = i + 3
            while t.text(end) not in (";", ""):
                end += 1
            value = t.list[i + 3 : end]
            if value and (
                spell(value) in _VECTORS
                or [x.text for x in value if x.text != "metal" and x.text != "::"][:1] == ["vec"]
            ):
                names.add(t[i + 1].text)
    for i in range(len(t)):
        if t[i].text == "simd_vote" and t.text(i + 1) == "::" and t.text(i + 2) == "vote_t":
            t[i].text, t[i + 1].text, t[i + 2].text = "ulong", "", ""
        name, end = t[i].text, i + 1
        maker = "make_matrix" if name in _MATRICES else "make" if name == "vec" or name in names else ""
        maker = "make_packed" if name.startswith("packed_") and name[7:] in _VECTORS else maker
        if not maker or t.text(i - 1) in (".", "->", "operator", "using", "struct", "&"):
            continue
        if name in ("vec", "simdgroup_matrix"):
            if t.text(end) != "<":
                continue
            end = t.after_angles(end)
        if t.text(end) != "(":
            continue
        if t.text(i - 1) == "::":
            t[i - 1].text = t[i - 2].text = ""
        t[i].text = f"metal::{maker}<{name}"
        t[end].text = ">("
    return t.render()


def strict(
    path_or_text: str | os.PathLike,
    *,
    include: Sequence[str | os.PathLike] = (),
    defines: Mapping[str, object] | None = None,
) -> None:
    """Compiles every kernel with MSL's address-space and type rules; CompileError holds what clang refuses.

    Refused: pointers and references without an address space, mixed or cast-away ones, writes to constant memory, atomics on
    plain types, implicit vector conversions, simd operations on types that Metal has none for, double, new, throw, VLAs.
    Needs clang 18 or newer: ToolMissing otherwise. Limit: a struct from device or constant memory cannot be copied whole.
    """
    compiler = toolchain.clang(18)
    program = rewrite(expand(path_or_text, include=include, defines=defines, compiler=compiler), "strict")
    instances = "".join(
        f"void msl_instance_{k}() {{ auto f = &{expression}; (void)f; }}\n"
        for k, expression in enumerate(program.entries.values())
    )
    text = '#include "strict.h"\n' + _spell_constructors(program.text) + "\n" + instances
    toolchain.run([compiler, *_FLAGS, f"-I{toolchain.RUNTIME}", "-"], text)
