"""The rooms of the house: imports point down the list only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "python" / "mlxsae"

# From the top; a room may import rooms of lower lines, and of its own line those to its left. In a set: never each other.
LINES = [
    ["cli"],
    ["report", "bench"],
    ["model"],
    ["circuits"],
    ["analysis"],
    ["loss", "train"],
    ["metrics"],
    ["io", "data"],
    [{"sae", "lm"}],
    ["ops"],
    ["code"],
    ["blas"],
    ["_ext", "_load"],
]
# Always: the package's own names are its front door, and no room goes through it.
FRONT = {"__init__", "__main__"}


def rank() -> dict[str, tuple[int, int]]:
    places = {}
    for line, rooms in enumerate(LINES):
        for column, room in enumerate(rooms):
            for name in room if isinstance(room, set) else {room}:
                places[name] = (line, column)
    return places


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path):
    """(line, room) of every import of another room, those inside functions included."""
    package = ["mlxsae", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{a.name}" for a in node.names] if module == "mlxsae" else [module]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "mlxsae" and len(parts) > 1:
                yield node.lineno, parts[1]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own, places = room_of(path), rank()
    if own in FRONT:
        return
    assert own in places, f"{own} has no place in the house"
    for line, room in imported_rooms(path):
        if room == own:
            continue
        assert room in places, f"{path.name}:{line} imports mlxsae.{room}, which is no room"
        (a, column), (b, other) = places[own], places[room]
        assert b > a or (b == a and other < column), f"{path.name}:{line}: {own} must not import {room}"


def test_only_ops_imports_the_compiled_module():
    users = {room_of(p) for p in PACKAGE.rglob("*.py") for _, room in imported_rooms(p) if room == "_ext"}
    assert users <= {"ops", "_load", "__init__"}
