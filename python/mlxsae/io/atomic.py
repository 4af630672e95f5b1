"""Writes that either happen whole or leave the earlier file as it was."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

Writer = Callable[[BinaryIO], None]


def write_files(directory: str | os.PathLike, writers: Mapping[str, Writer]) -> None:
    """Write ``{name: writer}`` into ``directory`` (made if absent), each through a synced temporary file.

    All temporary files are complete on disk before the first one takes its name, so a full disk or an
    exception in a writer changes nothing.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary: dict[Path, Path] = {}
    try:
        with contextlib.ExitStack() as files:
            opened = []
            for name, writer in writers.items():
                path = temporary[directory / name] = directory / f".{name}.{_writer()}.tmp"
                opened.append(files.enter_context(open(path, "wb")))
                writer(opened[-1])
            for file in opened:  # only now: a disk's journal takes them all at once
                file.flush()
                os.fsync(file.fileno())
        for target, path in temporary.items():
            os.replace(path, target)
        sync_directory(directory)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(target: str | os.PathLike) -> Iterator[Path]:
    """A folder that appears as ``target``, with all that the block wrote, or not at all. An earlier
    ``target`` is replaced.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{_writer()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        sync_directory(temporary)
        if target.exists():
            old = target.parent / f".{target.name}.{_writer()}.old"
            os.rename(target, old)
            os.rename(temporary, target)
            shutil.rmtree(old)
        else:
            os.rename(temporary, target)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _writer() -> str:
    """Process and thread: it keeps two writers of one folder from sharing a temporary file."""
    return f"{os.getpid()}.{threading.get_ident()}"


def json_writer(value: Any, *, finite: bool = True) -> Writer:
    """Writer of ``value`` as indented UTF-8 JSON. NaN and infinity, which it lacks, raise ``ValueError``, or are written as
    Python reads them where ``finite`` is not asked for.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=not finite) + "\n"
    return lambda file: void(file.write(text.encode()))


def void(_: Any) -> None:
    """Drop a value where a callback must return None."""


def sync_directory(directory: Path) -> None:
    """Make renames in ``directory`` durable (a no-op where folders cannot be opened)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
