"""Activations of a language model onto disk, in a run that can be broken off anywhere and taken up again."""

from __future__ import annotations

import hashlib
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxsae.data.encoding import Stream, encode, to_float32
from mlxsae.data.progress import Progress
from mlxsae.data.shards import TOKENS, ShardWriter
from mlxsae.lm import LanguageModel, TokenBatch, capture, without_outliers

T = TypeVar("T")
SHARD_BYTES = 128 << 20
"""Bytes of a shard, by default: the memory of one buffer, and what an interruption costs at most."""
_AHEAD = 4  # token batches prepared ahead
_CHECKED = 16  # rows compared when a harvest goes on


def harvest(
    lm: LanguageModel,
    hook_points: Sequence[Any],
    batches: Callable[[], Iterable[TokenBatch]],
    directory: str | os.PathLike,
    *,
    max_rows: int | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
    min_norm: float = 0.0,
    max_norm_ratio: float | None = None,
    recipe: dict[str, Any] | None = None,
    origin: dict[str, Any] | None = None,
    progress: bool = False,
) -> None:
    """Write the activations at ``hook_points`` of every valid token, from one forward pass a batch.

    The same call on the same folder goes on where an earlier one stopped, however that came about, and leaves the
    same bytes as an uninterrupted one; on a finished folder it adds what a larger ``max_rows`` asks for, if anything.
    Text that was used is tokenised again and not run through the model again; the model's own last tokens are, and
    must come out as they are stored.

    Parameters
    ----------
    lm : LanguageModel
    hook_points : any spellings that name the layer
        Of activations ``[b, t, ...]``; what follows the tokens is flattened into one row.
    batches : function without arguments
        Gives a new iterator over the same batches each time; no token that is not ``valid`` is stored.
    directory : new, empty, or made by an equal call.
    max_rows : end after so many tokens; by default with ``batches``.
    dtype : "float32", "bfloat16", "float16", or "int8" (:func:`~mlxsae.data.encoding.encode`).
    shard_bytes : size of a shard; memory holds two.
    seed : of the shuffle within shards.
    min_norm : leave out tokens whose activation at any hook point has a smaller norm.
    max_norm_ratio : leave out tokens whose norm at any hook point is more than so many times the median of the
        valid tokens in its batch, such as attention sinks.
    recipe : what else the activations depend on, such as dataset and context size; kept, and compared with that of
        the folder.
    origin : anything else worth keeping; not compared.
    progress : draw a progress bar on stderr.

    Raises
    ------
    ValueError : bad arguments; a folder made with others, by another model or from another text; no valid token.
    OSError : the disk is full or fails. Complete shards stay; make room and call again.
    """
    points = [lm.hook_point(point) for point in hook_points]
    if not points or len(set(points)) < len(points):
        raise ValueError(
            f"[harvest] hook_points must be one or several, each once, but got {[str(p) for p in points]}."
        )
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"[harvest] max_rows must be positive but got {max_rows}.")
    if min_norm < 0 or (max_norm_ratio is not None and max_norm_ratio <= 1):
        raise ValueError(
            "[harvest] min_norm must not be negative and max_norm_ratio must be over 1 but got "
            f"{min_norm} and {max_norm_ratio}."
        )
    streams = {
        str(point): Stream(width, dtype) for point, width in zip(points, _widths(lm, points), strict=True)
    }
    row_bytes = sum(stream.row_bytes for stream in streams.values())
    identity = {
        "model": {"name": lm.name, "layers": lm.n_layers, "d_model": lm.d_model, "weights": fingerprint(lm)},
        "min_norm": min_norm,
        "max_norm_ratio": max_norm_ratio,
        **(recipe or {}),
    }
    writer = ShardWriter(
        directory,
        streams,
        shard_rows=max(1, shard_bytes // row_bytes),
        seed=seed,
        identity=identity,
        origin=origin,
    )
    with writer, Progress(max_rows, unit="tokens", enabled=progress) as bar:
        if writer.complete and (writer.exhausted or (max_rows is not None and writer.rows >= max_rows)):
            return
        start = writer.resume() or {"batch": 0, "row": 0}
        bar.show(writer.rows)
        if max_rows is not None and writer.rows >= max_rows:  # broken off when more were asked for
            writer.finish(exhausted=False)
            return
        rest = itertools.islice(batches(), start["batch"], None)
        full, met = False, writer.rows == 0
        with _ahead(rest) as ahead:
            for number, batch in enumerate(ahead, start["batch"]):
                rows = _rows(lm, points, streams, batch, min_norm, max_norm_ratio)
                first = 0
                if not met:
                    first, met = start["row"], True
                    _check(writer, streams, {name: a[:first] for name, a in rows.items()})
                last = len(rows[TOKENS])
                if max_rows is not None:
                    last = min(last, first + max_rows - writer.rows)
                writer.append({name: a[first:last] for name, a in rows.items()}, batch=number, row=first)
                bar.show(writer.rows)
                full = max_rows is not None and writer.rows >= max_rows
                if full:
                    break
        if not met:
            raise ValueError(
                f"[harvest] to go on in {writer.directory}, the text must be the same but it ends before the last shard."
            )
        if writer.rows == 0:
            raise ValueError("[harvest] there must be at least one valid token but the text has none.")
        writer.finish(exhausted=not full)


def fingerprint(lm: LanguageModel) -> str:
    """A hash of names, shapes and the first numbers of all weights. Casting to a wider float does not change it."""
    weights: list[tuple[str, mx.array]] = tree_flatten(lm.model.parameters())  # type: ignore[assignment]
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(weights, key=lambda item: item[0]):
        head = weight.reshape(-1)[:8]
        head = head.astype(mx.float32) if mx.issubdtype(head.dtype, mx.floating) else head
        digest.update(f"{name} {tuple(weight.shape)} ".encode() + np.array(head).tobytes())
    return digest.hexdigest()


def _widths(lm: LanguageModel, points: Sequence[Any]) -> list[int]:
    """Numbers per token at each hook point, from the shape of a pass over two tokens and one more."""
    shapes = []
    for t in (2, 3):
        found = capture(lm, mx.zeros((1, t), mx.int32), points)
        shapes.append([tuple(found[point].shape) for point in points])
    for point, a, b in zip(points, *shapes, strict=True):
        if a[:2] != (1, 2) or a[2:] != b[2:] or len(a) < 3:
            raise ValueError(
                f"[harvest] {point} must give [b, t, ...], a row for each token, but gives {list(a)}."
            )
    return [int(np.prod(shape[2:])) for shape in shapes[0]]


def _rows(
    lm: LanguageModel,
    points: Sequence[Any],
    streams: dict[str, Stream],
    batch: TokenBatch,
    min_norm: float,
    max_norm_ratio: float | None,
) -> dict[str, np.ndarray]:
    """The fields of a batch's valid rows, and their tokens."""
    found = capture(lm, batch.tokens, points)
    flat = {str(p): found[p].reshape(batch.tokens.size, -1) for p in points}
    valid = batch.valid.reshape(-1)
    kept = np.array(valid)
    for x in flat.values() if min_norm > 0 or max_norm_ratio is not None else ():
        kept &= ~np.array(mx.linalg.norm(x.astype(mx.float32), axis=-1) < min_norm)  # NaN is kept, to be seen
        if max_norm_ratio is not None:
            kept &= np.array(without_outliers(x, valid, times_median=max_norm_ratio))
    at = np.flatnonzero(kept)
    rows = {TOKENS: np.array(batch.tokens).reshape(-1)[at].astype(np.int32, copy=False)}
    picked = mx.array(at.astype(np.uint32))
    for name, x in flat.items():
        rows |= encode(name, streams[name], x if len(at) == len(x) else mx.take(x, picked, axis=0))
    return rows


def _check(writer: ShardWriter, streams: dict[str, Stream], again: dict[str, np.ndarray]) -> None:
    """What is computed anew must be what is stored: the same text, the same model."""
    n = min(_CHECKED, len(again[TOKENS]))
    again = {name: a[len(a) - n :] for name, a in again.items()}
    stored = writer.last_rows(n)
    n = len(stored[TOKENS])
    again = {name: a[len(a) - n :] for name, a in again.items()}
    if not np.array_equal(stored[TOKENS], again[TOKENS]):
        raise ValueError(
            f"[harvest] to go on in {writer.directory}, the text must be the same but other tokens stand where the "
            "last shard ends."
        )
    for name, stream in streams.items():
        a, b = (to_float32(name, stream, rows) for rows in (stored, again))
        finite = np.isfinite(a)
        same = np.array_equal(finite, np.isfinite(b))
        a, b = np.where(finite, a, 0), np.where(finite, b, 0)
        # Another machine may round differently; another model differs by far more.
        if not same or not np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(a):
            raise ValueError(
                f"[harvest] to go on in {writer.directory}, the model must be the same but its activations at {name} "
                "are not those where the last shard ends."
            )


class _ahead:
    """Iterates over what a thread takes from an iterator ahead of time, in its order; ends the thread on exit."""

    _END = object()

    def __init__(self, items: Iterable[T], depth: int = _AHEAD) -> None:
        self._items, self._queue = items, queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlxsae-tokens", daemon=True)

    def __enter__(self) -> Iterator[Any]:
        self._thread.start()
        return self._taken()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def _run(self) -> None:
        last: Any = self._END
        try:
            for item in self._items:
                self._queue.put(item)
                if self._stopped.is_set():
                    break
        except BaseException as e:
            last = e
        self._queue.put(last)

    def _taken(self) -> Iterator[Any]:
        while (item := self._queue.get()) is not self._END:
            if isinstance(item, BaseException):
                raise item
            yield item
