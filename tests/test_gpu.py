"""What a GPU must give that the op tests, which run on it too (`pytest -m gpu`), do not ask: its kernels run, with the CPU's bits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlxsae
from mlxsae import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not mx.is_available(mx.gpu), reason="MLX sees no GPU here"),
]


def test_every_op_has_a_kernel() -> None:
    without = {op: row["gpu"] for op, row in mlxsae.backends().items() if not row["gpu"].startswith("kernel")}
    assert without == {}


@pytest.mark.parametrize("shape", [(3, 64, 1000, 7), (100, 96, 5000, 32), (512, 256, 20000, 64)])
@pytest.mark.parametrize("certified", [False, True])
def test_float32_and_certified_encode_have_the_bits_of_the_cpu(
    shape: tuple[int, int, int, int], certified: bool
) -> None:
    n, d, d_sae, k = shape
    x, w, b = (mx.random.normal(s) for s in ((n, d), (d_sae, d), (d_sae,)))
    want = ops.topk_encode(x, w, b, k=k, stream=mx.cpu)
    shadow = ops.encoder_shadow(w, stream=mx.gpu) if certified else None
    got = ops.topk_encode(x, w, b, k=k, shadow=shadow, stream=mx.gpu)
    assert np.array_equal(np.array(got.indices), np.array(want.indices))
    assert np.array_equal(np.array(got.values), np.array(want.values))


def test_two_runs_have_the_same_bits() -> None:
    x, w = mx.random.normal((300, 128)), mx.random.normal((4000, 128))
    code = ops.topk_encode(x, w, k=16)
    runs = [np.array(ops.sparse_outer(code, x, d_sae=4000, stream=mx.gpu)) for _ in range(3)]
    assert all(np.array_equal(runs[0], r) for r in runs[1:])
