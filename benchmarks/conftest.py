"""Shapes and fresh batches for the benchmarks: ``pytest benchmarks --shapes S0,S1,S2``."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import machine
from benchmarks.shapes import SHAPES, Shape, Weights, batch, weights

for _name in machine.FORCED:  # they would make OpenBLAS run kernels of another processor
    os.environ.pop(_name, None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shapes", default="S0,S1", help=f"comma-separated, of {','.join(SHAPES)}")
    parser.addoption("--rounds", type=int, default=9, help="timed calls of each benchmark")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        names = metafunc.config.getoption("shapes").split(",")
        metafunc.parametrize("shape", [SHAPES[name] for name in names], ids=names, scope="module")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    import mlx.core as mx

    from mlxsae import ops

    machine_info |= machine.describe(ops.num_threads())
    machine_info["device"] = {k: v for k, v in mx.device_info().items() if isinstance(v, str | int)}
    machine_info["versions"] = machine.versions("mlxsae", "mlx", "numpy", "scipy-openblas32")


@pytest.fixture(scope="module")
def start(shape: Shape) -> Weights:
    return weights(shape)


@pytest.fixture(scope="module")
def probe() -> machine.BandwidthProbe:
    from mlxsae import ops

    return machine.BandwidthProbe(1 << 25, ops.num_threads())


@pytest.fixture
def batches(shape: Shape) -> Iterator[np.ndarray]:
    return (batch(shape, index) for index in itertools.count())


class Timer:
    """Times a function of a fresh batch; what it returns is evaluated within the time."""

    def __init__(self, benchmark: Any, batches: Iterator[np.ndarray], rounds: int):
        self._benchmark, self._batches, self._rounds = benchmark, batches, rounds

    def __call__(
        self, function: Callable[[Any], Any], *, group: str, as_mlx: bool = True, **info: Any
    ) -> None:
        def setup() -> tuple[tuple[Any], dict]:
            x = next(self._batches)
            if not as_mlx:
                return (x,), {}
            array = mx.array(x)
            mx.eval(array)
            return (array,), {}

        def call(x: Any) -> None:
            result = function(x)
            if as_mlx:
                mx.eval(result)

        self._benchmark.group = group
        self._benchmark.extra_info |= info
        self._benchmark.pedantic(call, setup=setup, rounds=self._rounds, warmup_rounds=2)

    @property
    def median(self) -> float:
        return self._benchmark.stats.stats.median

    def note(self, **info: Any) -> None:
        self._benchmark.extra_info |= info


@pytest.fixture
def timed(benchmark: Any, batches: Iterator[np.ndarray], request: pytest.FixtureRequest) -> Timer:
    return Timer(benchmark, batches, request.config.getoption("rounds"))
