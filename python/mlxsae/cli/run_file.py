"""``run.json``: everything needed to repeat a run, written before any other work and completed at its end."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlxsae
from mlxsae import ops
from mlxsae.io import atomic

NAME = "run.json"
FORMAT_VERSION = 1


def versions() -> dict[str, str]:
    """Of this package and of all that its numbers depend on."""
    found = {"mlxsae": mlxsae.__version__, "mlx": importlib.metadata.version("mlx")}
    for package in ("mlx-lm", "numpy", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"python": platform.python_version()}


def device() -> dict[str, Any]:
    """Where MLX computes, and how wide."""
    default = mx.default_device()
    name = platform.processor() or platform.machine()
    if default.type != mx.DeviceType.cpu:
        info = mx.device_info() if hasattr(mx, "device_info") else {}
        name = str(info.get("device_name", name))
    return {
        "mlx": str(default),
        "name": name,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "threads": ops.num_threads(),
    }


def fingerprint(path_or_name: str) -> dict[str, Any]:
    """What a path names at this moment: a file's size and SHA-256, a model folder's config hash and weight sizes.
    A name of the hub, or what does not exist, is only named."""
    path = Path(path_or_name or os.devnull).expanduser()  # Path("") would be the working directory
    found: dict[str, Any] = {"name": path_or_name}
    if path.is_file():
        found |= {"path": str(path.resolve()), "bytes": path.stat().st_size, "sha256": _sha256(path)}
    elif path.is_dir():
        found["path"] = str(path.resolve())
        if (path / "config.json").is_file():
            found["config_sha256"] = _sha256(path / "config.json")
        sizes = {f.name: f.stat().st_size for f in sorted(path.iterdir()) if f.is_file()}
        found["bytes"] = sum(sizes.values())
    return found


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RunFile:
    """The file of one run. Every update is atomic; a crash at any moment leaves a readable file."""

    def __init__(self, directory: Path, command: str, argv: list[str], **content: Any) -> None:
        self._directory = directory
        self._clock = time.perf_counter()
        self.content: dict[str, Any] = {
            "format": "mlxsae-run",
            "format_version": FORMAT_VERSION,
            "command": command,
            "argv": argv,
            "working_directory": str(Path.cwd()),
            "started": _now(),
            "status": "running",
            "versions": versions(),
            "device": device(),
            **content,
        }
        self._write()

    def place(self, name: str) -> str:
        """Where the thing of that name lies: its full path if it was one on this machine, else what it was called."""
        named = self.content[name]
        return named.get("path") or named["name"]

    def update(self, **content: Any) -> None:
        self.content |= content
        self._write()

    def finish(self, status: str, **content: Any) -> None:
        """``done``, ``interrupted`` or ``failed``, with the results."""
        seconds = round(time.perf_counter() - self._clock, 3)
        self.update(status=status, finished=_now(), seconds=seconds, **content)

    def _write(self) -> None:
        atomic.write_files(self._directory, {NAME: atomic.json_writer(finite(self.content))})


@contextlib.contextmanager
def writable(command: str, out: Path) -> Iterator[None]:
    """Say of what the system refuses in here that ``--out`` is at fault."""
    try:
        yield
    except OSError as e:
        raise OSError(
            f"[{command}] --out must be a folder that can be written but {out} gives: {e.strerror or e}."
        ) from e


@contextlib.contextmanager
def alone(command: str, out: Path) -> Iterator[None]:
    """Hold ``out``, which is made if absent, against other runs: two would write over each other's results."""
    with writable(command, out):
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"[{command}] {out} must have one run at a time but another one is at work."
            ) from None
        yield
    finally:
        os.close(lock)


def finite(value: Any) -> Any:
    """``value`` with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(directory: Path) -> dict[str, Any]:
    """The run that made ``directory``; empty where there is none.

    Raises
    ------
    ValueError
        A damaged file, or one of another make.
    """
    path = directory / NAME
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"[run] {path} must be JSON but is damaged: {e}.") from e
    if not isinstance(content, dict) or content.get("format") != "mlxsae-run":
        raise ValueError(f"[run] {path} must be written by mlxsae but is not.")
    wanted: dict[str, type] = {"command": str, "status": str, "options": dict}
    wanted |= {"results": dict} if content.get("status") == "done" else {}
    wanted |= {"model": dict, "dataset": dict} if content.get("command") == "train" else {}
    for key, kind in (
        wanted | {key: dict for key in ("model", "dataset", "activations", "config") if key in content}
    ).items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"[run] {path} must be whole but its {key} is {content.get(key)!r}.")
    for key in ("model", "dataset", "activations"):
        if key in content and not isinstance(content[key].get("name"), str):
            raise ValueError(f"[run] {path} must be whole but its {key} is {content[key]!r}.")
    return content


def unchanged(run: dict[str, Any], *names: str) -> None:
    """Raise ``ValueError`` if a file, or a model's config, is not what it was when ``run`` began."""
    for name in names:
        old = run[name]
        now = fingerprint(old.get("path", old["name"]))
        for key in ("sha256", "config_sha256"):
            if now.get(key) != old.get(key):
                raise ValueError(
                    f"[resume] --{name} must be as when the run began but {old.get('path', old['name'])} is gone or has "
                    "changed."
                )


def same(named: dict[str, Any], path_or_name: str) -> bool:
    """Whether a path now names what a fingerprint is of: a file by what it holds, a folder by where it lies, else by name."""
    now = fingerprint(path_or_name)
    key = next(key for key in ("sha256", "path", "name") if key in named or key in now)
    return named.get(key) == now.get(key)


def place(named: dict[str, Any] | None) -> str | None:
    """Where a fingerprint's thing lies: its full path while that exists, else its name."""
    if not named:
        return None
    path = named.get("path")
    return path if path and Path(path).exists() else named.get("name")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
