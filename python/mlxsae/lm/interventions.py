"""Edits by name, for `splice`, `generate` and `InterpretableModel.trace`.

An edit is a function from an activation [b, t, d] to the one that takes its place; `zero` is one itself, the
others here make one. `at` confines any edit to some tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .hooks import Edit, of_tokens
from .text import valid_rows

Positions = str | Sequence[int]


def zero(x: mx.array) -> mx.array:
    """Zeros: zero ablation. Use it as it is, `{"layers.3.mlp": zero}`."""
    return mx.zeros_like(x)


def scale(factor: float | mx.array) -> Edit:
    """`factor * x`."""
    return lambda x: x * factor


def add(vector: mx.array, strength: float = 1.0) -> Edit:
    """`x + strength * vector`, for `vector` [d], [t, d] or [b, t, d]."""
    vector = mx.array(vector)  # of NumPy too
    return lambda x: x + _like(strength * vector, x, "add")


def clamp(low: float | mx.array | None = None, high: float | mx.array | None = None) -> Edit:
    """Each value into [low, high]; either end may be open."""
    if low is None and high is None:
        raise ValueError("[clamp] low or high must be given but neither is.")
    return lambda x: mx.clip(x, low, high)


def replace_with(value: mx.array | float) -> Edit:
    """`value` in place of the activation: a number, [d], [t, d] or [b, t, d]. Activation patching."""
    return lambda x: _like(value, x, "replace_with")


def mean(activations: mx.array, valid: mx.array | None = None) -> Edit:
    """Mean ablation: the mean of `activations` [..., d] over all axes but the last.

    With `valid`, bool [...], over valid tokens only.
    """
    activations = mx.array(activations)
    rows = activations.reshape(-1, activations.shape[-1]) if valid is None else valid_rows(activations, valid)
    if rows.shape[0] == 0:
        raise ValueError("[mean] activations must hold at least one valid token but hold none.")
    rows = rows.astype(mx.float32)
    about = rows.mean(
        axis=0
    )  # float32 loses digits over many rows; what is left of them about it has few to lose
    return replace_with(mx.where(mx.isfinite(about), about + (rows - about).mean(axis=0), about))


def resample(activations: mx.array, *, seed: int = 0) -> Edit:
    """Resample ablation: what the model computed elsewhere takes the activation's place.

    Parameters
    ----------
    activations : [n, d] or [m, t', d]
        Of [n, d], every token gets a row drawn at random. Of [m, t', d], every row of the batch gets one of the m
        sequences, token for token: the activation may then be no longer than t' tokens. Tokens are counted from
        the first one of each pass, so in generation, whose passes are a token long, give [n, d].
    seed : int
        Of the draws. Each call draws anew; another `resample` with the same seed draws the same.
    """
    if activations.ndim not in (2, 3):
        raise ValueError(
            f"[resample] activations must be [n, d] or [m, t, d] but have shape {activations.shape}."
        )
    key = mx.random.key(seed)

    def edit(x: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        b, t = x.shape[:2]
        if activations.ndim == 2:
            drawn = activations[mx.random.randint(0, activations.shape[0], (b, t), key=now)]
        elif t > activations.shape[1]:
            raise ValueError(
                f"[resample] the activation must have at most {activations.shape[1]} tokens, as the sequences "
                f"to draw from, but has {t}."
            )
        else:
            drawn = activations[mx.random.randint(0, activations.shape[0], (b,), key=now), :t]
        return _like(drawn, x, "resample")

    return edit


def at(edit: Edit, positions: Positions) -> Positioned:
    """`edit` at some tokens, the activation itself elsewhere.

    Parameters
    ----------
    positions : "all", "prompt", "generated" or list of int
        Tokens are counted from 0, BOS included; negative ones from the end of the prompt, each row's own where
        rows are padded. "generated" are those that the model wrote itself.

    It counts the tokens of a sequence that arrives in chunks, as under a KV cache, when it is used by
    `InterpretableModel` and `generate`; under a bare `splice` it counts those of each forward pass.
    """
    return Positioned(edit, positions)


@dataclass(frozen=True)
class Positioned:
    """An edit and the tokens it is for; made by `at`."""

    edit: Edit
    positions: Positions

    def __post_init__(self) -> None:
        check_positions(self.positions)

    def __call__(self, x: mx.array) -> mx.array:
        return place(self, [x.shape[-2]] * x.shape[0])(x)


def place(edit: Edit, lengths: Sequence[int], positions: Positions = "all") -> Edit:
    """`edit` at its own positions, or else at `positions`, of rows that arrive in chunks [b, t, d].

    `lengths` are those of each row's prompt.
    """
    if isinstance(edit, Positioned):
        edit, positions = edit.edit, edit.positions
    if positions == "all" or not callable(edit):  # what is no edit is refused where hooks are made
        return edit
    chosen = [_chosen(positions, length) for length in lengths]
    seen = 0

    def fn(x: mx.array) -> mx.array:
        nonlocal seen
        t = x.shape[-2]
        here = np.array([[is_chosen(seen + i) for i in range(t)] for is_chosen in chosen])
        seen += t
        if not here.any():
            return x
        if here.all():
            return edit(x)
        return mx.where(of_tokens(mx.array(here), x), edit(x).astype(x.dtype), x)

    return fn


def check_positions(positions: Positions, length: int | None = None) -> None:
    """Refuse what names no tokens, or none of a prompt of `length`."""
    if isinstance(positions, str):
        if positions not in ("all", "prompt", "generated"):
            raise ValueError(
                f"[positions] must be 'all', 'prompt', 'generated' or a list of int but got {positions!r}."
            )
    elif not isinstance(positions, Sequence):  # an iterator would be used up by the first look at it
        raise ValueError(
            "[positions] must be 'all', 'prompt', 'generated' or a list of int but got "
            f"{type(positions).__name__}."
        )
    elif any(isinstance(p, bool) or not isinstance(p, int) for p in positions):
        raise ValueError(f"[positions] must be ints but got {list(positions)!r}.")
    elif length is not None and min(positions, default=0) < -length:
        raise ValueError(
            f"[positions] must be ints >= {-length} (the prompt has {length} tokens) but got {min(positions)}."
        )


def _chosen(positions: Positions, length: int) -> Callable[[int], bool]:
    """Whether the token at a position is to be edited, in a row whose prompt has `length` tokens."""
    check_positions(positions, length)
    match positions:
        case "all":
            return lambda position: True
        case "prompt":
            return lambda position: position < length
        case "generated":
            return lambda position: position >= length
    wanted = {p if p >= 0 else length + p for p in positions}  # type: ignore[operator]
    return lambda position: position in wanted


def _like(value: mx.array | float, x: mx.array, name: str) -> mx.array:
    value = value.astype(x.dtype) if isinstance(value, mx.array) else mx.array(value, x.dtype)
    try:
        return mx.broadcast_to(value, x.shape)
    except ValueError as error:
        raise ValueError(
            f"[{name}] the value must broadcast to the activation's shape {x.shape} but has shape {value.shape}."
        ) from error
