"""Types of command-line values; each says what it must be."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlxsae.lm.hook_point import HookPoint
from mlxsae.loss import END_TO_END
from mlxsae.sae import RULES
from mlxsae.train.config import PRECISIONS
from mlxsae.train.optimizers import OPTIMIZERS


def whole(least: int = 1, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number but got {text!r}.") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least} but got {value}.")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most} but got {value}.")
        return value

    return parse


seed = whole(0, 2**64 - 1)  # what MLX's generator takes


def path(text: str) -> Path:
    """A file or folder. The shell leaves the ``~`` of ``--out=~/run`` as it is."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path but is empty.")
    return Path(text).expanduser()


class Several(argparse.Action):
    """All values of an option that takes one or several at a time, with spaces or commas between, and may be repeated."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, type: Callable[[str], Any], **more: Any
    ) -> None:
        super().__init__(
            option_strings,
            dest,
            nargs="+",
            type=lambda text: [type(part) for part in text.split(",")],
            **more,
        )

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        held = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*held, *itertools.chain.from_iterable(values)])


def number(*, above: float | None = None, below: float | None = None) -> Callable[[str], float]:
    """A number in the open interval (above, below)."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number but got {text!r}.") from None
        inside = (above is None or value > above) and (below is None or value < below)
        if not inside or value in (float("inf"), float("-inf")):
            bounds = [f"above {above:g}"] * (above is not None) + [f"below {below:g}"] * (below is not None)
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds)} but got {text}.")
        return value

    return parse


def component(text: str) -> str:
    try:
        HookPoint.parse(text, layer=0)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e).removeprefix("[HookPoint.parse] ")) from None
    return text


def rule(text: str) -> str:
    if text not in RULES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(sorted(RULES))} but got {text!r}.")
    return text


def optimizer(text: str) -> str:
    if text not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(sorted(OPTIMIZERS))} but got {text!r}.")
    return text


def precision(text: str) -> str:
    if text not in PRECISIONS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(PRECISIONS)} but got {text!r}.")
    return text


def end_to_end(text: str) -> str:
    name = {"ce": "cross_entropy"}.get(text, text)
    if name not in END_TO_END:
        raise argparse.ArgumentTypeError(f"must be kl or ce but got {text!r}.")
    return name
