"""Activations on disk: a folder of safetensors shards that grows, survives any interruption, and can be checked.

``dataset.json``            streams, recipe, and for each shard its rows, bytes, SHA-256 and where it ends in
                            the text; what it does not list does not exist
``shard_00000.safetensors`` for each stream its rows (``NAME``, with ``NAME.scales`` for int8), ``tokens`` (the
                            token of each row), and the rows' moments (``NAME.mean`` and so on, float32)

Rows are shuffled within their shard when it is written, so that neighbours on disk are strangers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Self

import mlx.core as mx
import numpy as np

from mlxsae.data.encoding import Stream, to_float32
from mlxsae.data.statistics import Moments, Statistics
from mlxsae.io import arrays as array_files
from mlxsae.io import atomic

INDEX, TOKENS = "dataset.json", "tokens"
FORMAT, FORMAT_VERSION = "mlxsae-activations", 1
_WRITE_BYTES = 512 << 10  # gathered, measured, hashed and written while they are in a core's cache
_OPEN_FILES = 64
_MOMENTS = ("mean", "scatter", "norms")
_INDEX_HAS: dict[str, type] = {
    "format_version": int,
    "streams": dict,
    "shard_rows": int,
    "recipe": dict,
    "origin": dict,
    "complete": bool,
    "exhausted": bool,
    "shards": list,
}
_SHARD_HAS: dict[str, type] = {"file": str, "rows": int, "bytes": int, "sha256": str, "end": dict}


def _folder(directory: str | os.PathLike) -> Path:
    """Where ``directory`` is, ``~`` being home, whatever the working directory becomes."""
    return Path(directory).expanduser().absolute()


def read_index(directory: str | os.PathLike) -> dict[str, Any] | None:
    """What ``directory`` says of itself; None where it is no dataset (yet).

    Raises
    ------
    ValueError : a damaged index, or one of another make or of a later version.
    """
    path = _folder(directory) / INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"[activations] {path} must be JSON but is damaged: {e}.") from e
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"[activations] {path} must be written by mlxsae but is not.")
    version = index.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"[activations] format_version must be at most {FORMAT_VERSION} but got {version}; update mlxsae."
        )
    _must_have(path, "the index", index, _INDEX_HAS)
    for name, stream in index["streams"].items():
        _must_have(path, name, stream, {"d": int, "dtype": str})
    for number, shard in enumerate(index["shards"]):
        _must_have(path, f"shard {number}", shard, _SHARD_HAS)
    return index


def _must_have(path: Path, what: str, entry: Any, kinds: Mapping[str, type]) -> None:
    for key, kind in kinds.items():
        value = entry.get(key) if isinstance(entry, dict) else None
        if type(value) is not kind or (type(value) is int and value < 1):
            raise ValueError(
                f"[activations] {path} must be whole but {key} of {what} is {value!r}, not {kind.__name__}."
            )


def streams_of(index: dict[str, Any]) -> dict[str, Stream]:
    return {name: Stream(s["d"], s["dtype"]) for name, s in index["streams"].items()}


def _fields(streams: Mapping[str, Stream], tokens: bool) -> dict[str, tuple[mx.Dtype, int]]:
    """Every array with a row per token: type and width; ``tokens`` has none."""
    found: dict[str, tuple[mx.Dtype, int]] = {}
    for name, stream in streams.items():
        found |= stream.fields(name)
    return found | ({TOKENS: (mx.int32, 0)} if tokens else {})


def _moments_of(name: str, stream: Stream) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{moment}": (2,) if moment == "norms" else (stream.d,) for moment in _MOMENTS}


def _row_shape(width: int) -> tuple[int, ...]:
    return (width,) if width else ()


class ShardWriter:
    """Writes shards of ``shard_rows`` rows into ``directory``, after those that are there.

    A shard is written by a thread while the next one fills: memory holds two. Shard and index are each complete
    on disk, synced, before they take their names, the shard first: a crash at any moment costs at most the rows
    since the last shard, and nothing that the index lists. One writer a folder; others are refused.

    ``identity`` is what a folder must have been made with to be continued; ``origin`` is kept beside it, and not
    compared.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        streams: Mapping[str, Stream],
        *,
        shard_rows: int,
        seed: int = 0,
        tokens: bool = True,
        identity: Mapping[str, Any] | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        if TOKENS in streams:
            raise ValueError(f"[activations] a stream must not be called {TOKENS!r}.")
        if not streams or shard_rows < 1:
            raise ValueError(
                "[activations] there must be at least one stream and one row a shard but got "
                f"{len(streams)} and {shard_rows}."
            )
        self.directory = _folder(directory)
        self._streams = dict(streams)
        self._spec = _fields(streams, tokens)
        self._shard_rows, self._seed = shard_rows, seed
        made = {
            "streams": {name: {"d": s.d, "dtype": s.dtype} for name, s in streams.items()},
            "shard_rows": shard_rows,
            "seed": seed,
            "recipe": dict(identity or {}),
        }
        self._made: dict[str, Any] = json.loads(json.dumps(made))
        self._origin = dict(origin or {})
        self._index: dict[str, Any] = {}
        self._lock = -1
        self._filling = self._writing = {}
        self._held = self._rows = 0
        self._job: Future[None] | None = None
        self._reopened = False  # the index on disk still says what a finished folder said

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._index = self._open()
            self._rows = self._index_rows()
        except BlockingIOError:
            os.close(self._lock)
            raise RuntimeError(
                f"[activations] {self.directory} must have one writer but another one is at work."
            ) from None
        except BaseException:
            os.close(self._lock)
            raise
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlxsae-shards")
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()  # a shard being written is worth keeping, whatever ends the block
        os.close(self._lock)

    @property
    def rows(self) -> int:
        """Rows taken in so far, those of earlier writers included."""
        return self._rows

    @property
    def complete(self) -> bool:
        """Whether an earlier writer finished the folder."""
        return self._index["complete"]

    @property
    def exhausted(self) -> bool:
        """Whether it finished because its input had ended."""
        return self._index["exhausted"]

    def resume(self) -> dict[str, int] | None:
        """Where the last full shard ends in the input, as :meth:`append` was told; None at the beginning.

        A shorter last one, which only a finished folder has, will be written again, longer. It stays listed until
        the longer one is there to take its place.
        """
        shards = self._index["shards"]
        if shards and shards[-1]["rows"] < self._shard_rows:
            self._index |= {"shards": shards[:-1]}
        if self.complete:
            self._index |= {"complete": False, "exhausted": False}
            self._reopened = True
        self._rows = self._index_rows()
        return self._index["shards"][-1]["end"] if self._index["shards"] else None

    def last_rows(self, n: int) -> dict[str, np.ndarray]:
        """The last ``n`` rows of the last shard, in the order in which they came."""
        shard = self._index["shards"][-1]
        place = np.argsort(self._permutation(len(self._index["shards"]) - 1, shard["rows"]))
        with ShardSet(self.directory, self._index) as stored:
            runs = np.stack([stored.rows - shard["rows"] + place[-n:], np.ones(len(place[-n:]), np.int64)], 1)
            found = {}
            for field, (dtype, width) in self._spec.items():
                shape = (len(runs), *_row_shape(width))
                found[field] = np.empty(shape, array_files.numpy_dtype(dtype))
                stored.read(field, runs, found[field])
        return found

    def append(self, rows: Mapping[str, np.ndarray], *, batch: int, row: int = 0) -> None:
        """Take in ``rows``, the bits of every field, which begin at ``row`` of ``batch`` of the input."""
        if self._job is not None and self._job.done():
            self._wait()  # a full disk is heard of now, and not a shard later
        n = len(next(iter(rows.values())))
        at = 0
        while at < n:
            if self._held == 0:
                self._filling = {
                    field: np.empty((self._shard_rows, *_row_shape(width)), array_files.numpy_dtype(dtype))
                    for field, (dtype, width) in self._spec.items()
                }
            take = min(n - at, self._shard_rows - self._held)
            for field, buffer in self._filling.items():
                buffer[self._held : self._held + take] = rows[field][at : at + take]
            self._held += take
            self._rows += take
            at += take
            self._end = {"batch": batch, "row": row + at}
            if self._held == self._shard_rows:
                self._flush()

    def finish(self, *, exhausted: bool) -> None:
        """Write what is held, as a last and shorter shard, and mark the folder complete."""
        end = {"complete": True, "exhausted": exhausted}
        if self._held:
            self._flush(end)
        self._wait()
        if not self.complete:  # there was nothing left to write
            self._index |= end
            self._write_index()

    def _open(self) -> dict[str, Any]:
        for leftover in self.directory.glob(".*.tmp"):  # of a writer that was killed: we hold the lock
            leftover.unlink()
        index = read_index(self.directory)
        if index is None:
            others = sorted(p.name for p in self.directory.iterdir() if not p.name.startswith("shard_"))
            if others:
                raise ValueError(
                    f"[activations] {self.directory} must be empty or a dataset but holds {others[0]}."
                )
            index = {"format": FORMAT, "format_version": FORMAT_VERSION, **self._made}
            return index | {"origin": self._origin, "complete": False, "exhausted": False, "shards": []}
        _same(index, self._made, self.directory)
        return index

    def _index_rows(self) -> int:
        return sum(shard["rows"] for shard in self._index["shards"])

    def _flush(self, also: Mapping[str, Any] | None = None) -> None:
        self._wait()
        self._writing, rows = self._filling, self._held
        self._filling, self._held = {}, 0
        self._job = self._thread.submit(self._write, self._writing, rows, self._end, also or {})

    def _wait(self) -> None:
        if self._job is not None:
            job, self._job = self._job, None
            job.result()
        self._writing = {}

    def _permutation(self, number: int, rows: int) -> np.ndarray:
        return np.random.default_rng((self._seed, number)).permutation(rows)

    def _write(
        self, buffers: Mapping[str, np.ndarray], rows: int, end: dict[str, int], also: Mapping[str, Any]
    ) -> None:
        """In the thread: one shard, and the index that lists it and says ``also``."""
        number = len(self._index["shards"])
        name = f"shard_{number:05d}.safetensors"
        order = self._permutation(number, rows)
        moments = {name: Moments(stream.d) for name, stream in self._streams.items()}
        spec: dict[str, tuple[mx.Dtype, tuple[int, ...]]] = {
            field: (dtype, (rows, *_row_shape(width))) for field, (dtype, width) in self._spec.items()
        }
        for stream, s in self._streams.items():
            spec |= {name: (mx.float32, shape) for name, shape in _moments_of(stream, s).items()}

        def chunks(field: str) -> Iterator[np.ndarray]:
            if field not in buffers:
                stream, _, moment = field.rpartition(".")
                yield np.asarray(getattr(moments[stream], moment), np.float32)
                return
            buffer = buffers[field]
            step = max(1, _WRITE_BYTES * rows // max(buffer[:rows].nbytes, 1))
            for begin in range(0, rows, step):
                at = order[begin : begin + step]
                chunk = buffer.take(at, axis=0)
                if field in self._streams:
                    stream = self._streams[field]
                    parts = {f: chunk if f == field else buffers[f][at] for f in stream.fields(field)}
                    moments[field].update(to_float32(field, stream, parts))
                yield chunk

        write = array_files.chunked_writer(spec, chunks)
        seen = _Hashed()

        def hashed(file: BinaryIO) -> None:
            seen.file = file
            write(seen)  # type: ignore[arg-type]
            if self._reopened:  # before the shard that it lists gives way
                self._write_index()
                self._reopened = False

        shards = self._index["shards"]

        def index() -> dict[str, Any]:
            shard = {
                "file": name,
                "rows": rows,
                "bytes": seen.size,
                "sha256": seen.hash.hexdigest(),
                "end": end,
            }
            return self._index | {"shards": [*shards, shard], **also}

        try:
            # The shard takes its name first, and file systems with a journal keep to that order on disk.
            writers = {name: hashed, INDEX: lambda file: atomic.json_writer(index())(file)}
            atomic.write_files(self.directory, writers)
            self._index = index()
        except OSError as e:
            error = OSError(
                f"[activations] {self.directory / name} must be written whole but the system says: "
                f"{e.strerror or e}. The {len(shards)} shards before it ({self._index_rows():,} rows) are complete; "
                "make room and run it again to go on."
            )
            error.errno = e.errno
            raise error from e

    def _write_index(self) -> None:
        atomic.write_files(self.directory, {INDEX: atomic.json_writer(self._index)})


class _Hashed:
    """A file that counts and hashes what is written to it."""

    def __init__(self) -> None:
        self.file: Any = None
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)


