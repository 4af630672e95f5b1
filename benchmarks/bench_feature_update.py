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

Zen 5, S1: two threads walk in place at 66 GB/s or at 130, for seconds each, while one alone always has 66: the probe's roof is whichever it met.
At 66 the walk without entries runs at 0.97 of it (12 ms), with entries at 0.76 (13.4 to 16 ms), whether their rows come from the second level or
the third. Of no use: no fetching of the next feature (1.25), to the first level, a quarter of a row or two rows ahead (0.98 to 1.03), its first moments during the
gathers (1.0), rows of entries fetched six entries ahead, across features (1.02).

Adam's variants (Zen 5, update and catching up together, by turns in one process, ratios to dense; the share of features that a batch
touches): at S1 lazy 1.07 (86 %), 1.00 (46 %), 0.90 (25 %), row-sparse 0.94, 0.74, 0.50; with 65,536 features and k = 8 lazy 0.78
(12 %), 0.73 (6 %), 0.67 (2 %), row-sparse 0.26, 0.19, 0.12. A touched row of the decoder comes from memory twice under lazy Adam, to catch
up before it is decoded and to be updated, and a step that a row has missed takes 0.09 us in place of the 0.37 us of the dense walk: it
pays where batches touch few features.
"""

from __future__ import annotations

import mlx.core as mx
import pytest

from benchmarks.bench_sparse_ops import USAGE, code_of
from benchmarks.conftest import Timer
from benchmarks.machine import BandwidthProbe
from benchmarks.shapes import Shape, Weights
from benchmarks.steps import OurStep
from mlxsae import ops


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


@pytest.mark.parametrize("usage", USAGE)
@pytest.mark.parametrize("variant", ["dense", "lazy", "row_sparse"])
def bench_adam_variants(timed: Timer, shape: Shape, start: Weights, variant: str, usage: str) -> None:
    """The update, and under lazy Adam the catching up before it; 64 steps untimed, so that every row has its turn."""
    code = code_of(usage, shape, mx.array(start.w_enc))
    params = ops.Params(*map(mx.array, start))
    state = [params, *(ops.Params(*map(mx.zeros_like, params)) for _ in range(2))]
    features, last_step = mx.arange(shape.d_sae), mx.zeros(shape.d_sae, mx.int32)
    touched = ops.update_tokens_since_fired(mx.ones(shape.d_sae, mx.int32), code) == 0
    held = [state, last_step, 0]
    del params, state, last_step
    mx.eval(held, code, features, touched)
    untouched = {"dense": "step", "lazy": "keep_decoder", "row_sparse": "keep"}[variant]

    def step(x: mx.array) -> None:
        (params, m, v), last_step, done = held
        held[:] = [None] * 3
        if variant == "lazy" and done:
            due = touched | (features % 64 == done % 64)
            out = ops.adam_catch_up(
                params.w_dec, m.w_dec, v.w_dec, last_step, due, step=done, lr=[1e-3] * min(done, 64)
            )
            params, m, v = (p._replace(w_dec=None) for p in (params, m, v))
            mx.eval(out)
            params, m, v = (p._replace(w_dec=a) for p, a in zip((params, m, v), out[:3], strict=True))
            last_step = out.last_step
            del out
        term = ops.Term(x, code, mx.array(2 / shape.n))
        new = ops.feature_update(
            x, [term], params, m, v, loss=mx.array(1.0), lr=1e-3, step=done + 1, untouched=untouched
        )
        del params, m, v
        last_step = mx.where(touched, done + 1, last_step)
        mx.eval(new, last_step)
        held[:] = [new[:3], last_step, done + 1]

    x = mx.random.normal((shape.n, shape.d_in), key=mx.random.key(0))
    for _ in range(64):
        step(x)
    timed(step, group=f"Adam variants, {usage} {tuple(shape)}")
    timed.note(touched=touched.astype(mx.float32).mean().item())
