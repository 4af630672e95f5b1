"""The bundled tiny language model: a language that labels its own tokens, and a transformer that has learnt it."""

from __future__ import annotations

from pathlib import Path


def folder() -> Path:
    """The mlx-lm model folder of the bundled model."""
    return Path(__file__).parent / "model"
