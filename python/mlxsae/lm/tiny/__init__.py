"""The bundled tiny language model: a language that labels its own tokens, and a transformer that has learnt it.

`folder` is an mlx-lm model folder. `texts` and `prompts` speak the language, `labelled` gives tokens with their ground
truth in the columns of `CONCEPTS`. ``python -m mlxsae.lm.tiny.train`` makes the model again and
``python -m mlxsae.lm.tiny.evaluation`` asks it what it knows. Only those two modules import mlx.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .concepts import CONCEPTS, CORE, Concept, Labelled, label, labelled
from .language import CONTEXT, FORCED, TASKS, Prompt, documents, prompts, texts

if TYPE_CHECKING:
    from .evaluation import evaluate

__all__ = [
    "CONCEPTS",
    "CONTEXT",
    "CORE",
    "FORCED",
    "TASKS",
    "Concept",
    "Labelled",
    "Prompt",
    "core_concepts",
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


def core_concepts() -> list[str]:
    """Names of the concepts that one direction in the middle of the bundled model tells, in the order of `CONCEPTS`.

    Measured on the model itself and without any sparse autoencoder: see `CORE` and the model card. The others can be
    known from the text too, and most by a probe of all directions, but no single feature can be expected to.
    """
    held = json.loads((folder() / "card.json").read_text("utf-8"))["concepts"]
    return [concept.name for concept in CONCEPTS if held[concept.name]["direction_f1"] > CORE]


def __getattr__(name: str) -> Any:
    if name == "evaluate":  # imports mlx
        from .evaluation import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
