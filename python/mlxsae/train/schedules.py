"""Learning-rate schedules: pure functions of the step, computed on the host and passed to the step as a
scalar.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]
"""From the step, counted from 0, to a factor on the base rate."""


def warmup_decay(total_steps: int, *, warmup: float, decay: float, shape: str = "linear") -> Schedule:
    """Linear warm-up, plateau, decay towards 0; ``warmup`` and ``decay`` are fractions of ``total_steps``.

    The first step has rate ``1 / warmup_steps``, never 0; the last has the smallest positive rate of its
    slope, and the step after it would have 0.
    """
    rising, falling = round(warmup * total_steps), round(decay * total_steps)

    def factor(step: int) -> float:
        up = min(1.0, (step + 1) / rising) if rising else 1.0
        left = max(0.0, min(1.0, (total_steps - step) / falling)) if falling else 1.0
        return up * (left if shape == "linear" else 0.5 * (1 - math.cos(math.pi * left)))

    return factor
