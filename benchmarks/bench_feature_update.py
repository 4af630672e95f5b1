"""The backward-and-update pass alone, against the bandwidth of an in-place walk over weights and moments.

Zen 3, S1: without entries the walk runs at 0.88 of the probe's bandwidth (25 ms); the 32 thousand gathered rows of x and of the
residual take the other 14 ms. Fetching the next rows past the caches (prefetchnta) made no difference in three turns. Nor do the
gathers leave memory idle: fetching the next feature's rows during them and not during Adam took 1.02 to 1.16 times as long (A/B by
turns in one process), and features in the order of their first token, whose rows are then at hand, 1.32 times (S2: 1.14): the walk
lives on rows that follow each other.

Zen 4, S1: the walk without entries runs at 0.94 to 0.96 of the probe's bandwidth (16 ms). Up to four entries of a feature gathered in one pass
over its gradients, projection by the products that are known by then, squares in the same pass: 0.80 of the walk's processor time (profile,
by turns). Of no use: fetching for writing (1.1), past the caches (1.07), the first lines of a row only (1.2) or every other one (1.13),
all rows while Adam runs (1.0), to the third level (0.97, but what that means differs by maker).
"""

from __future__ import annotations

import pytest

from benchmarks.conftest import Timer
from benchmarks.machine import BandwidthProbe
from benchmarks.shapes import Shape, Weights
from benchmarks.steps import OurStep


@pytest.mark.parametrize(
    "options",
    [{"b_dec_path": True}, {"b_dec_path": False}, {"clip_norm": 1.0}],
    ids=["b_dec path", "no b_dec path", "clipping"],
)
def bench_feature_update(
    timed: Timer, shape: Shape, start: Weights, probe: BandwidthProbe, options: dict[str, float]
) -> None:
    """The forward pass runs in the timed call too; its own clock takes the update out of it."""
    step = OurStep(shape, start)
    seconds: list[float] = []
    timed(
        lambda x: seconds.append(step.update_seconds(x, **options)),
        group=f"step with feature_update {tuple(shape)}",
    )
    median = sorted(seconds)[len(seconds) // 2]
    roof = max(probe.bytes_per_second() for _ in range(3))
    timed.note(
        update_ms=1e3 * median,
        probe_gigabytes_per_second=roof / 1e9,
        share_of_bandwidth=48 * shape.d_sae * shape.d_in / median / roof,
    )
