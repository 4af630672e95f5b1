"""Stored activations as batches: every row once an epoch, in random order, within little memory."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlxsae.data.encoding import Stream, bits, blank, decode
from mlxsae.data.shards import TOKENS
from mlxsae.data.source import rows_in

BLOCK_BYTES = 256 << 10
"""A block is as many rows as the widest stream has in so many bytes: a read long enough to run at full speed."""
PREFETCH = 3
"""Batches that are read ahead of the one in use."""


class Store(Protocol):
    """Rows of several streams. Runs must lie within one of the stretches that ``shard_rows`` counts."""

    rows: int
    streams: dict[str, Stream]

    @property
    def shard_rows(self) -> list[int]: ...

    def spec(self, stream: str) -> dict[str, tuple[mx.Dtype, int]]: ...

    def read(self, field: str, runs: np.ndarray, out: np.ndarray) -> None: ...


class ArrayStore:
    """Arrays that are at hand, or memory-mapped, ``[rows, d]`` each."""

    def __init__(self, arrays: Mapping[str, mx.array | np.ndarray]) -> None:
        self.streams: dict[str, Stream] = {}
        self._fields: dict[str, np.ndarray] = {}
        self.rows = len(next(iter(arrays.values()))) if arrays else 0
        if self.rows == 0:
            raise ValueError("[from_arrays] there must be at least one row but got none.")
        for name, a in arrays.items():
            if a.ndim != 2 or len(a) != self.rows:
                raise ValueError(
                    f"[from_arrays] {name} must have shape [n, d] with n={self.rows} but got {tuple(a.shape)}."
                )
            dtype = str(a.dtype).removeprefix("mlx.core.")
            if dtype not in ("float32", "float16", "bfloat16"):
                a, dtype = _float32(name, a), "float32"
            self.streams[name] = Stream(a.shape[1], dtype)
            self._fields[name] = bits(a) if isinstance(a, mx.array) else _numpy_bits(a)

    @property
    def shard_rows(self) -> list[int]:
        return [self.rows]

    def spec(self, stream: str) -> dict[str, tuple[mx.Dtype, int]]:
        return self.streams[stream].fields(stream)

    def read(self, field: str, runs: np.ndarray, out: np.ndarray) -> None:
        ends = np.cumsum(runs[:, 1])
        rows = np.repeat(runs[:, 0] - ends + runs[:, 1], runs[:, 1]) + np.arange(ends[-1])
        np.take(self._fields[field], rows, axis=0, out=out, mode="clip")


def _float32(name: str, a: mx.array | np.ndarray) -> mx.array | np.ndarray:
    floating = (
        mx.issubdtype(a.dtype, mx.floating)
        if isinstance(a, mx.array)
        else np.issubdtype(a.dtype, np.floating)
    )
    if not floating:
        raise ValueError(f"[from_arrays] {name} must be floating point but got {a.dtype}.")
    return a.astype(mx.float32) if isinstance(a, mx.array) else a.astype(np.float32)


def _numpy_bits(a: np.ndarray) -> np.ndarray:
    return a.view(np.uint16) if a.dtype == np.float16 else a


class _Blocks(NamedTuple):
    """The order of one epoch: first row and number of rows of each block, and where each begins in it."""

    first: np.ndarray
    rows: np.ndarray
    at: np.ndarray


@dataclass
class _Job:
    """A batch that the thread reads, or whoever cannot wait for it to begin. ``done`` raises what reading raised."""

    fields: dict[str, mx.array]
    rows: int
    todo: list[Callable[[], None]]
    done: Future[None]

    def take_over(self) -> bool:
        """Read it here, unless the thread has begun."""
        if not self.done.cancel():
            return False
        here: Future[None] = Future()
        try:
            here.set_result(self.todo.pop()())
        except Exception as e:
            here.set_exception(e)
        self.done = here
        return True


class BlockReader:
    """Shuffled batches of a store, and a position that can be left and taken up again.

    The rows from ``rows[0]`` to ``rows[1]`` are cut into blocks of ``block_rows`` neighbours within a shard. Each
    epoch has its own random order of all blocks, drawn from ``(seed, epoch)``; batches take the rows as they come
    in it, so every row comes once an epoch. As rows are shuffled within their shard when it is written, a batch
    is a random sample of ``batch_size / block_rows`` shards (of all rows with ``block_rows=1``, the default for
    arrays in memory).

    A thread reads ``PREFETCH`` batches ahead, straight into the memory of the arrays that are handed out: beyond
    those batches and the order of the blocks (32 bytes each) nothing is held. Whoever asks for a batch that is not
    ready reads the next one itself meanwhile, so that two cores read where reading is all there is to do, and nobody
    waits for a thread that does not get a core.

    Parameters
    ----------
    store : rows.
    names : the streams to read; all rows of a batch belong together.
    epochs : may be a fraction, or infinite. A batch may span two epochs; the last may be short.
    """

    def __init__(
        self,
        store: Store,
        names: Sequence[str],
        *,
        batch_size: int,
        block_rows: int,
        rows: tuple[int, int] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        epochs: float = math.inf,
    ) -> None:
        begin, end = rows or (0, store.rows)
        if begin >= end:
            raise ValueError("[activations] there must be at least one row but got none.")
        if batch_size < 1 or block_rows < 1:
            raise ValueError(
                "[activations] batch_size and block_rows must be positive but got "
                f"{batch_size} and {block_rows}."
            )
        if not epochs > 0:
            raise ValueError(f"[activations] epochs must be positive but got {epochs}.")
        self._store, self._names = store, tuple(dict.fromkeys(names))
        self._batch_size, self._block_rows = batch_size, block_rows
        self._range, self._shuffle, self._seed = (begin, end), shuffle, seed
        self.rows = end - begin
        self._total = None if math.isinf(epochs) else int(rows_in(epochs, self.rows))
        self._taken = 0  # rows handed out
        self._ahead = 0  # rows handed out or being read
        self._jobs: deque[_Job] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlxsae-read")
        self._blocks = self._cut(store.shard_rows)
        self._epoch, self._order = -1, self._blocks

    def next_batch(self) -> dict[str, mx.array] | None:
        """``{name: x [batch, d]}`` in the stored float type (float32 for int8); None at the end."""
        try:
            return self._next_batch()
        except Exception:
            raise
        except (
            BaseException
        ):  # Ctrl-C may strike between any two lines: the next call begins where this one did
            self._go_to(self._taken)
            raise

    def _next_batch(self) -> dict[str, mx.array] | None:
        while len(self._jobs) <= PREFETCH and (job := self._start(self._ahead, self._batch_size)):
            self._jobs.append(job)
            self._ahead += job.rows
        if not self._jobs:
            return None
        if not self._jobs[0].done.done():
            any(job.take_over() for job in self._jobs)
        job = self._jobs.popleft()
        job.done.result()
        self._taken += job.rows
        return self._decoded(job.fields)

    def sample(self, n: int) -> dict[str, mx.array]:
        """The next ``n`` rows of the order (at most an epoch); the batches that follow are as if it had not
        been called.
        """
        job = self._start(self._taken, min(n, self.rows), endless=True)
        assert job is not None
        job.take_over()
        job.done.result()
        return self._decoded(job.fields)

    @property
    def cursor(self) -> dict[str, Any]:
        """The position as plain JSON: what decides the order, and the rows taken."""
        return {
            "kind": "blocks",
            "seed": self._seed,
            "shuffle": self._shuffle,
            "block_rows": self._block_rows,
            "rows": list(self._range),
            "taken": self._taken,
        }

    @cursor.setter
    def cursor(self, position: Mapping[str, Any]) -> None:
        mine = self.cursor
        for key in mine.keys() - {"taken"}:
            if position.get(key) != mine[key]:
                raise ValueError(
                    f"[activations] to resume, {key} must be {position.get(key)!r} but got {mine[key]!r}."
                )
        self._go_to(int(position["taken"]))

    def _go_to(self, taken: int) -> None:
        for job in self._jobs:
            job.done.cancel()
        self._jobs.clear()  # one that runs already fills memory that nobody will see
        self._taken = self._ahead = taken

    def _cut(self, shard_rows: Sequence[int]) -> _Blocks:
        """Blocks in the order on disk."""
        firsts: list[np.ndarray] = []
        ends: list[np.ndarray] = []
        begin, end = self._range
        at = 0
        for rows in shard_rows:
            low, high = max(begin, at), min(end, at + rows)
            if low < high:
                first = np.arange(low, high, self._block_rows, dtype=np.int64)
                firsts.append(first)
                ends.append(np.minimum(first + self._block_rows, high))
            at += rows
        first = np.concatenate(firsts)
        return _placed(first, np.concatenate(ends) - first)

    def _order_of(self, epoch: int) -> _Blocks:
        if not self._shuffle:
            return self._blocks
        if epoch != self._epoch:
            # Seeded per epoch: any epoch can be entered without replaying those before it.
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._blocks.first))
            self._order = _placed(self._blocks.first[order], self._blocks.rows[order])
            self._epoch = epoch
        return self._order

    def _runs(self, begin: int, rows: int) -> np.ndarray:
        """First row and number of rows of each stretch, for ``rows`` rows from ``begin`` of the endless order."""
        parts = []
        while rows > 0:
            epoch, at = divmod(begin, self.rows)
            order = self._order_of(epoch)
            take = min(rows, self.rows - at)
            low = int(np.searchsorted(order.at, at, side="right")) - 1
            high = int(np.searchsorted(order.at, at + take, side="left"))
            cut_low = np.maximum(at - order.at[low:high], 0)
            cut_high = np.minimum(at + take - order.at[low:high], order.rows[low:high])
            parts.append(np.stack([order.first[low:high] + cut_low, cut_high - cut_low], axis=1))
            begin, rows = begin + take, rows - take
        return np.concatenate(parts)

    def _start(self, begin: int, rows: int, endless: bool = False) -> _Job | None:
        if self._total is not None and not endless:
            rows = min(rows, self._total - begin)
        if rows <= 0:
            return None
        runs = self._runs(begin, rows)
        fields: dict[str, mx.array] = {}
        views: dict[str, np.ndarray] = {}
        for name in self._names:
            for field, (dtype, width) in self._store.spec(name).items():
                fields[field], view = blank(rows, dtype, max(width, 1))
                views[field] = view if width else view[:, 0]

        def read() -> None:
            for field, view in views.items():
                self._store.read(field, runs, view)

        todo = [read]  # whoever reads takes it out, so that no queue holds the batch's memory any longer
        return _Job(fields, rows, todo, self._thread.submit(lambda: todo.pop()()))

    def _decoded(self, fields: Mapping[str, mx.array]) -> dict[str, mx.array]:
        return {
            name: fields[name][:, 0] if name == TOKENS else decode(name, self._store.streams[name], fields)
            for name in self._names
        }


def _placed(first: np.ndarray, rows: np.ndarray) -> _Blocks:
    return _Blocks(first, rows, np.fromiter(itertools.accumulate(rows[:-1], initial=0), np.int64, len(rows)))
