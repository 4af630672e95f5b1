"""Decode, residual, gathered products and the transposed decode: against plain MLX, dense and gathered.

Codes are random, Zipf-distributed (hot features make long buckets) or from the encoder; no floor is below the bytes of the
rows that are read: ``bytes_per_second`` over the probe's tells how far a kernel is from memory.

Kernels that convert types by row take the time of those that had a copy for every triple of types (Zen 3, S1, three turns, old and new,
ms): decode 10.1, 11.3, 10.6 and 8.6, 10.7, 12.2; gather_dot 13.7, 14.1, 13.9 and 13.1, 15.9, 14.3; outer 26.0, 16.8, 17.3 and 15.9,
28.7, 17.1.

Zen 4, S1, turns in one process each: rows fetched into the second-level cache in place of the first, 0.66 of decode's processor time; the
third row from here during a gathered product, in place of the whole next one before it, 0.66 (9.4 to 6.2 ms). Of no use: fetching in outer,
what the next token begins with in decode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.conftest import Timer
from benchmarks.machine import BandwidthProbe
from benchmarks.shapes import Shape, Weights, batch
from mlxsae import SparseCode, ops

USAGE = ("encoder", "uniform", "zipf")


def code_of(usage: str, shape: Shape, w_enc: mx.array) -> SparseCode:
    rng = np.random.default_rng(3)
    if usage == "encoder":
        return ops.topk_encode(mx.array(batch(shape, 0)), w_enc, k=shape.k)
    if usage == "uniform":
        score = rng.random((shape.n, shape.d_sae), dtype=np.float32)
    else:  # Gumbel top-k samples without replacement; features of rank r have weight 1 / r
        score = rng.gumbel(size=(shape.n, shape.d_sae)) - np.log(1 + rng.permutation(shape.d_sae))
    indices = np.sort(np.argpartition(score, -shape.k, axis=1)[:, -shape.k :], axis=1).astype(np.uint32)
    return SparseCode(mx.array(rng.random((shape.n, shape.k), dtype=np.float32)), mx.array(indices))


@pytest.fixture(scope="module")
def weight(start: Weights) -> mx.array:
    w = mx.array(start.w_dec)
    mx.eval(w)
    return w


@pytest.fixture(scope="module", params=USAGE)
def usage(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def code(usage: str, shape: Shape, weight: mx.array) -> SparseCode:
    made = code_of(usage, shape, weight)
    mx.eval(made)
    return made


def run(
    timed: Timer,
    shape: Shape,
    probe: BandwidthProbe,
    name: str,
    function: Callable[[mx.array], Any],
    floats: int,
) -> None:
    timed(function, group=f"{name} {tuple(shape)}")
    roof = max(probe.bytes_per_second() for _ in range(3))
    timed.note(share_of_bandwidth=4 * floats / timed.median / roof)


def gathered(shape: Shape) -> int:
    """Floats of the rows that a code names, one row an entry."""
    return shape.n * shape.k * shape.d_in


def bench_sparse_decode(
    timed: Timer, shape: Shape, probe: BandwidthProbe, weight: mx.array, code: SparseCode
) -> None:
    run(timed, shape, probe, "sparse_decode", lambda x: ops.sparse_decode(code, weight), gathered(shape))


def bench_decode_residual(
    timed: Timer, shape: Shape, probe: BandwidthProbe, weight: mx.array, code: SparseCode
) -> None:
    floats = gathered(shape) + 2 * shape.n * shape.d_in
    run(timed, shape, probe, "decode_residual", lambda x: ops.decode_residual(code, weight, x), floats)


def bench_gather_dot(
    timed: Timer, shape: Shape, probe: BandwidthProbe, weight: mx.array, code: SparseCode
) -> None:
    run(timed, shape, probe, "gather_dot", lambda x: ops.gather_dot(x, weight, code.indices), gathered(shape))


def bench_sparse_outer(timed: Timer, shape: Shape, probe: BandwidthProbe, code: SparseCode) -> None:
    floats = gathered(shape) + shape.d_sae * shape.d_in
    run(timed, shape, probe, "sparse_outer", lambda x: ops.sparse_outer(code, x, d_sae=shape.d_sae), floats)


class BenchPlainMLX:
    """The same results by MLX's own ops: a gather of rows, or a scatter into ``[n, d_sae]`` and a product."""

    def bench_decode_gather(self, timed: Timer, shape: Shape, weight: mx.array, code: SparseCode) -> None:
        timed(
            lambda x: (weight[code.indices] * code.values[..., None]).sum(axis=1),
            group=f"sparse_decode {tuple(shape)}",
        )

    def bench_decode_dense(self, timed: Timer, shape: Shape, weight: mx.array, code: SparseCode) -> None:
        timed(lambda x: dense(code, shape) @ weight, group=f"sparse_decode {tuple(shape)}")

    def bench_gather_dot_gather(self, timed: Timer, shape: Shape, weight: mx.array, code: SparseCode) -> None:
        timed(lambda x: (weight[code.indices] * x[:, None]).sum(axis=-1), group=f"gather_dot {tuple(shape)}")

    def bench_gather_dot_dense(self, timed: Timer, shape: Shape, weight: mx.array, code: SparseCode) -> None:
        timed(
            lambda x: mx.take_along_axis(x @ weight.T, code.indices, axis=1),
            group=f"gather_dot {tuple(shape)}",
        )

    def bench_sparse_outer_scatter(self, timed: Timer, shape: Shape, code: SparseCode) -> None:
        def plain(x: mx.array) -> mx.array:
            rows = (code.values[..., None] * x[:, None]).reshape(-1, shape.d_in)
            return mx.zeros((shape.d_sae, shape.d_in)).at[code.indices.flatten()].add(rows)

        timed(plain, group=f"sparse_outer {tuple(shape)}")

    def bench_sparse_outer_dense(self, timed: Timer, shape: Shape, code: SparseCode) -> None:
        timed(lambda x: dense(code, shape).T @ x, group=f"sparse_outer {tuple(shape)}")


def dense(code: SparseCode, shape: Shape) -> mx.array:
    return mx.put_along_axis(mx.zeros((shape.n, shape.d_sae)), code.indices, code.values, axis=1)
