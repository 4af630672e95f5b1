"""From text to a trained SAE, transcoder or crosscoder, in one call: three doors to :func:`~mlxsae.train.fit`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsae import lm as lm_room
from mlxsae.data import (
    ActivationSource,
    ArraySource,
    Chunk,
    ContextActivations,
    ModelActivations,
    ShuffleBuffer,
)
from mlxsae.data.source import rows_in, valid_rows
from mlxsae.io import native
from mlxsae.lm import Documents, HookPoint, LanguageModel, TokenBatch
from mlxsae.lm.hook_point import SITES
from mlxsae.loss import END_TO_END, Loss
from mlxsae.train.callbacks import Callback, as_callback, listed
from mlxsae.train.config import (
    CrosscoderConfig,
    CrossLayerConfig,
    DataConfig,
    SAEConfig,
    TrackingConfig,
    TrainConfig,
    TranscoderConfig,
    overruled,
)
from mlxsae.train.loop import FitResult, Job, fit, fit_many
from mlxsae.train.tracking import (
    LocalTracker,
    TensorBoardCallback,
    TrackingCallback,
    WandbCallback,
)

_CONTEXT, _EPOCHS = 256, 10
_BUFFER_TOKENS, _BUFFER_BYTES = 131_072, 2**30
_LENGTHS = ("num_epochs", "epochs", "total_tokens", "num_activations")


def train_sae(
    model: Any,
    layer: int | None = None,
    component: str = "mlp",
    dataset: Any = None,
    save_path: str | os.PathLike | None = None,
    config: SAEConfig | None = None,
    **options: Any,
) -> Any:
    """Train an SAE on the activations of a language model at one hook point.

    Parameters
    ----------
    model : what ``mlxsae.lm.load`` takes, a ``LanguageModel``, or a facade with one in ``lm``.
    layer, component : ``mlp``, ``attn``, ``residual`` (also ``output``: the stream after the block), or a site of
        ``HookPoint``; in their place ``hook_point``, such as ``blocks.10.hook_resid_post``.
    dataset : texts (a list of str, or of objects with a ``text``; a file, folder or hub dataset by name), an
        ``ActivationDataset``, an :class:`~mlxsae.data.ActivationSource`, or an array ``[n, d_in]`` (a pair ``(x, y)`` of
        them for what predicts another activation).
    save_path : where to save it, as by ``mlxsae.io.save``.
    config : by default ``SAEConfig()``, with at most ten walks through the texts.
    options : ``callbacks``, ``checkpoint_dir``, ``resume``, ``progress`` (True), ``profile`` go to
        :func:`~mlxsae.train.fit`; ``text_field`` says where an object keeps its text; any other is a flat name of
        configuration (:mod:`mlxsae.train.flat_names`), such as ``k``, ``learning_rate`` or ``use_wandb``, and overrules
        ``config``.

    Returns
    -------
    SAE
        For raw activations. Its ``metadata`` name model, hook point and training.

    Padding, BOS and special tokens are left out. Nothing but checkpoints and the result is stored on disk. Documents held
    out for validation (``config.data.validation_split``) are not trained on; of stored activations and arrays these are
    the last rows.
    """
    return SAETrainer(of_kind(SAEConfig, config)).train(
        model, layer, component, dataset, save_path=save_path, **options
    )


def train_saes(
    model: Any,
    layers: Sequence[int],
    component: str = "mlp",
    dataset: Any = None,
    save_path: str | os.PathLike | None = None,
    config: SAEConfig | None = None,
    **options: Any,
) -> dict[int, Any]:
    """Train an SAE for each of ``layers`` from one forward pass of the model: each as :func:`train_sae` trains it alone.

    Returns ``{layer: SAE}``, saved in ``save_path/layer_<n>``; the rest as in :func:`train_sae`. Callbacks of ours are copied
    for each (:meth:`~mlxsae.train.Callback.of`), those of one's own see all.
    """
    if not list(layers):
        raise ValueError("[train_saes] layers must name at least one but got none.")
    return SAETrainer(of_kind(SAEConfig, config)).train(
        model, None, component, dataset, save_path=save_path, each_of=list(layers), **options
    )


def train_transcoder(
    model: Any,
    from_layer: int | None = None,
    to_layer: int | None = None,
    component: str | None = None,
    dataset: Any = None,
    save_path: str | os.PathLike | None = None,
    config: TranscoderConfig | None = None,
    *,
    layer: int | None = None,
    from_component: str | None = None,
    to_component: str | None = None,
    **options: Any,
) -> Any:
    """Train a transcoder, which reads one activation and predicts another; the rest as in :func:`train_sae`.

    ``from_layer=10, to_layer=11, component="mlp"``: the same component of two layers. ``from_component`` and
    ``to_component`` differ where both are given. ``layer=10`` alone: what the MLP of a block reads (``mlp_in``) to what it
    adds to the stream (``mlp``), as circuit tracing needs it. The target must not be computed before the input.
    """
    return SAETrainer(of_kind(TranscoderConfig, config)).train(
        model,
        layer,
        component,
        dataset,
        save_path=save_path,
        from_layer=from_layer,
        to_layer=to_layer,
        from_component=from_component,
        to_component=to_component,
        **options,
    )


def train_crosscoder(
    model: Any,
    layer: int | None = None,
    components: Sequence[str] | None = None,
    dataset: Any = None,
    save_path: str | os.PathLike | None = None,
    config: CrosscoderConfig | None = None,
    *,
    layers: Sequence[int] | None = None,
    component: str | None = None,
    models: Sequence[Any] = (),
    **options: Any,
) -> Any:
    """Train a crosscoder, one dictionary for several activations; the rest as in :func:`train_sae`.

    ``layer=10, components=["mlp", "attn"]``, or ``layers=[8, 10, 12], component="mlp"``. ``models`` are further models of
    the same tokenizer, which read the same tokens at the same hook points: sources are those of ``model``, then theirs.
    """
    return SAETrainer(of_kind(CrosscoderConfig, config)).train(
        model,
        layer,
        component,
        dataset,
        save_path=save_path,
        components=components,
        layers=layers,
        models=models,
        **options,
    )


def train_cross_layer_transcoder(
    model: Any,
    layers: Sequence[int] | None = None,
    dataset: Any = None,
    save_path: str | os.PathLike | None = None,
    config: CrossLayerConfig | None = None,
    **options: Any,
) -> Any:
    """Train a cross-layer transcoder: what the MLPs of ``layers`` (by default all) read, to what they add to the stream; the
    rest as in :func:`train_sae`. One of all layers is saved so that circuit-tracer finds it, where it is a JumpReLU or ReLU.
    """
    return SAETrainer(of_kind(CrossLayerConfig, config)).train(
        model, None, None, dataset, save_path=save_path, layers=layers, **options
    )


class _EitherWay:
    """A method that also works on the class, on a new instance made with the ``config`` that it is given."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: SAETrainer | None, owner: type[SAETrainer]) -> Callable[..., Any]:
        def call(*args: Any, config: SAEConfig | None = None, **options: Any) -> Any:
            trainer = instance or owner(config)
            if instance is not None and config is not None:
                trainer = owner(config)
            return self._function(trainer, *args, **options)

        return call


