"""Learning-rate schedules: pure functions of the step, computed on the host and passed to the step as a
scalar.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]
"""From the step, counted from 0, to a factor on the base rate."""


def warmup_decay(total_steps: int, *, warmup: float, decay: float, shape: str = "linear") -> Schedule:
    """Linear warm-up, plateau, decay towards 0; ``warmup`` and ``decay`` are fractions of ``total_steps``, or steps
    where over 1. ``shape`` is ``linear``, ``cosine`` or ``constant``, which leaves the decay out. A decay takes at most all
    that follows the warm-up.

    The first step has rate ``1 / warmup_steps``, never 0; the last has the smallest positive rate of its
    slope, and the step after it would have 0.
    """
    rising = in_steps(warmup, total_steps)
    falling = 0 if shape == "constant" else in_steps(decay, total_steps)
    if max(warmup, decay) > 1:  # of fractions it is checked
        falling = min(falling, max(total_steps - rising, 0))

    def factor(step: int) -> float:
        up = min(1.0, (step + 1) / rising) if rising else 1.0
        left = max(0.0, min(1.0, (total_steps - step) / falling)) if falling else 1.0
        return up * (0.5 * (1 - math.cos(math.pi * left)) if shape == "cosine" else left)

    return factor


def in_steps(span: float, total_steps: int) -> int:
    """A span of a run in steps: fractions of it are at most 1, anything over 1 is steps already."""
    return round(span * total_steps if span <= 1 else span)
