"""Where a trainer takes its batches from.

A source gives batches, a sample that does not disturb them, and its position as plain data, from which an
equal source continues with the same bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import mlx.core as mx
import numpy as np


class Chunk(NamedTuple):
    """Activations as a model gives them.

    ``x [..., d_in]``, or a tuple of several over the same tokens, the target ``y [..., d_out]`` for a transcoder, and
    ``valid [...]`` (bool): False for tokens to leave out, such as padding and BOS.
    """

    x: mx.array | np.ndarray | tuple[mx.array | np.ndarray, ...]
    y: mx.array | np.ndarray | None = None
    valid: mx.array | np.ndarray | None = None


@runtime_checkable
class ActivationSource(Protocol):
    """What ``fit`` reads. A batch is a tuple ``(x,)`` or ``(x, y)`` of float arrays ``[batch, d]``; whole contexts have
    ``tokens`` and ``places`` behind them, see :class:`~mlxsae.data.ContextActivations`.
    """

    def next_batch(self) -> tuple[mx.array, ...] | None:
        """The next batch, or None at the end."""
        ...

    def sample(self, n: int) -> tuple[mx.array, ...]:
        """Up to ``n`` rows, for initialisation or resampling; the batches that follow are as if it had not been called.
        None are left at the end of a stream.
        """
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, mx.array]]:
        """The position: a JSON-able part and arrays."""
        ...

    def restore(self, position: dict[str, Any], arrays: dict[str, mx.array]) -> None:
        """Continue from a position that an equal source gave."""
        ...


class ArraySource:
    """Shuffled epochs over arrays that are at hand (or memory-mapped): ``x [n, d_in]`` and optionally ``y [n,
    d_out]``.

    Every row comes once an epoch; a batch may span two epochs, and the last of a finite run may be short.
    """

    def __init__(
        self,
        x: mx.array | np.ndarray,
        y: mx.array | np.ndarray | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        epochs: float = math.inf,
    ):
        arrays = (x,) if y is None else (x, y)
        for name, a in zip("xy", arrays, strict=False):
            if a.ndim != 2 or a.shape[0] != x.shape[0]:
                raise ValueError(
                    f"[ArraySource] {name} must have shape [n, d] with n={x.shape[0]} but got {a.shape}."
                )
        if x.shape[0] == 0:
            raise ValueError("[ArraySource] there must be at least one row but got none.")
        _positive("ArraySource", batch_size=batch_size)
        self._arrays = tuple(a if isinstance(a, np.ndarray) else _to_numpy(a) for a in arrays)
        self._batch_size = batch_size
        self._seed = seed
        self._rows = x.shape[0]
        _positive("ArraySource", epochs=epochs)
        self._total = None if math.isinf(epochs) else int(rows_in(epochs, self._rows))
        self._cursor = 0
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def rows(self) -> int:
        """Rows of one epoch."""
        return self._rows

    def next_batch(self) -> tuple[mx.array, ...] | None:
        end = self._cursor + self._batch_size
        if self._total is not None:
            end = min(end, self._total)
        if end <= self._cursor:
            return None
        parts = []
        while self._cursor < end:
            epoch, begin = divmod(self._cursor, self._rows)
            take = min(end - self._cursor, self._rows - begin)
            parts.append(self._permutation(epoch)[begin : begin + take])
            self._cursor += take
        rows = np.concatenate(parts)
        return tuple(_to_mlx(a[rows]) for a in self._arrays)

    def sample(self, n: int) -> tuple[mx.array, ...]:
        rows = self._permutation(0)[:n]
        return tuple(_to_mlx(a[rows]) for a in self._arrays)

    def state(self) -> tuple[dict[str, Any], dict[str, mx.array]]:
        return {"kind": "array", "cursor": self._cursor, "seed": self._seed, "rows": self._rows}, {}

    def restore(self, position: dict[str, Any], arrays: dict[str, mx.array]) -> None:
        _same("ArraySource", position, kind="array", seed=self._seed, rows=self._rows)
        self._cursor = int(position["cursor"])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            # Seeded per epoch: any epoch can be entered without replaying those before it.
            self._order = np.random.default_rng((self._seed, epoch)).permutation(self._rows)
            self._epoch = epoch
        return self._order


class ShuffleBuffer:
    """Shuffles a stream of model activations within bounded memory.

    Rows of ``chunks`` that are valid fill a buffer of ``capacity`` rows (plus one chunk); batches are drawn
    from it at random without replacement, and it is topped up each time it is down to ``refill`` of its
    capacity. The end of the stream is drained; its last batch may be short.

    ``chunks`` gives :class:`Chunk` or bare arrays ``[..., d]``. To resume, an equal iterable is given; if it
    has ``state()`` and ``restore(position)`` these carry its position, otherwise the chunks already used are
    skipped.

    Same seed, same chunks, same batches. Where ``chunks`` raises, Ctrl-C included, and can be walked through again, the next
    call begins where this one did.
    """

    def __init__(
        self,
        chunks: Iterable[Chunk | mx.array | np.ndarray],
        *,
        batch_size: int,
        capacity: int = 262_144,
        refill: float = 0.5,
        seed: int = 0,
    ):
        _positive("ShuffleBuffer", batch_size=batch_size, capacity=capacity)
        if not 0 <= refill < 1:
            raise ValueError(f"[ShuffleBuffer] refill must be in [0, 1) but got {refill}.")
        if capacity < batch_size:
            raise ValueError(
                f"[ShuffleBuffer] capacity must be at least batch_size={batch_size} but got {capacity}."
            )
        self._source = chunks
        self._chunks: Iterator[Any] | None = None
        self._batch_size = batch_size
        self._capacity = capacity
        self._low = max(int(refill * capacity), batch_size - 1)
        self._seed = seed
        self._rng = np.random.default_rng(seed)
        self._rows: tuple[np.ndarray, ...] | None = None  # already in the order in which they leave
        self._cursor = 0
        self._consumed = 0
        self._exhausted = False

    def next_batch(self) -> tuple[mx.array, ...] | None:
        if not self._exhausted and self._left() <= self._low:
            self._fill()
        if self._rows is None or self._left() == 0:
            return None
        begin, self._cursor = self._cursor, min(self._cursor + self._batch_size, len(self._rows[0]))
        return tuple(_to_mlx(a[begin : self._cursor]) for a in self._rows)

    def sample(self, n: int) -> tuple[mx.array, ...]:
        if self._rows is None and not self._exhausted:
            self._fill()
        if self._rows is None:
            raise ValueError(
                "[ShuffleBuffer] there must be at least one valid token but the stream has none."
            )
        rows = slice(self._cursor, self._cursor + n)  # shuffled, so the next n are a random n
        return tuple(_to_mlx(a[rows]) for a in self._rows)

    def state(self) -> tuple[dict[str, Any], dict[str, mx.array]]:
        position: dict[str, Any] = {
            "kind": "shuffle",
            "seed": self._seed,
            "capacity": self._capacity,
            "consumed": self._consumed,
            "exhausted": self._exhausted,
            "rng": self._rng.bit_generator.state,
        }
        if hasattr(self._source, "state"):
            position["chunks"] = self._source.state()  # type: ignore[attr-defined]
        rows = () if self._rows is None else self._rows
        return position, {f"rows_{i}": _to_mlx(a[self._cursor :]) for i, a in enumerate(rows)}

    def restore(self, position: dict[str, Any], arrays: dict[str, mx.array]) -> None:
        _same("ShuffleBuffer", position, kind="shuffle", seed=self._seed, capacity=self._capacity)
        read = self._consumed
        self._rng.bit_generator.state = position["rng"]
        self._consumed, self._exhausted = int(position["consumed"]), bool(position["exhausted"])
        self._rows = tuple(_to_numpy(arrays[f"rows_{i}"]) for i in range(len(arrays))) or None
        self._cursor = 0
        if "chunks" in position:
            self._source.restore(position["chunks"])  # type: ignore[attr-defined]
            self._chunks = iter(self._source)
        else:
            iterator = iter(self._source)
            read = read if iterator is self._source else 0  # a generator does not start again
            if read > self._consumed:
                raise ValueError(
                    f"[ShuffleBuffer] to resume, at most {self._consumed} chunks may be read but got {read}."
                )
            self._chunks = itertools.islice(iterator, self._consumed - read, None)

    def _left(self) -> int:
        return 0 if self._rows is None else len(self._rows[0]) - self._cursor

    def _fill(self) -> None:
        if self._chunks is None:
            self._chunks = iter(self._source)
        position = self._source.state() if hasattr(self._source, "state") else None  # type: ignore[attr-defined]
        consumed = self._consumed
        parts = [] if self._rows is None else [tuple(a[self._cursor :] for a in self._rows)]
        held = self._left()
        try:
            while held < self._capacity:
                try:
                    chunk = next(self._chunks)
                except StopIteration:
                    self._exhausted = True
                    break
                self._consumed += 1
                rows = valid_rows(chunk)
                if len(rows[0]):
                    parts.append(rows)
                    held += len(rows[0])
        except BaseException:
            # What was read is in no batch yet, and a generator that has raised is at its end.
            if position is not None:
                self._source.restore(position)  # type: ignore[attr-defined]
                self._chunks, self._consumed = None, consumed
            elif (again := iter(self._source)) is not self._source:
                self._chunks, self._consumed = itertools.islice(again, consumed, None), consumed
            else:
                self._take_in(parts)
            raise
        self._take_in(parts)

    def _take_in(self, parts: list[tuple[np.ndarray, ...]]) -> None:
        if parts:
            # Gathered field by field: at most one field exists twice.
            order = self._rng.permutation(sum(len(part[0]) for part in parts))
            self._rows = tuple(np.concatenate(field)[order] for field in zip(*parts, strict=True))
        self._cursor = 0


class IterableSource:
    """Batches from any iterable of arrays ``[n, d]`` or pairs, in its own order and sizes.

    Its position is the number of batches taken: resuming consumes that many from an equal iterable.
    """

    def __init__(self, batches: Iterable[mx.array | tuple[mx.array, ...]]):
        self._iterator = iter(batches)
        self._ahead: list[tuple[mx.array, ...]] = []
        self._none: tuple[mx.array, ...] | None = None  # no rows of each field, once a batch was read
        self._taken = 0

    def next_batch(self) -> tuple[mx.array, ...] | None:
        batch = self._ahead.pop(0) if self._ahead else self._read()
        self._taken += batch is not None
        return batch

    def sample(self, n: int) -> tuple[mx.array, ...]:
        """The next batches that hold ``n`` rows; they are kept and come again."""
        held = sum(len(b[0]) for b in self._ahead)
        while held < n and (batch := self._read()) is not None:
            self._ahead.append(batch)
            held += len(batch[0])
        if not self._ahead:
            if self._none is None:
                raise ValueError("[fit] there must be at least one batch but got none.")
            return self._none
        return tuple(mx.concatenate(list(field))[:n] for field in zip(*self._ahead, strict=True))

    def state(self) -> tuple[dict[str, Any], dict[str, mx.array]]:
        return {"kind": "iterable", "taken": self._taken}, {}

    def restore(self, position: dict[str, Any], arrays: dict[str, mx.array]) -> None:
        _same("fit", position, kind="iterable")
        if self._taken > position["taken"]:  # an iterator does not start again
            raise ValueError(
                f"[fit] to resume, at most {position['taken']} batches may have been taken but {self._taken} were."
            )
        while self._taken < position["taken"]:
            if self.next_batch() is None:
                raise ValueError(
                    f"[fit] the iterable must give {position['taken']} batches but ended before."
                )

    def _read(self) -> tuple[mx.array, ...] | None:
        batch = next(self._iterator, None)
        if batch is None:
            return None
        batch = batch if isinstance(batch, tuple) else (batch,)
        if not all(isinstance(a, (mx.array, np.ndarray)) for a in batch):
            raise ValueError(
                "[fit] a batch must be an array [n, d] or a tuple of them but got "
                f"{', '.join(type(a).__name__ for a in batch)}."
            )
        batch = tuple(a if isinstance(a, mx.array) else mx.array(a) for a in batch)
        if self._none is None:
            self._none = tuple(mx.zeros((0, *a.shape[1:]), a.dtype) for a in batch)
        return batch


def rows_in(epochs: float, rows: int) -> float:
    """Rows of ``epochs`` passes over ``rows``, without the last digits of the product: 0.29 of 100 are 29 and 1.1 are 110."""
    return round(epochs * rows, 3)


def as_source(data: Any) -> ActivationSource:
    """``data`` itself where it is a source, else its batches."""
    if isinstance(data, ActivationSource):
        return data
    if isinstance(data, (mx.array, np.ndarray)) or not isinstance(data, Iterable):
        raise ValueError(
            "[fit] data must be an ActivationSource, such as ArraySource(x, batch_size=1024), or batches [n, d] but got "
            f"{type(data).__name__}."
        )
    return IterableSource(data)


def valid_rows(chunk: Chunk | mx.array | np.ndarray) -> tuple[np.ndarray, ...]:
    """The rows ``[n, d]`` of each field that are valid."""
    chunk = chunk if isinstance(chunk, Chunk) else Chunk(chunk)
    given = (
        *(chunk.x if isinstance(chunk.x, tuple) else (chunk.x,)),
        *(() if chunk.y is None else (chunk.y,)),
    )
    tokens = tuple(given[0].shape[:-1])
    fields = []
    for a in given:
        rows = _to_numpy(a)
        if rows.ndim < 2 or rows.shape[:-1] != tokens:
            raise ValueError(
                f"[ShuffleBuffer] activations must be [..., d] over the same tokens but got {rows.shape}."
            )
        fields.append(rows.reshape(-1, rows.shape[-1]))
    if chunk.valid is None:
        return tuple(fields)
    valid = np.array(chunk.valid)
    if valid.shape != tokens or valid.dtype != np.bool_:
        raise ValueError(
            f"[ShuffleBuffer] valid must be bool of shape {tokens} but got {valid.dtype} {valid.shape}."
        )
    return tuple(rows[valid.reshape(-1)] for rows in fields)


def _to_numpy(a: mx.array | np.ndarray) -> np.ndarray:
    """float32 (a 16-bit activation is exact in it, and NumPy has no bfloat16)."""
    if isinstance(a, mx.array):
        a = np.array(a.astype(mx.float32), copy=False)
    return np.asarray(a, dtype=np.float32)


def _to_mlx(a: np.ndarray) -> mx.array:
    return mx.array(np.asarray(a, dtype=np.float32))


def _positive(owner: str, **sizes: float) -> None:
    for name, size in sizes.items():
        if not size > 0:
            raise ValueError(f"[{owner}] {name} must be positive but got {size}.")


def _same(owner: str, position: dict[str, Any], **expected: Any) -> None:
    for key, value in expected.items():
        if position.get(key) != value:
            raise ValueError(f"[{owner}] to resume, {key} must be {position.get(key)!r} but got {value!r}.")
