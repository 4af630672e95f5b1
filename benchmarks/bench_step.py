"""One training step: the trainer's, composed of ops, with and without clipping and AuxK, and in plain MLX ops.

The field's libraries are measured by ``benchmarks.peers``.

What AuxK adds is four dense products over the dead set (five where the encoder is certified), at 435 to 456 of the encode
tile's 490 GFLOP/s, and little else. Tried on these and of no effect (within 1 %, S1 and S2): groups of 120 rows that stay
in the second-level cache while panel after panel passes, instead of 240; the rows of the next tile fetched to the second
level only. Selecting among the dead in float32 costs 3 ms of 74 at S1: lists by whole vectors could save one of them.
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
