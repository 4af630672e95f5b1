"""The language-model side: loading, hook points, capture, splice, generation, text.

mlx-lm is imported by `load` and by generation, never by importing this package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import interventions
from .evaluation import logits_from, loss, losses_from, token_losses
from .families import FAMILIES, Family
from .generation import GeneratedToken, generate, stream_generate
from .hook_point import SITES, ByPoint, HookPoint, HookPointLike, ModulePoint
from .hooks import (
    Edit,
    Edits,
    capture,
    capture_codes,
    capture_each,
    capture_width,
    only_at,
    run_with_capture,
    splice,
)
from .language_model import LanguageModel, load
from .text import (
    Documents,
    TokenBatch,
    batches_by_length,
    in_heldout,
    read_texts,
    token_batches,
    tokenize,
    valid_rows,
    without_outliers,
)

if TYPE_CHECKING:
    from . import tiny

__all__ = [
    "FAMILIES",
    "SITES",
    "ByPoint",
    "Documents",
    "Edit",
    "Edits",
    "Family",
    "GeneratedToken",
    "HookPoint",
    "HookPointLike",
    "LanguageModel",
    "ModulePoint",
    "TokenBatch",
    "batches_by_length",
    "capture",
    "capture_codes",
    "capture_each",
    "capture_width",
    "generate",
    "in_heldout",
    "interventions",
    "load",
    "logits_from",
    "loss",
    "losses_from",
    "only_at",
    "read_texts",
    "run_with_capture",
    "splice",
    "stream_generate",
    "tiny",
    "token_batches",
    "token_losses",
    "tokenize",
    "valid_rows",
    "without_outliers",
]


def __getattr__(name: str) -> Any:
    """The bundled model and its language, imported on first use."""
    if name == "tiny":
        return importlib.import_module(".tiny", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
