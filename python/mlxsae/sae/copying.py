"""Copies of modules."""

from __future__ import annotations

import copy
from typing import TypeVar

import mlx.nn as nn

M = TypeVar("M", bound=nn.Module)


def copied(module: M) -> M:
    """A deep copy, which shares the functions that the module holds: those that MLX has compiled (``nn.relu``,
    ``nn.gelu``) cannot be copied.
    """
    memo = {
        id(f): f
        for part in module.modules()
        for f in vars(part).values()
        if callable(f) and not isinstance(f, nn.Module)
    }
    return copy.deepcopy(module, memo)
