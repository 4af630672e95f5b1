"""Checkpoints: one folder a step, complete or absent.

``step_00001000/state.safetensors`` holds every array, ``state.json`` the rest: together all that ``fit``
needs to go on with the same bits.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxsae.io import arrays as array_files
from mlxsae.io import atomic

FORMAT_VERSION = 1
_NAME = re.compile(r"step_(\d{8,})")


def save(directory: Path, step: int, host: dict[str, Any], arrays: dict[str, mx.array], *, keep: int) -> Path:
    """Write the checkpoint of ``step``, then drop all but the newest ``keep``."""
    path = directory / f"step_{step:08d}"
    with atomic.new_directory(path) as temporary:
        atomic.write_files(
            temporary,
            {
                "state.safetensors": array_files.writer(arrays),
                # A metric of somebody's loss may be NaN without harm to the run.
                "state.json": atomic.json_writer({"format_version": FORMAT_VERSION} | host, finite=False),
            },
        )
    # A folder that was killed while it was written never got its name.
    for old in [
        *checkpoints(directory)[:-keep],
        *directory.glob(".step_*.tmp"),
        *directory.glob(".step_*.old"),
    ]:
        shutil.rmtree(old)
    return path


def load(path: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    try:
        host = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"[resume] {path / 'state.json'} must be JSON but is damaged ({error}).") from error
    if host.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"[resume] {path} must have format_version {FORMAT_VERSION} but has {host.get('format_version')}."
        )
    return host, array_files.read(path / "state.safetensors")


def checkpoints(directory: str | os.PathLike) -> list[Path]:
    """Complete checkpoints in ``directory``, oldest first: a folder takes its name when it is complete."""
    directory = Path(directory)
    found = [] if not directory.is_dir() else [p for p in directory.iterdir() if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(_NAME.fullmatch(p.name)[1]))  # type: ignore[index]
