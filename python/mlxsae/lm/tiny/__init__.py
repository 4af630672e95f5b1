"""The bundled tiny language model: a language that labels its own tokens, and a transformer that has learnt it.

`folder` is an mlx-lm model folder. `texts` and `prompts` speak the language, `labelled` gives tokens with their ground
truth in the columns of `CONCEPTS`. ``python -m mlxsae.lm.tiny.train`` makes the model again and
``python -m mlxsae.lm.tiny.evaluation`` asks it what it knows. Only those two modules import mlx.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .concepts import CONCEPTS, Concept, Labelled, label, labelled
from .language import CONTEXT, FORCED, TASKS, Prompt, documents, prompts, texts

__all__ = [
    "CONCEPTS",
    "CONTEXT",
    "FORCED",
    "TASKS",
    "Concept",
    "Labelled",
    "Prompt",
    "documents",
    "evaluate",
    "folder",
    "label",
    "labelled",
    "prompts",
    "texts",
]


def folder() -> Path:
    """The mlx-lm model folder of the bundled model."""
    return Path(__file__).parent / "model"


def __getattr__(name: str) -> Any:
    if name == "evaluate":  # imports mlx
        from .evaluation import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
