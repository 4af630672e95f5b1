"""Reading shuffled shards into training batches, against reading the same warm files from end to end.

  python -m benchmarks.bench_shards --gb 5 --d 1024 --dtype float32 --batch-size 1024

Writes a set of random rows (or takes the one in --dir), reads it once to warm it, then in turns: its files from end
to end into one small buffer used again and again (nothing is faster), the same into new arrays of a batch's size,
and shuffled batches as a trainer takes them. Memory is the process's anonymous memory while batches are read, over that
before. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from benchmarks import machine
from mlxsae import ops
from mlxsae.data import ActivationDataset
from mlxsae.data.encoding import Stream, encode
from mlxsae.data.reader import PREFETCH
from mlxsae.data.shards import ShardWriter

_CHUNK = 8192
SEQUENTIAL_BUFFER = 4 << 20


def write(directory: Path, size: int, d: int, dtype: str, streams: int) -> None:
    stream = Stream(d, dtype)
    names = {f"blocks.{i}.hook_resid_post": stream for i in range(streams)}
    rows = size // (streams * stream.row_bytes)
    shard_rows = (128 << 20) // (streams * stream.row_bytes)
    with ShardWriter(directory, names, shard_rows=shard_rows, tokens=False) as writer:
        writer.resume()
        for number in range(-(-rows // _CHUNK)):
            x = mx.random.normal((min(_CHUNK, rows - number * _CHUNK), d), key=mx.random.key(number))
            fields = {f: a for name in names for f, a in encode(name, stream, x).items()}
            writer.append(fields, batch=number)
        writer.finish(exhausted=True)


def anonymous() -> int:
    """Bytes of anonymous memory; 0 where the system does not say."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0


def sequential(files: list[Path]) -> int:
    buffer, size = bytearray(SEQUENTIAL_BUFFER), 0
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while got := file.readinto(buffer):
                size += got
    return size


def into_arrays(files: list[Path], batch_bytes: int) -> int:
    size = 0
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while True:
                array = mx.zeros(batch_bytes, mx.uint8)
                mx.eval(array)
                got = file.readinto(np.array(array, copy=False).data)
                size += got
                if got < batch_bytes:
                    break
    return size


def batches(dataset: ActivationDataset, batch_size: int, seed: int) -> Iterator[list[mx.array]]:
    for batch in dataset.batches(batch_size, hook_points=list(dataset.hook_points), seed=seed):
        arrays = list(batch.values())
        mx.eval(arrays)
        yield arrays


def timed(function: Callable[[], int]) -> float:
    """Bytes per second."""
    start = time.perf_counter()
    size = function()
    return size / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=5.0)
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="keep the set here, or take the one that is")
    options = parser.parse_args()
    folder = options.dir or Path(tempfile.mkdtemp(prefix="mlxsae-bench-"))
    try:
        if not (folder / "dataset.json").is_file():
            write(folder, int(options.gb * 1e9), options.d, options.dtype, options.streams)
        dataset = ActivationDataset.open(folder)
        files = sorted(folder.glob("*.safetensors"))
        row_bytes = options.streams * Stream(dataset.d(dataset.hook_points[0]), options.dtype).row_bytes
        batch_bytes = options.batch_size * row_bytes
        total = len(dataset) * row_bytes
        most = [0]

        def shuffled(seed: int) -> int:
            for number, _ in enumerate(batches(dataset, options.batch_size, seed)):
                if number % 64 == 0:
                    most[0] = max(most[0], anonymous())
            return total

        sequential(files)
        for _ in zip(range(20), batches(dataset, options.batch_size, 0), strict=False):
            pass
        before = anonymous()
        found: dict[str, list[float]] = {"sequential": [], "into_arrays": [], "shuffled": []}
        for seed in range(options.rounds):
            found["sequential"].append(timed(lambda: sequential(files)))
            found["into_arrays"].append(timed(lambda: into_arrays(files, batch_bytes)))
            found["shuffled"].append(timed(lambda s=seed: shuffled(s)))  # type: ignore[misc]
        medians = {name: statistics.median(rates) for name, rates in found.items()}
        ratios = {
            f"of_{name}": statistics.median(
                s / r for s, r in zip(found["shuffled"], found[name], strict=True)
            )
            for name in ("sequential", "into_arrays")
        }
        print(
            json.dumps(
                {
                    "bytes": total,
                    "shards": len(files),
                    "d": options.d,
                    "dtype": options.dtype,
                    "streams": options.streams,
                    "batch_size": options.batch_size,
                    "block_rows": dataset.block_rows(*dataset.hook_points),
                    "gb_per_s": {name: round(rate / 1e9, 2) for name, rate in medians.items()},
                    "shuffled": {name: round(ratio, 3) for name, ratio in ratios.items()},
                    "anonymous_mb": round((most[0] - before) / 1e6, 1),
                    "stated_buffer_mb": round((PREFETCH + 2) * batch_bytes / 1e6, 1),
                    "machine": machine.describe(ops.num_threads()),
                }
            )
        )
    finally:
        if options.dir is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
