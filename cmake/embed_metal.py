"""Writes the Metal sources as C++: one text per library with our own headers included, as Metal's compiler wants it at run time.

usage: embed_metal.py FOLDER OUT.cpp
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"\s*$')


def flatten(path: Path, root: Path, seen: set[Path] | None = None) -> str:
    """The text of a file with what it includes in quotes, each header once; paths are relative to `root`."""
    seen = set() if seen is None else seen
    out = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip() == "#pragma once":
            line = ""
        if m := INCLUDE.match(line):
            header = (root / m[1]).resolve()
            if header not in seen:
                seen.add(header)
                out += [f'#line 1 "{m[1]}"', flatten(header, root, seen)]
            out.append(f'#line {number + 1} "{path.relative_to(root).as_posix()}"')
        else:
            out.append(line)
    return "\n".join(out)


def libraries(root: Path) -> dict[str, str]:
    return {p.stem: flatten(p, root) for p in sorted(root.resolve().glob("*.metal"))}


def literal(text: str) -> str:
    """A text as C++ string literals, each of a length that every compiler takes."""
    pieces = [text[i : i + 8000] for i in range(0, len(text), 8000)]
    return "\n".join(f'R"metal({p})metal"' for p in pieces)


def as_cpp(texts: dict[str, str]) -> str:
    rows = "\n".join(
        f"      {{{name!r}, {literal(text)}}},".replace("'", '"', 2) for name, text in texts.items()
    )
    return f"""// Generated from metal/ by cmake/embed_metal.py.
#include "metal/sources.h"

#include <map>
#include <stdexcept>

namespace mlxsae::gpu {{

std::string_view source_of(const std::string& library) {{
  static const std::map<std::string, std::string_view> sources{{
{rows}
  }};
  auto it = sources.find(library);
  if (it == sources.end()) throw std::logic_error("[metal] there is no library " + library + ".");
  return it->second;
}}

}}  // namespace mlxsae::gpu
"""


if __name__ == "__main__":
    folder, out = map(Path, sys.argv[1:])
    out.write_text(as_cpp(libraries(folder)))
