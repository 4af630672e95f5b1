"""One training step: the trainer's, composed of ops, with and without clipping and AuxK, and in plain MLX ops.

The field's libraries are measured by ``benchmarks.peers``.
"""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.conftest import Timer
from benchmarks.shapes import Shape, Weights
from benchmarks.steps import OurStep, PlainStep, TrainerStep

OPTIONS = {
    "plain": {},
    "no b_dec path": {"b_dec_path": False},
    "clipping": {"clip_norm": 1.0},
    "AuxK": {"auxk": True},
}


def group(shape: Shape) -> str:
    return f"step {tuple(shape)}"


def bench_trainer(timed: Timer, shape: Shape, start: Weights) -> None:
    timed(TrainerStep(shape, start).step, group=group(shape))


@pytest.mark.parametrize("option", OPTIONS)
def bench_ops(timed: Timer, shape: Shape, start: Weights, option: str) -> None:
    timed(partial(OurStep(shape, start).step, **OPTIONS[option]), group=group(shape))


@pytest.mark.parametrize("decode", ["dense", "gather"])
def bench_plain_mlx(timed: Timer, shape: Shape, start: Weights, decode: str) -> None:
    timed(PlainStep(shape, start, decode).step, group=group(shape))