class SAETrainer:
    """Train what a configuration describes: an SAE, or a transcoder, crosscoder or cross-layer transcoder by the class of
    ``config``.

    ::

        sae = SAETrainer(SAEConfig(k=64)).train(model, layer=10, component="mlp", dataset=texts)
        sae = SAETrainer.train(model, layer=10, dataset=texts, config=SAEConfig(k=64))

    ``train`` takes what :func:`train_sae`, :func:`train_transcoder` and :func:`train_crosscoder` take. ``result`` is the
    :class:`~mlxsae.train.FitResult` of the last run.
    """

    def __init__(self, config: SAEConfig | type[SAEConfig] | None = None):
        kind = config if isinstance(config, type) else type(config)
        if config is not None and not issubclass(kind, SAEConfig):
            raise ValueError(
                f"[SAETrainer] config must be a configuration of an SAE but got {kind.__name__}."
            )
        self._explicit = isinstance(config, SAEConfig)
        self.config: SAEConfig = config if isinstance(config, SAEConfig) else (config or SAEConfig)()
        self.result: FitResult | None = None
        self.results: list[FitResult] = []

    def _train(
        self,
        model: Any,
        layer: int | None = None,
        component: str | None = None,
        dataset: Any = None,
        *,
        save_path: str | os.PathLike | None = None,
        text_field: str | None = None,
        from_layer: int | None = None,
        to_layer: int | None = None,
        from_component: str | None = None,
        to_component: str | None = None,
        layers: Sequence[int] | None = None,
        components: Sequence[str] | None = None,
        models: Sequence[Any] = (),
        each_of: Sequence[int] = (),
        callbacks: Iterable[Any] = (),
        checkpoint_dir: str | os.PathLike | None = None,
        resume: bool = False,
        progress: bool = True,
        profile: bool = False,
        **flat: Any,
    ) -> Any:
        if dataset is None:
            raise ValueError("[train] dataset must be given: texts, a file, a folder, activations.")
        config, callbacks = overruled(self.config, flat), listed(callbacks)
        given = {"layer": layer, "component": component, "from_layer": from_layer, "to_layer": to_layer}
        given |= {"from_component": from_component, "to_component": to_component}
        given |= {"layers": layers, "components": components, "models": models or None}
        given |= {"hook_point": config.data.hook_point}
        _check_given(config, {name for name, value in given.items() if value is not None})
        lms = [_language_model(m) for m in (model, *models)]
        for other in lms[1:]:
            _same_tokenizer(lms[0], other)
        if isinstance(config, TranscoderConfig):
            between = _ends(layer, component, from_layer, to_layer, from_component, to_component)
            points = [lms[0].hook_point(c, layer=n) for n, c in between]
            _check_order(*points)
        elif isinstance(config, CrosscoderConfig):
            points = [
                lms[0].hook_point(c, layer=n) for n, c in _sources(layer, layers, component, components)
            ]
        elif isinstance(config, CrossLayerConfig):
            order = sorted(set(range(lms[0].n_layers) if layers is None else layers))
            if not order:
                raise ValueError("[train_cross_layer_transcoder] layers must name at least one but got none.")
            points = [lms[0].hook_point(c, layer=n) for c in ("mlp_in", "mlp") for n in order]
        elif each_of:
            points = [lms[0].hook_point(component or "mlp", layer=n) for n in each_of]
        elif layer is None and config.data.hook_point is not None:
            points = [lms[0].hook_point(config.data.hook_point)]
        elif layer is None:
            raise ValueError("[train] layer or hook_point must be given but is None.")
        else:
            points = [lms[0].hook_point(component or "mlp", layer=layer)]
        hooked = None if config.data.hook_point is None else lms[0].hook_point(config.data.hook_point)
        if hooked is not None and points != [hooked]:
            raise ValueError(
                f"[train] layer and component must be those of hook_point={hooked} but are {', '.join(map(str, points))}."
            )
        if any(point.site == "attn_pattern" for point in points):
            raise ValueError("[train] component must have one width but attn_pattern has as many as keys.")
        task = _Task(lms, points, config, dataset, text_field, apart=bool(each_of))
        lengthless = not self._explicit and not flat.keys() & set(_LENGTHS)
        config, source, validation = task.data(_EPOCHS if lengthless else None)
        coder = None if each_of else task.build(config)
        if save_path is not None:
            writable(save_path, "save_path")
        common: dict[str, Any] = {
            "validation": validation,
            "checkpoint_dir": checkpoint_dir,
            "resume": resume,
            "progress": progress,
            "profile": profile,
        }
        if each_of:
            saes = [config.build(lms[0].shape_at(point)[-1]) for point in points]
            for sae, point in zip(saes, points, strict=True):
                sae.metadata = sae.metadata | task.metadata() | {"hook_name": str(point)}
            jobs = [
                Job(
                    sae,
                    config.train,
                    (i,),
                    loss=end_to_end_loss(config.train, sae, lms[0], point),
                    callbacks=[
                        *(as_callback(c).of(str(point)) for c in callbacks),
                        *tracking_callbacks(config.tracking, str(point)),
                    ],
                    name=str(point),
                )
                for i, (sae, point) in enumerate(zip(saes, points, strict=True))
            ]
            self.results = fit_many(jobs, source, **common)
            made = {n: result.sae for n, result in zip(each_of, self.results, strict=True)}
            if save_path is not None:
                for n, sae in made.items():
                    native.save(sae, Path(save_path) / f"layer_{n}")
            return made
        watchers = [*callbacks, *tracking_callbacks(config.tracking)]
        assert coder is not None
        coder.metadata = coder.metadata | task.metadata()  # now: trackers and exports in mid-run tell of it
        loss = end_to_end_loss(config.train, coder, lms[0], points[-1])
        self.result = fit(coder, source, config.train, loss=loss, callbacks=watchers, **common)
        if save_path is not None:
            native.save(coder, save_path)
        return coder

    train = _EitherWay(_train)


