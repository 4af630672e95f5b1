"""Puts the harness on the path (`import msl`) and says which compilers its tests run with."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import msl
from msl import toolchain


def _compiler(name: str) -> str:
    if name == "clang":
        try:
            return toolchain.clang()
        except msl.ToolMissing as missing:
            pytest.skip(str(missing))
    if not shutil.which("g++") or toolchain.is_clang("g++"):
        pytest.skip("there is no g++ on the path")
    return "g++"


@pytest.fixture(scope="session", params=["clang", "g++"])
def compiler(request: pytest.FixtureRequest) -> str:
    """Each compiler that the harness works with."""
    return _compiler(request.param)


@pytest.fixture(scope="session")
def any_compiler() -> str:
    """The compiler that `msl.load` takes by default."""
    try:
        return toolchain.default_compiler()
    except msl.ToolMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def strict_compiler() -> str:
    """The clang of the strict compile."""
    try:
        return toolchain.clang(18)
    except msl.ToolMissing as missing:
        pytest.skip(str(missing))
