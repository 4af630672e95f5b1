"""Translates the Metal sources to CUDA C++, so that one kernel text serves both, and writes them as C++ strings.

usage: msl_to_cuda.py FOLDER HEADER OUT.cpp COMPILER

Metal Shading Language is C++ with address spaces, attributes and a library. COMPILER -E expands the macros, csrc/cuda/msl.cuh has
the library, and this file changes what is left (docs/cuda.md has the table): address spaces, threadgroup arrays, kernels and their
instantiations. A kernel becomes a __device__ function and, for each instantiation, an `extern "C" __global__` function of its
name in Metal, whose parameters are the kernel's buffers in the order of their index. A unit is compiled for one kernel at a time:
MSL_KERNEL_<name> turns that one on, MSL_ALL_KERNELS all.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from embed_metal import libraries, literal

TOKEN = re.compile(r'\s+|"(?:\\.|[^"\\])*"|[A-Za-z_]\w*|\.?\d(?:[eEpP][+-]|[\w.])*|\[\[|::|->|[^\w\s]')
BUFFER = re.compile(r"\[\[\s*buffer\s*\(\s*(\d+)\s*\)\s*\]\]")
# What a thread knows of its place: the function of msl.cuh that says it.
PLACES = {
    "thread_position_in_grid",
    "threadgroup_position_in_grid",
    "threadgroups_per_grid",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
}
REAL = re.compile(r"^(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?$")


class Untranslatable(Exception):
    """The source uses something of Metal that this translation does not know."""


@dataclass(frozen=True)
class Parameter:
    """A kernel's parameter: `type` without address space; `index` of its buffer, or the `place` that it takes."""

    type: str
    name: str
    index: int | None = None
    place: str = ""
    value: bool = False  # a reference to constant: CUDA passes the value


@dataclass(frozen=True)
class Kernel:
    parameters: tuple[Parameter, ...]
    bound: str  # most threads of a threadgroup; empty where the source does not say