def _same(index: dict[str, Any], mine: dict[str, Any], directory: Path, path: str = "") -> None:
    for key, value in mine.items():
        made = index.get(key)
        if isinstance(value, dict) and isinstance(made, dict) and (path or key != "streams"):
            _same(made, value, directory, f"{path}{key}.")
        elif made != value:
            raise ValueError(
                f"[activations] to go on in {directory}, {path}{key} must be {made!r} but got {value!r}; "
                "choose another folder."
            )


class _Descriptor:
    """An open file that closes when nobody holds it: one thread may drop it while another still reads."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class ShardSet:
    """The rows of a folder's shards as one sequence, in their order on disk.

    Reads are positional, so any number of threads may read at once; at most 64 files are open.

    Raises
    ------
    FileNotFoundError : no dataset there, or a shard is missing.
    ValueError : a damaged index, a shard that is not as the index says.
    """

    def __init__(self, directory: str | os.PathLike, index: dict[str, Any] | None = None) -> None:
        self.directory = _folder(directory)
        index = index or read_index(directory)
        if index is None:
            raise FileNotFoundError(f"[activations] {self.directory} must hold {INDEX} but does not.")
        self.index = index
        self.streams = streams_of(index)
        self._shards: list[dict[str, Any]] = index["shards"]
        self._begins = np.cumsum([0, *(shard["rows"] for shard in self._shards)])
        self.rows = int(self._begins[-1])
        self._files: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()
        self._headers: dict[int, dict[str, array_files.Entry]] = {}
        for shard in self._shards:
            path = self.directory / shard["file"]
            if not path.is_file():
                raise FileNotFoundError(
                    f"[activations] {path} must exist, for {INDEX} lists it, but does not."
                )
            if path.stat().st_size != shard["bytes"]:
                raise ValueError(
                    f"[activations] {path} must have {shard['bytes']} bytes but has {path.stat().st_size}."
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the open files; reading opens them again."""
        with self._lock:
            self._files.clear()

    @property
    def shard_rows(self) -> list[int]:
        return np.diff(self._begins).tolist()

    @property
    def has_tokens(self) -> bool:
        return bool(self._shards) and TOKENS in self._header(0)

    def spec(self, stream: str) -> dict[str, tuple[mx.Dtype, int]]:
        """The fields of a stream, or of ``tokens``."""
        return {TOKENS: (mx.int32, 0)} if stream == TOKENS else self.streams[stream].fields(stream)

    def read(self, field: str, runs: np.ndarray, out: np.ndarray) -> None:
        """Fill ``out`` with rows of a field: ``runs [m, 2]`` holds first row and number of each run. No run
        may cross a shard's end."""
        where = np.searchsorted(self._begins, runs[:, 0], side="right") - 1
        size = out.itemsize * int(np.prod(out.shape[1:], dtype=np.int64))
        memory = out.reshape(-1).view(np.uint8).data
        at = 0
        for shard, first, rows in zip(
            where.tolist(), (runs[:, 0] - self._begins[where]).tolist(), runs[:, 1].tolist(), strict=True
        ):
            entry = self._header(shard)[field]
            self._read(shard, entry.offset + first * size, memory[at : at + rows * size])
            at += rows * size

    def map(self, shard: int, field: str) -> np.ndarray:
        """A field of one shard as a read-only memory map ``[rows, width]``, 16-bit floats as ``uint16``."""
        entry = self._header(shard)[field]
        path = self.directory / self._shards[shard]["file"]
        kind = array_files.numpy_dtype(entry.dtype)
        return np.memmap(path, dtype=kind, mode="r", offset=entry.offset, shape=entry.shape)

    def statistics(self, stream: str) -> Statistics:
        """Merged from those that the shards carry: no activation is read."""
        total = Moments(self.streams[stream].d)
        for number, shard in enumerate(self._shards):
            parts = []
            for moment in _MOMENTS:
                entry = self._header(number)[f"{stream}.{moment}"]
                part = np.empty(entry.shape, np.float32)
                self._read(number, entry.offset, part.view(np.uint8).data)
                parts.append(part.astype(np.float64))
            total.merge(shard["rows"], *parts)
        return total.result()

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read everything once and compare the checksums; ``progress`` hears of each shard's bytes.

        Raises
        ------
        ValueError : names the first shard whose bytes are not those that were written.
        """
        for shard in self._shards:
            with open(self.directory / shard["file"], "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard["sha256"]:
                raise ValueError(
                    f"[activations] {self.directory / shard['file']} must have the SHA-256 {shard['sha256']} "
                    f"but has {digest}: it was changed or damaged."
                )
            if progress is not None:
                progress(shard["bytes"])

    def _header(self, shard: int) -> dict[str, array_files.Entry]:
        if shard not in self._headers:
            path, rows = self.directory / self._shards[shard]["file"], self._shards[shard]["rows"]
            header = array_files.entries(path)
            for name, stream in self.streams.items():
                fields = {f: (dtype, (rows, width)) for f, (dtype, width) in stream.fields(name).items()}
                fields |= {m: (mx.float32, shape) for m, shape in _moments_of(name, stream).items()}
                for field, (dtype, shape) in fields.items():
                    found = header.get(field)
                    if found is None or (found.dtype, found.shape) != (dtype, shape):
                        got = "has none" if found is None else f"has {found.dtype} {list(found.shape)}"
                        raise ValueError(
                            f"[activations] {path} must have {field} as {dtype} {list(shape)}, as {INDEX} says, but {got}."
                        )
            self._headers[shard] = header
        return self._headers[shard]

    def _read(self, shard: int, offset: int, memory: memoryview) -> None:
        with self._lock:
            file = self._files.pop(shard, None) or _Descriptor(self.directory / self._shards[shard]["file"])
            self._files[shard] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        while memory:
            got = os.preadv(file.number, [memory], offset)
            if got <= 0:
                raise OSError(
                    f"[activations] {self._shards[shard]['file']} must hold byte {offset} but ends."
                )
            memory, offset = memory[got:], offset + got
