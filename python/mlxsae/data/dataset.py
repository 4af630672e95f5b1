"""``ActivationDataset``: activations at one or several hook points, larger than memory or at hand."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxsae.data.encoding import Stream, encode
from mlxsae.data.reader import BLOCK_BYTES, ArrayStore, BlockReader, Store
from mlxsae.data.shards import TOKENS, ShardSet, ShardWriter
from mlxsae.data.statistics import Moments, Statistics

if TYPE_CHECKING:
    from mlxsae.lm import LanguageModel

SHARD_BYTES = 128 << 20
_CHUNK = 8192


class ActivationDataset:
    """Rows of activations: for each token one row at every hook point.

    Make one with :meth:`from_texts`, :meth:`from_huggingface`, :meth:`curate`, :meth:`from_arrays`, or open a folder
    with :meth:`open`. Read it with :meth:`batches`, or train on :meth:`source`. ``dataset[begin:end]`` is a part of
    it, by the order on disk, such as ``dataset[:-50_000]`` to hold rows out.

    Shards on disk hold rows in random order within each shard, and an epoch draws blocks of ``block_rows``
    neighbours from all shards in random order: a batch is a random sample of ``batch_size / block_rows`` shards.
    Memory holds a few batches, whatever the size of the set.
    """

    def __init__(self, store: Store, *, rows: tuple[int, int] | None = None, owner: Any = None) -> None:
        self._store = store
        self._rows = rows or (0, store.rows)
        self._owner = owner  # what must live as long as we do: a temporary folder

    @classmethod
    def open(cls, directory: str | os.PathLike) -> ActivationDataset:
        """The dataset in a folder, as far as it is written.

        Raises
        ------
        FileNotFoundError : no dataset there, or a shard is missing.
        ValueError : a damaged index, shards that are not as it says, or none yet.
        """
        store = ShardSet(directory)
        if store.rows == 0:
            raise ValueError(
                f"[activations] {directory} must hold at least one complete shard but has none yet."
            )
        return cls(store)

    @classmethod
    def from_texts(
        cls,
        model: LanguageModel | str | os.PathLike,
        texts: Iterable[Any],
        *,
        layer: int | Sequence[int] | None = None,
        component: str | Sequence[str] = "mlp",
        hook_points: Any = None,
        cache_dir: str | os.PathLike | None = None,
        max_samples: int | None = 1_000_000,
        shuffle: bool = True,
        seed: int = 0,
        context_size: int = 256,
        lm_batch_size: int = 16,
        split: str | None = None,
        heldout_fraction: float = 0.1,
        recipe: dict[str, Any] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> ActivationDataset:
        """Activations of ``texts``, from one forward pass for all hook points.

        Parameters
        ----------
        model : LanguageModel, or what ``lm.load`` takes.
        texts : iterable of str, or of rows of a dataset that have a "text"
            Needs to be one that can be walked again, such as a list, only to go on with an interrupted folder
            within one process.
        layer, component : one or several each
            Every component of every layer: ``mlp``, ``attn``, ``residual``, ``output``, or a site such as
            ``mlp_in``; for a transcoder take ``("mlp_in", "mlp_out")``.
        hook_points : in place of both, one or several, any spellings that name the layer.
        cache_dir : where the shards go. The same call goes on with what is there, or uses it as it is. By default a
            temporary folder that is gone with the dataset.
        max_samples : at most so many tokens.
        shuffle : walk through the texts in random order (in a buffer of 10,000).
        context_size, lm_batch_size, split, heldout_fraction : see ``lm.token_batches``.
        options : ``dtype``, ``shard_bytes``, ``min_norm``, ``max_norm_ratio``, ``origin`` of
            :func:`~mlxsae.data.harvest.harvest`.
        """
        from mlxsae import lm as lm_room
        from mlxsae.data.harvest import harvest

        if isinstance(texts, str):
            raise ValueError("[from_texts] texts must be an iterable of documents but got one str.")
        model = _language_model(model)
        points = hook_points_of(layer, component, hook_points)
        batching: dict[str, Any] = {
            "context_size": context_size,
            "batch_size": lm_batch_size,
            "split": split,
            "heldout_fraction": heldout_fraction,
            "seed": seed if shuffle else None,
        }
        documents = lm_room.Documents(texts)
        owner = None
        if cache_dir is None:
            owner = tempfile.TemporaryDirectory(prefix="mlxsae-activations-")
            cache_dir = owner.name
        harvest(
            model,
            points,
            lambda: lm_room.token_batches(model, documents, **batching),
            cache_dir,
            max_rows=max_samples,
            seed=seed,
            recipe={"text": (recipe or {}) | _digest(texts), "batching": batching},
            progress=progress,
            **options,
        )
        made = cls.open(cache_dir)
        made._owner = owner
        return made

    @classmethod
    def from_huggingface(
        cls,
        model: LanguageModel | str | os.PathLike,
        dataset_name: str,
        *,
        text_field: str | None = None,
        max_samples: int | None = 10_000_000,
        streaming: bool = True,
        **options: Any,
    ) -> ActivationDataset:
        """As :meth:`from_texts`, of the dataset's "train" split: ``name`` or ``name:config`` on the Hugging Face hub
        (needs the package ``datasets``), or a local file or folder of text. Streamed: one document at a time is
        held, with ``streaming=False`` all.
        """
        from mlxsae.lm import Documents

        texts: Iterable[str] = Documents(dataset_name, text_field)
        if not streaming:
            texts = list(texts)
        recipe = {"source": os.fspath(dataset_name), "text_field": text_field}
        return cls.from_texts(model, texts, max_samples=max_samples, recipe=recipe, **options)

    @classmethod
    def from_arrays(
        cls,
        arrays: mx.array | np.ndarray | Mapping[str, mx.array | np.ndarray],
        *,
        cache_dir: str | os.PathLike | None = None,
        dtype: str = "float32",
        shard_bytes: int = SHARD_BYTES,
        seed: int = 0,
    ) -> ActivationDataset:
        """Activations that are at hand: ``[n, d]``, or several by name, whose rows belong together.

        They are used where they are, memory-mapped arrays too, and every batch is drawn from all rows. With
        ``cache_dir`` they are written there as shards, in ``dtype``.
        """
        store = ArrayStore(arrays if isinstance(arrays, Mapping) else {"x": arrays})
        if cache_dir is None:
            return cls(store)
        source = cls(store)
        streams = {name: Stream(s.d, dtype) for name, s in store.streams.items()}
        rows = max(1, shard_bytes // sum(s.row_bytes for s in streams.values()))
        content = hashlib.blake2b(digest_size=16)
        for batch in source.batches(_CHUNK, hook_points=list(streams), shuffle=False):
            for x in batch.values():
                content.update(np.array(x.astype(mx.float32)).tobytes())
        identity = {"arrays": content.hexdigest()}
        with ShardWriter(
            cache_dir, streams, shard_rows=rows, seed=seed, tokens=False, identity=identity
        ) as writer:
            if not writer.complete:
                start = writer.resume() or {"batch": 0, "row": 0}
                chunks = source.batches(_CHUNK, hook_points=list(streams), shuffle=False)
                for number, batch in enumerate(chunks):
                    if number < start["batch"]:
                        continue
                    first = start["row"] if number == start["batch"] else 0
                    fields: dict[str, np.ndarray] = {}
                    for name, x in batch.items():
                        fields |= encode(name, streams[name], x[first:])
                    writer.append(fields, batch=number, row=first)
                writer.finish(exhausted=True)
        return cls.open(cache_dir)

    @classmethod
    def curate(
        cls,
        model: LanguageModel | str | os.PathLike,
        source: str | os.PathLike | Iterable[Any],
        *,
        layer: int | None = None,
        component: str = "mlp",
        hook_point: Any = None,
        diversity_metric: str | None = "activation_variance",
        max_samples: int = 1_000_000,
        min_activation_norm: float = 0.1,
        deduplicate: bool | str = True,
        candidates: float = 4.0,
        text_field: str | None = None,
        context_size: int = 256,
        lm_batch_size: int = 16,
        **options: Any,
    ) -> ActivationDataset:
        """Activations of the most diverse texts of ``source``.

        Texts are read until they have ``candidates * max_samples`` tokens, without repetitions; those are kept whose
        activations vary most (:func:`~mlxsae.data.curation.select_texts` says exactly how), as many as
        ``max_samples`` tokens take; then as :meth:`from_texts`, without tokens whose norm is below
        ``min_activation_norm``.

        Parameters
        ----------
        source : a Hugging Face name, a file or folder, or texts. The texts of the candidates are held in memory.
        hook_point : in place of ``layer`` and ``component``.
        diversity_metric : "activation_variance", or None to keep the first texts.
        deduplicate : True drops exact repetitions, "near" near ones too, False none.
        """
        from mlxsae.data.curation import select_texts
        from mlxsae.lm import Documents

        model = _language_model(model)
        point = hook_points_of(layer, component, None if hook_point is None else [hook_point])[0]
        named = isinstance(source, (str, os.PathLike))
        how = {
            "diversity_metric": diversity_metric,
            "deduplicate": deduplicate,
            "candidates": candidates,
            "max_samples": max_samples,
        }
        chosen = select_texts(
            model,
            Documents(source, text_field),
            point,
            max_tokens=max_samples,
            metric=diversity_metric,
            deduplicate=deduplicate,
            candidates=candidates,
            context_size=context_size,
            batch_size=lm_batch_size,
        )
        recipe = {"curated": how} | ({"source": os.fspath(source), "text_field": text_field} if named else {})
        return cls.from_texts(
            model,
            chosen,
            hook_points=[point],
            max_samples=max_samples,
            min_norm=min_activation_norm,
            context_size=context_size,
            lm_batch_size=lm_batch_size,
            recipe=recipe,
            **options,
        )

    def __len__(self) -> int:
        """Rows."""
        return self._rows[1] - self._rows[0]

    def __getitem__(self, part: slice) -> ActivationDataset:
        """Neighbouring rows, by the order on disk, as a dataset that shares the storage."""
        if not isinstance(part, slice):  # Python would also walk through us by index
            raise TypeError(
                f"[activations] a part must be a slice of rows but got {type(part).__name__}; batches() gives the rows."
            )
        begin, end, step = part.indices(len(self))
        if step != 1 or begin >= end:
            raise ValueError(
                f"[activations] a part must be neighbouring rows of {len(self):,}, at least one, but got {part}."
            )
        rows = (self._rows[0] + begin, self._rows[0] + end)
        return ActivationDataset(self._store, rows=rows, owner=self._owner)

    def __repr__(self) -> str:
        streams = ", ".join(f"{name}: {s.d} {s.dtype}" for name, s in self._store.streams.items())
        return f"ActivationDataset({len(self):,} rows; {streams})"

    @property
    def hook_points(self) -> list[str]:
        """Names of the streams, in TransformerLens' spelling; of arrays as they were given."""
        return list(self._store.streams)

    @property
    def metadata(self) -> dict[str, Any]:
        """What the folder says of its making: ``recipe``, ``complete``, ``exhausted`` and so on; {} for arrays."""
        return dict(self._store.index) if isinstance(self._store, ShardSet) else {}

    @property
    def directory(self) -> Path | None:
        """Where the shards are; None for arrays."""
        return self._store.directory if isinstance(self._store, ShardSet) else None

    def d(self, hook_point: Any = None) -> int:
        """Width of the activations."""
        return self._store.streams[self.name_of(hook_point)].d

    def block_rows(self, *names: str) -> int:
        """Neighbours on disk that an epoch keeps together: 256 KiB of the widest stream. 1 for arrays."""
        if isinstance(self._store, ArrayStore):
            return 1
        return max(1, BLOCK_BYTES // max(self._store.streams[name].row_bytes for name in names))

    def name_of(self, hook_point: Any = None) -> str:
        """The stream that any spelling of its hook point means; None means the only one.

        Raises
        ------
        ValueError : there is no such stream, or several to choose from; lists those there are.
        """
        streams = self._store.streams
        there = ", ".join(streams)
        if hook_point is None:
            if len(streams) > 1:
                raise ValueError(f"[activations] hook_point must be given, one of {there}.")
            return next(iter(streams))
        if isinstance(hook_point, str) and hook_point in streams:
            return hook_point
        from mlxsae.lm import HookPoint

        try:
            name = str(HookPoint.parse(hook_point))
        except ValueError:
            name = str(hook_point)
        if name not in streams:
            raise ValueError(f"[activations] hook_point must be one of {there} but got {hook_point!r}.")
        return name

    def batches(
        self,
        batch_size: int,
        *,
        hook_points: Any = None,
        shuffle: bool = True,
        seed: int = 0,
        epochs: float = 1,
        block_rows: int | None = None,
        tokens: bool = False,
    ) -> Iterator[Any]:
        """Batches of ``batch_size`` rows, the last one shorter.

        Parameters
        ----------
        hook_points : one, or several, read together
            Any spelling. A pair ``(in, out)`` means ``(x, y)``, for a transcoder. By default the only one.
        shuffle : in a random order of each epoch's own; otherwise as on disk.
        epochs : may be a fraction, or infinite.
        block_rows : in place of :meth:`block_rows`.
        tokens : also the token of each row, int32.

        Yields
        ------
        array ``[n, d]``, or a pair of them, for one hook point or pair; for a list of them ``{name: array or pair}``
        with the names as in :attr:`hook_points`, that of a pair being its input's. With ``tokens`` always a dict.
        """
        one = hook_points is None or not isinstance(hook_points, list)
        asked: Any = [hook_points] if one else hook_points
        wanted = [self._spec(spec) for spec in asked]
        keys = [spec[0] if isinstance(spec, tuple) else spec for spec in wanted]
        if len(set(keys)) < len(keys):
            raise ValueError(
                "[activations] each hook point and the input of each pair must be given once but got "
                f"{', '.join(keys)}."
            )
        names = [name for spec in wanted for name in (spec if isinstance(spec, tuple) else (spec,))]
        if tokens and not (isinstance(self._store, ShardSet) and self._store.has_tokens):
            raise ValueError("[activations] tokens must be stored to be read but this dataset has none.")
        reader = self._reader(
            [*names, *([TOKENS] if tokens else [])], batch_size, shuffle, seed, epochs, block_rows
        )
        while (batch := reader.next_batch()) is not None:
            found = {
                spec[0] if isinstance(spec, tuple) else spec: (
                    (batch[spec[0]], batch[spec[1]]) if isinstance(spec, tuple) else batch[spec]
                )
                for spec in wanted
            }
            if tokens:
                found[TOKENS] = batch[TOKENS]
            yield next(iter(found.values())) if one and not tokens else found

    def source(
        self,
        batch_size: int,
        *,
        hook_points: Any = None,
        seed: int = 0,
        epochs: float = math.inf,
        block_rows: int | None = None,
    ) -> DatasetSource:
        """What ``fit`` trains on: shuffled batches whose position can be saved and restored.

        ``hook_points`` is one, or a tuple of several, read together: batches are tuples of arrays in that order, such
        as ``(x, y)`` for ``("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")``.
        """
        several = isinstance(hook_points, (list, tuple)) and not _is_site_and_layer(hook_points)
        wanted: Any = hook_points if several else [hook_points]
        names = [self.name_of(point) for point in wanted]
        reader = self._reader(names, batch_size, True, seed, epochs, block_rows)
        return DatasetSource(reader, names, owner=self._owner)

    def statistics(self, hook_point: Any = None) -> Statistics:
        """Mean, variance and norms: of a whole folder from what its shards carry, of a part or of arrays from one walk
        over the rows.
        """
        name = self.name_of(hook_point)
        if isinstance(self._store, ShardSet) and self._rows == (0, self._store.rows):
            return self._store.statistics(name)
        total = Moments(self._store.streams[name].d)
        for x in self.batches(_CHUNK, hook_points=name, shuffle=False):
            total.update(np.array(x.astype(mx.float32)))
        return total.result()

    def verify(self) -> None:
        """Read every shard and compare its checksum. ``ValueError`` names the first that was changed or damaged."""
        if isinstance(self._store, ShardSet):
            self._store.verify()

    def _spec(self, spec: Any) -> str | tuple[str, str]:
        if isinstance(spec, tuple) and not _is_site_and_layer(spec):
            if len(spec) != 2:
                raise ValueError(f"[activations] a pair must be (in, out) but got {spec!r}.")
            return self.name_of(spec[0]), self.name_of(spec[1])
        return self.name_of(spec)

    def _reader(
        self,
        names: Sequence[str],
        batch_size: int,
        shuffle: bool,
        seed: int,
        epochs: float,
        block_rows: int | None,
    ) -> BlockReader:
        return BlockReader(
            self._store,
            names,
            batch_size=batch_size,
            block_rows=block_rows or self.block_rows(*(n for n in names if n != TOKENS)),
            rows=self._rows,
            shuffle=shuffle,
            seed=seed,
            epochs=epochs,
        )


class DatasetSource:
    """An :class:`~mlxsae.data.ActivationSource` over a dataset. ``names`` says what the arrays of a batch are."""

    def __init__(self, reader: BlockReader, names: Sequence[str], *, owner: Any = None) -> None:
        self._reader, self.names = reader, tuple(names)
        self._owner = owner  # as of the dataset, which nobody else may hold

    @property
    def rows(self) -> int:
        """Rows of one epoch."""
        return self._reader.rows

    def next_batch(self) -> tuple[mx.array, ...] | None:
        batch = self._reader.next_batch()
        return None if batch is None else tuple(batch[name] for name in self.names)

    def sample(self, n: int) -> tuple[mx.array, ...]:
        batch = self._reader.sample(n)
        return tuple(batch[name] for name in self.names)

    def state(self) -> tuple[dict[str, Any], dict[str, mx.array]]:
        return self.cursor, {}

    def restore(self, position: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> None:
        self.cursor = position

    @property
    def cursor(self) -> dict[str, Any]:
        """The position as plain JSON; setting it goes there, at once."""
        return self._reader.cursor | {"streams": list(self.names)}

    @cursor.setter
    def cursor(self, position: Mapping[str, Any]) -> None:
        if position.get("streams") != list(self.names):
            raise ValueError(
                f"[activations] to resume, streams must be {position.get('streams')} but got {list(self.names)}."
            )
        self._reader.cursor = position


def hook_points_of(
    layer: int | Sequence[int] | None, component: str | Sequence[str], hook_points: Any
) -> list[Any]:
    """Every component of every layer, or the hook points given."""
    from mlxsae.lm import HookPoint
    from mlxsae.lm.hook_point import listed

    if hook_points is not None:
        if layer is not None:
            raise ValueError("[activations] hook_points or layer must be given but got both.")
        return listed(hook_points)
    layers: list[Any] = [layer] if layer is None or isinstance(layer, int) else list(layer)
    components = [component] if isinstance(component, str) else list(component)
    return list(dict.fromkeys(HookPoint.parse(c, layer=number) for number in layers for c in components))


def _language_model(model: Any) -> LanguageModel:
    from mlxsae.lm import LanguageModel, load

    if isinstance(model, (str, os.PathLike)):
        return load(model)
    model = getattr(model, "lm", model)  # an InterpretableModel, or the like
    if not isinstance(model, LanguageModel):
        raise ValueError(
            f"[activations] model must be a LanguageModel, a path or a name but got {type(model).__name__}."
        )
    return model


def _digest(texts: Iterable[Any]) -> dict[str, Any]:
    """What tells one list of texts from another; a stream has nothing to be told by but its tokens."""
    if not isinstance(texts, (list, tuple)):
        return {}
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        raw = str(text).encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return {"texts": len(texts), "digest": digest.hexdigest()}


def _is_site_and_layer(spec: Any) -> bool:
    """Whether a tuple is one hook point, such as ("mlp", 3)."""
    return isinstance(spec, tuple) and len(spec) == 2 and any(isinstance(part, int) for part in spec)