def of_kind(kind: type[SAEConfig], config: SAEConfig | None) -> SAEConfig | type[SAEConfig]:
    """``config``, or ``kind`` where there is none. ``ValueError`` for the configuration of another shape."""
    others = tuple(
        other for other in (TranscoderConfig, CrosscoderConfig, CrossLayerConfig) if other is not kind
    )
    if config is not None and (not isinstance(config, kind) or isinstance(config, others)):
        raise ValueError(f"[train] config must be of {kind.__name__} but got {type(config).__name__}.")
    return kind if config is None else config


def writable(path: str | os.PathLike, name: str) -> None:
    """Make the folder ``path``: what cannot be written is found before the long part and not after."""
    try:
        path = Path(path).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("it is write-protected")
    except (OSError, TypeError) as error:
        raise OSError(
            f"[train] {name} must be a folder that can be written but {path} gives: {getattr(error, 'strerror', None) or error}."
        ) from error


def rows_kept(n: int, config: DataConfig) -> tuple[int, int]:
    """``(m, end)``: of ``n`` stored rows the first ``m`` are for training, those up to ``end`` for validation."""
    m = n - math.ceil(config.validation_split * n)
    if n and not m:
        raise ValueError(
            f"[train] validation_split must leave rows to train on but is {config.validation_split} of {n}."
        )
    return m, min(n, m + config.validation_tokens)