def preprocess(text: str, compiler: str) -> str:
    """Macros expanded, comments gone; Metal's own headers are msl.cuh."""
    text = re.sub(r"^\s*#include\s+<[^>]*>\s*$|^\s*using namespace metal;", "", text, flags=re.M)
    command = [compiler, "-E", "-P", "-undef", "-nostdinc", "-std=c++17", "-x", "c++", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def closing(tokens: list[str], at: int, pair: str) -> int:
    """The place of the bracket that closes the one at `at`."""
    depth = 0
    for i in range(at, len(tokens)):
        depth += (tokens[i] == pair[0]) - (tokens[i] == pair[1])
        if depth == 0:
            return i
    raise Untranslatable(f"{pair[0]} is never closed")


def split(text: str) -> list[str]:
    """At commas outside of all brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [p.strip() for p in [*parts, text[start:]] if p.strip()]


def body(text: str) -> str:
    """Address spaces, threadgroup arrays and literals of anything but kernels' heads."""
    tokens = TOKEN.findall(text)
    words = [i for i, t in enumerate(tokens) if not t.isspace()]
    before = {i: tokens[j] for j, i in pairwise(words)}
    after = {j: tokens[i] for j, i in pairwise(words)}
    out = []
    for i, t in enumerate(tokens):
        if t in ("device", "thread"):
            t = ""
        elif t == "constant":
            t = "" if after.get(i) == "constexpr" else "const"
        elif t == "threadgroup":
            statement = before.get(i, ";") in (";", "{", "}")
            declared = "".join(tokens[i : tokens.index(";", i)])
            array = "[" in declared.split("=")[0]  # else a pointer, or a parameter
            t = "__shared__" if statement and array else ""
        elif t == "METAL_FUNC":
            t = "__device__ __forceinline__"
        elif REAL.match(t) and not t.isdigit():
            t += "f"
        out.append(t)
    return "".join(out)


def parameter(text: str) -> Parameter:
    if m := BUFFER.search(text):
        declared = " ".join(body(BUFFER.sub("", text)).split())
        value = text.lstrip().startswith("constant") and "&" in declared
        m_declared = re.fullmatch(r"(.*[\s*&])(\w+)", declared)
        if not m_declared:
            raise Untranslatable(f"parameter {text!r}")
        kind = m_declared[1].strip()
        if value:
            kind = kind.replace("const ", "").replace("&", "").strip()
        return Parameter(kind, m_declared[2], int(m[1]), value=value)
    m = re.fullmatch(r"(\w+)\s+(\w+)\s*\[\[\s*(\w+)\s*\]\]", text)
    if not m or m[3] not in PLACES:
        raise Untranslatable(f"parameter {text!r}")
    return Parameter(m[1], m[2], place=m[3])


def kernels(text: str) -> tuple[str, dict[str, Kernel]]:
    """Each kernel as a __device__ function, and what its heads said."""
    found: dict[str, Kernel] = {}
    out, at = [], 0
    for m in re.finditer(r"\[\[\s*kernel\b([^\]]*)\]\]\s*void\s+(\w+)\s*\(", text):
        end = m.end() + closing(list(text[m.end() - 1 :]), 0, "()") - 1
        parameters = tuple(parameter(p) for p in split(text[m.end() : end]))
        bound = re.search(r"max_total_threads_per_threadgroup\s*\((.*)\)", m[1])
        found[m[2]] = Kernel(parameters, bound[1] if bound else "")
        declared = ", ".join(
            f"const {p.type}{'&' if p.value else ''} {p.name}" if p.value or p.place else f"{p.type} {p.name}"
            for p in parameters
        )
        out += [text[at : m.start()], f"__device__ __forceinline__ void {m[2]}_body({declared})"]
        at = end + 1
    return "".join([*out, text[at:]]), found


def entry(name: str, expression: str, kernel: Kernel) -> str:
    """The function that is launched. `expression`: the kernel, with template arguments if it has some."""
    function, _, arguments = expression.partition("<")
    buffers = sorted((p for p in kernel.parameters if p.index is not None), key=lambda p: p.index or 0)
    declared = ", ".join(
        f"MSL_VALUE({p.type}) {p.name}" if p.value else f"metal::Pointer {p.name}" for p in buffers
    )
    given = ", ".join(
        f"metal::place<{p.type}>(metal::{p.place}())" if p.place else p.name for p in kernel.parameters
    )
    bound = f"__launch_bounds__({kernel.bound}) " if kernel.bound else ""
    called = f"{function.strip()}_body" + (f"<{arguments}" if arguments else "")
    return (
        f"#if defined(MSL_ALL_KERNELS) || defined(MSL_KERNEL_{name})\n"
        f'extern "C" __global__ {bound}void {name}({declared}) {{ {called}({given}); }}\n'
        f"#endif\n"
    )


def translate(text: str) -> tuple[str, dict[str, tuple[str, Kernel]]]:
    """The CUDA text of a preprocessed library, and its kernels: name -> (expression, kernel)."""
    entries: dict[str, str] = {}

    def instantiation(m: re.Match[str]) -> str:
        entries["".join(re.findall(r'"([^"]*)"', m[1]))] = " ".join(m[2].split())
        return ""

    text = re.sub(
        r'template\s*\[\[\s*host_name\s*\(((?:\s*"[^"]*")+)\s*\)\s*\]\]\s*\[\[\s*kernel\s*\]\]\s*decltype\s*\(([^;]*?)\)\s*\w+\s*(?:<[^;]*>)?\s*;',
        instantiation,
        text,
    )
    text, found = kernels(text)
    if left := re.search(r"\[\[(?!\s*max_total).{0,60}", text):
        raise Untranslatable(f"attribute {left[0]!r}")
    instantiated = {e.partition("<")[0].strip() for e in entries.values()}
    plain = {name: name for name in found if name not in instantiated and not is_template(text, name)}
    units = {n: (e, found[e.partition("<")[0].strip()]) for n, e in {**plain, **entries}.items()}
    heads = "".join(entry(n, e, k) for n, (e, k) in units.items())
    translated = re.sub(r"\n\s*\n+", "\n", body(text))
    return f"namespace metal::kernels {{\n{translated}\n{heads}}}  // namespace metal::kernels\n", units


def is_template(text: str, name: str) -> bool:
    return re.search(rf">\s*__device__ __forceinline__ void {name}_body\(", text) is not None


def translated(root: Path, compiler: str) -> dict[str, str]:
    """The CUDA text of each library of a folder of Metal sources, without msl.cuh."""
    return {name: translate(preprocess(text, compiler))[0] for name, text in libraries(root).items()}


def as_cpp(header: str, texts: dict[str, str]) -> str:
    rows = "\n".join(f'      {{"{name}", {literal(text)}}},' for name, text in texts.items())
    return f"""// Generated from metal/ by cmake/msl_to_cuda.py.
#include "cuda/sources.h"

#include <map>
#include <stdexcept>

namespace mlxsae::gpu {{

std::string_view cuda_header() {{ return {literal(header)}; }}

const std::map<std::string, std::string_view>& cuda_sources() {{
  static const std::map<std::string, std::string_view> sources{{
{rows}
  }};
  return sources;
}}

}}  // namespace mlxsae::gpu
"""


if __name__ == "__main__":
    folder, header, out = map(Path, sys.argv[1:4])
    out.write_text(as_cpp(header.read_text(), translated(folder, sys.argv[4])))
