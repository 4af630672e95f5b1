"""The sources of metal/ as they are embedded in the library for a Mac."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import run_plan
from msl.frontend import rewrite
from msl.library import expand
from msl.tokens import Tokens

ROOT = Path(__file__).resolve().parents[2]

EMBED = runpy.run_path(str(ROOT / "cmake/embed_metal.py"))


def entries(path_or_text: Path | str) -> list[str]:
    """The names of a library's kernels."""
    return list(rewrite(expand(path_or_text, include=[run_plan.METAL])).entries)


def code(path_or_text: Path | str, include: list[Path]) -> list[str]:
    return [t.text for t in Tokens(expand(path_or_text, include=include)).list]


def test_embedded_sources_are_the_files() -> None:
    texts = EMBED["libraries"](run_plan.METAL)
    assert set(texts) == {p.stem for p in run_plan.METAL.glob("*.metal")}
    for name, text in texts.items():
        assert '#include "' not in text
        assert "#pragma once" not in text
        assert code(text, []) == code(run_plan.METAL / f"{name}.metal", [run_plan.METAL])


def test_no_two_kernels_share_a_name() -> None:
    """All of them are in one metallib."""
    names = [k for p in run_plan.METAL.glob("*.metal") for k in entries(p)]
    assert len(names) == len(set(names))
    assert len(names) > 50


def test_embedded_sources_compile(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or pytest.skip("there is no C++ compiler")
    source = tmp_path / "sources.cpp"
    source.write_text(EMBED["as_cpp"]({"a": 'x "quoted" \\ \n' * 2000, "b_c": "y"}))
    program = tmp_path / "main.cpp"
    program.write_text(
        '#include "metal/sources.h"\n#include <iostream>\nint main() { std::cout << mlxsae::gpu::source_of("a"); }\n'
    )
    binary = tmp_path / "main"
    subprocess.run([compiler, "-std=c++20", f"-I{ROOT / 'csrc'}", source, program, "-o", binary], check=True)
    assert (
        subprocess.run([binary], capture_output=True, text=True, check=True).stdout
        == 'x "quoted" \\ \n' * 2000
    )
