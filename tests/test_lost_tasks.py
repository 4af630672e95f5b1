"""Errors that a CPU task throws must not stop later evaluations, however many there were; nor may a change of the number
of threads meanwhile."""

from __future__ import annotations

import subprocess
import sys

import mlx.core as mx
import pytest

PROVOKE = """
import mlx.core as mx
from mlxsae import SparseCode, ops

w, values, wrong = mx.ones((64, 16)), mx.ones((8, 4)), mx.full((8, 4), 99, mx.uint32)
streams, seen = [mx.default_stream(mx.cpu), mx.new_stream(mx.cpu)], 0
for i in range(400):
    with mx.stream(streams[i // 200]):
        try:
            y = ops.sparse_decode(SparseCode(values, wrong), w)
            for _ in range(40):
                y = y + 1
            if i % 4 == 0:
                mx.async_eval(y)
                mx.synchronize()
            mx.eval(y)
        except RuntimeError as e:
            assert "indices must be below d_sae=64 but got 99" in str(e)
            seen += 1
y = ops.sparse_decode(SparseCode(values, wrong % 64), w)
for _ in range(400):
    y = y + 1
print(seen, y[0, 0].item())
"""


CHANGE = """
import threading, time
import mlx.core as mx
from mlxsae import ops

x, w = mx.random.normal((128, 32)), mx.random.normal((4096, 32))
want, _ = ops.batch_topk_encode(x, w, k=16)
mx.eval(want)
done = False


def change():
    n = 0
    while not done:
        n = n % 7 + 1
        ops.set_num_threads(n)
        time.sleep(0.0005)


other = threading.Thread(target=change)
other.start()
end, same = time.monotonic() + 4, True
while time.monotonic() < end:
    code, _ = ops.batch_topk_encode(x, w, k=16)
    same &= mx.array_equal(code.values, want.values).item()
done = True
other.join()
print(same)
"""


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="the number is that of the CPU kernels' threads")
def test_the_number_of_threads_may_change_at_any_time() -> None:
    """It waits for what is computing, which has sized its memory by it."""
    done = subprocess.run(
        [sys.executable, "-c", CHANGE], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="only CPU tasks look at the indices they are given")
def test_hundreds_of_errors_lose_no_task() -> None:
    """MLX 0.32.4 counts one task in five errors as running for ever, and at eleven waits for them."""
    done = subprocess.run(
        [sys.executable, "-c", PROVOKE], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["400", "404.0"]