def tracking_callbacks(config: TrackingConfig, part: str = "") -> list[Callback]:
    """The callbacks that a :class:`TrackingConfig` asks for; ``part`` is added to the name, where several runs share it."""
    config = replace(config, name="-".join(filter(None, (config.name, part))) or None)
    found: list[Callback] = []
    if config.wandb:
        more = {"entity": config.entity, "tags": None if config.tags is None else list(config.tags)}
        found.append(WandbCallback(config.project, config.name, **{k: v for k, v in more.items() if v}))
    if config.tensorboard is not None:
        found.append(TensorBoardCallback(Path(config.tensorboard) / (config.name or "")))
    if config.local is not None:
        found.append(TrackingCallback(LocalTracker(config.local), config.name or ""))
    return found


def fitting_context(lm: LanguageModel, asked: int | None) -> int | None:
    """``asked``, which the model must have been made for."""
    if asked is not None and lm.context_size is not None and asked > lm.context_size:
        raise ValueError(
            f"[train] context_size must be at most the model's {lm.context_size} but got {asked}."
        )
    return asked


def contexts_per_step(config: TrainConfig, context_size: int) -> int:
    """Of an end-to-end run, whose steps are whole contexts."""
    return max(1, config.batch_size // context_size)


def end_to_end_loss(config: TrainConfig, sae: Any, lm: LanguageModel, point: HookPoint) -> Loss | None:
    """The loss that asks the model what it makes of activations at ``point``; None where ``config`` does not want one."""
    if (name := config.loss.end_to_end) is None:
        return None
    continued = lm_room.logits_from if name == "kl" else lm_room.losses_from
    return config.loss.build(sae, config.total_steps, END_TO_END[name](continued(lm, point)))


@dataclass
class _Task:
    """Activations of ``lms`` at ``points``, and the coder that is trained on them."""

    lms: list[LanguageModel]
    points: list[HookPoint]
    config: Any
    dataset: Any
    text_field: str | None
    apart: bool = False
    """Whether each point has a coder of its own."""

    @property
    def crosses(self) -> bool:
        return isinstance(self.config, CrosscoderConfig)

    @property
    def sides(self) -> int:
        """Arrays of a batch into which the points are laid side by side; 0 where each is one."""
        return 1 if self.crosses else 2 if isinstance(self.config, CrossLayerConfig) else 0

    @property
    def context_size(self) -> int:
        asked = fitting_context(self.lms[0], self.config.data.context_size)
        return asked or min(_CONTEXT, self.lms[0].context_size or _CONTEXT)

    def build(self, config: Any) -> Any:
        widths = [lm.shape_at(point)[-1] for lm in self.lms for point in self.points]
        if self.sides:
            if len(set(widths)) > 1:
                raise ValueError(f"[train] what is laid side by side must have one width but has {widths}.")
            return config.build(widths[0], len(widths) // self.sides)
        return config.build(*widths)

    def data(self, epochs: int | None) -> tuple[Any, ActivationSource, Any]:
        """The configuration with its number of tokens, the source, and held-out activations or None."""
        config, dataset = self.config, self.dataset
        train, whole = config.train, config.train.loss.end_to_end is not None
        stored = bool(arrays_of(dataset)) or isinstance(dataset, ActivationSource)
        stored = stored or hasattr(dataset, "hook_points")
        if whole and (stored or self.sides):
            raise ValueError("[train] end_to_end must be None but for SAEs and transcoders on text.")
        n = len(self.lms) * len(self.points)
        if arrays := arrays_of(dataset):
            self._check_fields(len(arrays))
            m, end = rows_kept(len(arrays[0]), config.data)
            held_out = self._beside(tuple(a[m:end] for a in arrays)) if m < end else None
            source = ArraySource(*(a[:m] for a in arrays), batch_size=train.batch_size, seed=train.seed)
            return config, self._joined(source), held_out
        if isinstance(dataset, ActivationSource):
            if config.data.validation_split:
                raise ValueError("[train] validation_split must be 0 for a source of activations.")
            if not self.sides:  # what is laid side by side may come so, or one by one
                self._check_fields(len(dataset.sample(1)))
            return config, self._joined(dataset), None
        if hasattr(dataset, "source") and hasattr(dataset, "hook_points"):
            names = [str(point) for point in self.points]
            wanted: Any = tuple(names) if n > 1 else names[0]
            m, end = rows_kept(len(dataset), config.data)
            source = dataset[:m].source(train.batch_size, hook_points=wanted, seed=train.seed)
            if m == end:
                return config, self._joined(source), None
            held = dataset[m:end]

            def again() -> Iterator[Any]:
                return iter(
                    self._joined(held.source(train.batch_size, hook_points=wanted, epochs=1)).next_batch, None
                )

            return config, self._joined(source), Again(again)
        if not isinstance(dataset, (str, os.PathLike)) and not hasattr(dataset, "__iter__"):
            raise ValueError(
                f"[train] dataset must be texts, a file, a folder or activations but got {type(dataset).__name__}."
            )
        texts = Documents(dataset, self.text_field)
        split = 0.0 if texts.once else config.data.validation_split
        held_out = None
        if split and any(lm_room.in_heldout(text, split) for text in texts if text.strip()):
            held_out = self._held_out(self._batches(texts, "heldout", split))
        # A validation split into which no document falls leaves all of them to training, by the same hash.
        batches = self._batches(texts, "train" if split else None, split)
        if not texts.once and train.epochs is not None:
            tokens = math.ceil(rows_in(train.epochs, _count(batches())))
            train = replace(train, total_tokens=max(1, tokens), epochs=None)
        elif not texts.once and epochs is not None:
            # No more is counted than tells that the run is long enough.
            there = _count(batches(), enough=train.total_tokens / epochs)
            train = replace(train, total_tokens=min(train.total_tokens, epochs * there))
        config = replace(config, train=train)
        passes = 1 if texts.once else None

        def walk() -> Iterator[TokenBatch]:
            return batches(max_tokens=train.total_tokens, seed=train.seed, epochs=passes)

        if whole:
            return config, ContextActivations(self.lms[0], tuple(self.points), walk), held_out
        width = sum(lm.shape_at(point)[-1] for lm in self.lms for point in self.points)
        fits = max(_BUFFER_BYTES // (4 * width), train.batch_size)
        capacity = max(config.data.buffer_tokens or min(_BUFFER_TOKENS, fits), train.batch_size)
        source = ShuffleBuffer(
            self._stream(walk), batch_size=train.batch_size, capacity=capacity, seed=train.seed
        )
        return config, self._joined(source), held_out

    def metadata(self) -> dict[str, Any]:
        lm, names = self.lms[0], [str(point) for point in self.points]
        found: dict[str, Any] = {
            "model_name": lm.name,
            "model_class_name": type(lm.model).__name__,
            "hook_name": names[0],
            "context_size": self.context_size,
            "prepend_bos": lm.tokenizer is not None and lm.bos_id is not None,
            "exclude_special_tokens": True,
        }
        if self.crosses:
            found["sources"] = [
                f"{m.name} {name}" if len(self.lms) > 1 else name for m in self.lms for name in names
            ]
        elif self.sides:
            found |= {"inputs": names[: len(names) // 2], "targets": names[len(names) // 2 :]}
        elif len(names) > 1 and not self.apart:
            found["hook_name_out"] = names[1]
        if isinstance(self.dataset, (str, os.PathLike)):
            found["dataset_path"] = os.fspath(self.dataset)
        return found

    def _stream(self, batches: Callable[[], Iterable[TokenBatch]]) -> Any:
        each = [ModelActivations(lm, tuple(self.points), batches) for lm in self.lms]
        return each[0] if len(each) == 1 else _Abreast(each)

    def _batches(
        self, texts: Documents, split: str | None, share: float
    ) -> Callable[..., Iterator[TokenBatch]]:
        train, size = self.config.train, self.config.data.lm_batch_size
        if train.loss.end_to_end is not None:  # what the model reads at once is a step
            size = contexts_per_step(train, self.context_size)

        def walk(**more: Any) -> Iterator[TokenBatch]:
            return lm_room.token_batches(
                self.lms[0],
                texts,
                context_size=self.context_size,
                batch_size=size,
                split=split,
                heldout_fraction=share,
                **more,
            )

        return walk

    def all_rows(self) -> Any:
        """The activations of the dataset's texts, at most ``validation_tokens``."""
        return self._held_out(self._batches(Documents(self.dataset, self.text_field), None, 0.0))

    def _held_out(self, batches: Callable[..., Iterator[TokenBatch]]) -> Any:
        def walk() -> Iterator[TokenBatch]:
            return batches(max_tokens=self.config.data.validation_tokens)

        if self.config.train.loss.end_to_end is not None:
            contexts = ContextActivations(self.lms[0], tuple(self.points), walk)
            return list(iter(contexts.next_batch, None))
        rows = zip(*(valid_rows(chunk) for chunk in self._stream(walk)), strict=True)
        arrays = tuple(np.concatenate(field) for field in rows)
        return _sides(arrays, self.sides, np.concatenate)

    def _joined(self, source: ActivationSource) -> ActivationSource:
        return _Joined(source, self.sides) if self.sides else source

    def _beside(self, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        concatenate = mx.concatenate if isinstance(arrays[0], mx.array) else np.concatenate
        return _sides(arrays, self.sides, concatenate)

    def _check_fields(self, n: int) -> None:
        pairs = isinstance(self.config, (TranscoderConfig, CrossLayerConfig))
        wanted = len(self.points) if self.apart else 2 if pairs else 1
        if n != wanted and not self.crosses:
            kind = type(self.config).__name__
            raise ValueError(
                f"[train] dataset must hold {wanted} {'arrays' if wanted > 1 else 'array'} for {kind} but holds {n}."
            )


class Again:
    """An iterable from a function that makes iterators."""

    def __init__(self, make: Callable[[], Iterable[Any]]):
        self._make = make

    def __iter__(self) -> Any:
        return iter(self._make())


class _Abreast:
    """Chunks of several models that read the same tokens, as one stream."""

    def __init__(self, streams: Sequence[ModelActivations]):
        self._streams = streams

    def __iter__(self) -> Iterator[Chunk]:
        for chunks in zip(*self._streams, strict=True):
            yield Chunk(tuple(a for chunk in chunks for a in chunk.x), valid=chunks[0].valid)

    def state(self) -> list[dict[str, Any]]:
        return [stream.state() for stream in self._streams]

    def restore(self, position: list[dict[str, Any]]) -> None:
        for stream, own in zip(self._streams, position, strict=True):
            stream.restore(own)


class _Joined:
    """A source whose arrays are laid side by side, in ``sides`` equal parts: what a crosscoder reads, or what a cross-layer
    transcoder reads and predicts. A batch of fewer arrays is there already."""

    def __init__(self, source: ActivationSource, sides: int):
        self._source, self._sides = source, sides
        self.state, self.restore = source.state, source.restore

    @property
    def rows(self) -> int | None:
        return getattr(self._source, "rows", None)

    def next_batch(self) -> tuple[mx.array, ...] | None:
        batch = self._source.next_batch()
        return None if batch is None else _sides(batch, self._sides, mx.concatenate)

    def sample(self, n: int) -> tuple[mx.array, ...]:
        return _sides(self._source.sample(n), self._sides, mx.concatenate)


def _sides(arrays: tuple[Any, ...], sides: int, concatenate: Callable[..., Any]) -> tuple[Any, ...]:
    if len(arrays) <= sides or sides == 0:
        return arrays
    each = len(arrays) // sides
    return tuple(concatenate(list(arrays[i * each : (i + 1) * each]), axis=-1) for i in range(sides))


def _count(batches: Iterable[TokenBatch], enough: float = math.inf) -> int:
    """Valid tokens, counted no further than ``enough``."""
    count = 0
    for batch in batches:
        count += int(np.count_nonzero(np.array(batch.valid)))
        if count >= enough:
            break
    return count


def arrays_of(dataset: Any) -> tuple[Any, ...]:
    """An array, or a pair ``(x, y)`` of them, as a tuple; empty for anything else."""
    arrays = dataset if isinstance(dataset, tuple) and len(dataset) == 2 else (dataset,)
    return arrays if all(isinstance(a, (mx.array, np.ndarray)) for a in arrays) else ()


def _check_given(config: SAEConfig, given: set[str]) -> None:
    """What a shape has no use for is not left aside in silence."""
    known = {"layer", "component"}
    if isinstance(config, TranscoderConfig):
        known |= {"from_layer", "to_layer", "from_component", "to_component"}
    elif isinstance(config, CrosscoderConfig):
        known |= {"layers", "components", "models"}
    elif isinstance(config, CrossLayerConfig):
        known = {"layers"}
    else:
        known |= {"hook_point"}
    if more := sorted(given - known):
        raise ValueError(f"[train] {', '.join(more)} must not be given for {type(config).__name__}.")


def _language_model(model: Any) -> LanguageModel:
    if isinstance(model, (str, os.PathLike)):
        return lm_room.load(os.fspath(model))
    found = getattr(model, "lm", model)
    if not isinstance(found, LanguageModel):
        raise ValueError(
            f"[train] model must be a path, a name or a LanguageModel but got {type(model).__name__}."
        )
    return found


def _same_tokenizer(a: LanguageModel, b: LanguageModel) -> None:
    probe = "The 3 quick brown foxes, aren't they?\n\tÄh!"
    if a.encode(probe) != b.encode(probe):
        raise ValueError(
            f"[train_crosscoder] models must have one tokenizer but {a.name} and {b.name} differ."
        )


def _ends(
    layer: int | None,
    component: str | None,
    from_layer: int | None,
    to_layer: int | None,
    from_component: str | None,
    to_component: str | None,
) -> tuple[tuple[int, str], tuple[int, str]]:
    if layer is not None and from_layer is not None and to_layer is not None:
        raise ValueError("[train_transcoder] layer must not be given beside from_layer and to_layer.")
    first, last = (layer if n is None else n for n in (from_layer, to_layer))
    if first is None or last is None:
        raise ValueError("[train_transcoder] layer, or from_layer and to_layer, must be given.")
    if first == last and component is None and from_component is None and to_component is None:
        return (first, "mlp_in"), (last, "mlp")
    return (first, from_component or component or "mlp"), (last, to_component or component or "mlp")


def _check_order(a: HookPoint, b: HookPoint) -> None:
    order = list(SITES)
    if (a.layer, order.index(a.site)) >= (b.layer, order.index(b.site)):
        raise ValueError(
            f"[train_transcoder] the target must be computed after the input but got {a} to {b}."
        )


def _sources(
    layer: int | None,
    layers: Sequence[int] | None,
    component: str | None,
    components: Sequence[str] | None,
) -> list[tuple[int, str]]:
    numbers = [layer] if layers is None else list(layers)
    if (layer is None) == (layers is None):
        raise ValueError(
            f"[train_crosscoder] either layer or layers must be given but got {layer} and {layers}."
        )
    if component is not None and components is not None:
        raise ValueError("[train_crosscoder] component and components must not both be given.")
    named = [component or "mlp"] if components is None else list(components)
    if not numbers or not named or isinstance(components, str):
        raise ValueError(
            f"[train_crosscoder] layers and components must be lists that name at least one but got {layers} and {components!r}."
        )
    return [(n, c) for n in numbers if n is not None for c in named]
