"""Puts the harness on the path (`import msl`), says which compilers its tests run with, and skips where it cannot run."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import msl
from msl import toolchain


def _obstacle() -> str | None:
    """Why nothing of this folder can run here."""
    if sys.platform != "linux":
        return "the Metal harness runs on Linux; on a Mac the GPU runs the kernels in the other tests"
    try:
        toolchain.default_compiler()
    except msl.ToolMissing as missing:
        return str(missing)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (reason := _obstacle()) is None:
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


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
    return toolchain.default_compiler()


@pytest.fixture(scope="session")
def strict_compiler() -> str:
    """The clang of the strict compile."""
    try:
        return toolchain.clang(18)
    except msl.ToolMissing as missing:
        pytest.skip(str(missing))
