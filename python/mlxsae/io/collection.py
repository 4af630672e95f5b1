"""SAEs by hook point, read from their folders when they are first used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from mlxsae.io import native
from mlxsae.lm import ByPoint, HookPoint, LanguageModel, ModulePoint
from mlxsae.lm.families import resolve
from mlxsae.lm.hook_point import Point
from mlxsae.sae import SAE


class SAEs(MutableMapping[Point, SAE]):
    """SAEs by hook point, in any spelling; those given as folders are read when they are first used.

    With a language model, hook points and widths are checked against it.
    """

    def __init__(
        self, saes: Mapping[Any, SAE | str | os.PathLike[str]] | None = None, lm: LanguageModel | None = None
    ) -> None:
        self._lm = lm
        self._held: ByPoint[SAE | Path] = ByPoint()
        self.add(saes or {})

    def add(self, saes: Mapping[Any, SAE | str | os.PathLike[str]]) -> None:
        """All of `saes`, which are not read for it."""
        for spec, sae in (saes._held if isinstance(saes, SAEs) else saes).items():
            self[spec] = sae  # type: ignore[assignment]

    def __getitem__(self, spec: Any) -> SAE:
        if (found := self._held.get(spec)) is None:
            there = ", ".join(map(str, self._held)) or "none"
            raise KeyError(f"[saes] there must be an SAE at {spec!s} but there is {there}.")
        if isinstance(found, SAE):
            return found
        point = next(point for point, held in self._held.items() if held is found)
        self[point] = sae = native.load(found)
        return sae

    def __setitem__(self, spec: Any, sae: SAE | str | os.PathLike[str]) -> None:
        point = self._point(spec)
        if isinstance(sae, SAE):
            _check_fit(self._lm, point, sae)
        self._held[point] = sae if isinstance(sae, SAE) else Path(sae)

    def __delitem__(self, spec: Any) -> None:
        del self._held[self._point(spec)]

    def __iter__(self) -> Iterator[Point]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def loaded(self) -> list[Point]:
        """Where the SAE is in memory."""
        return [point for point, sae in self._held.items() if isinstance(sae, SAE)]

    def _point(self, spec: Any) -> Point:
        if self._lm is not None:
            return resolve(self._lm.model, spec)
        return spec if isinstance(spec, ModulePoint) else HookPoint.parse(spec)


def load_saes(directory: str | os.PathLike[str]) -> SAEs:
    """The SAEs saved in `directory` and below, by the hook points that their files name.

    Nothing but their configurations is read: an SAE comes into memory when it is first used.

    Raises
    ------
    FileNotFoundError
        No SAE there.
    ValueError
        A damaged cfg.json, one that does not say where the SAE belongs, or two for one hook point (names the files).
    """
    root = Path(directory).expanduser()
    found: dict[str, Path] = {}
    for config in sorted(root.rglob("cfg.json")):
        folder = config.parent
        name = _read_metadata(folder).get("hook_name")
        if not isinstance(name, str):
            raise ValueError(f"[load_saes] {folder} must name its hook_name in cfg.json but does not.")
        if name in found:
            raise ValueError(f"[load_saes] {found[name]} and {folder} must not both be for {name}.")
        found[name] = folder
    if not found:
        raise FileNotFoundError(f"[load_saes] directory must hold SAEs but {str(root)!r} has no cfg.json.")
    return SAEs(found)


def _check_fit(lm: LanguageModel | None, point: Point, sae: SAE) -> None:
    if lm is not None and sae.d_in != (width := lm.shape_at(point)[-1]):
        raise ValueError(
            f"[saes] the SAE at {point} must have d_in={width}, the model's width there, but has {sae.d_in}."
        )


def _read_metadata(folder: Path) -> dict[str, Any]:
    metadata = native.read_json(folder / native.CONFIG).get("metadata")
    return metadata if isinstance(metadata, dict) else {}
