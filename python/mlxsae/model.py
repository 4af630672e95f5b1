"""The facade: a language model, its SAEs, and everything that is done with the two together.

::

    model = InterpretableModel("mlx-community/Llama-3.2-1B-Instruct")
    sae = model.train_sae(layer=10, dataset=texts, save_path="my_sae")
    with model.trace("The capital of France is", interventions={"layers.4.attn": interventions.zero}) as trace:
        output = model.output.save()
    features = sae.encode(trace.activations["layers.10.mlp"])
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxsae import io, train
from mlxsae import lm as lm_room
from mlxsae.analysis import steer as steering_edit
from mlxsae.code import Code
from mlxsae.io.collection import SAEs, load_saes
from mlxsae.lm import ByPoint, Documents, Edit, Edits, HookPoint, LanguageModel
from mlxsae.lm.families import resolve, resolve_all, sites_of
from mlxsae.lm.hook_point import HookPointLike, Point
from mlxsae.lm.interventions import Positions, check_positions, place
from mlxsae.metrics.in_model import evaluate_in_model
from mlxsae.sae import SAE
from mlxsae.train import SAEConfig

Inputs = str | Sequence[Any] | mx.array
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONTEXT = 256
_NO_TOKENS = "[trace] inputs must hold at least one prompt, each of at least one token."


class Token(NamedTuple):
    """One step of `InterpretableModel.stream`."""

    text: str  # what it adds to the text; may be empty while a character is incomplete
    token: int
    logprobs: mx.array  # [vocab], natural log, before temperature
    features: ByPoint[Code]  # {hook point: SparseCode(values [1, k], indices [1, k])} of this token


class Trace:
    """One forward pass: what went in, what came out, and every activation between.

    Attributes
    ----------
    tokens, valid : int32 and bool [b, t]
        The prompt, padded on the right; `valid` is false at padding, BOS and other special tokens.
    activations : dict of point to array
        By any spelling: `trace.activations["model.layers.10.mlp"]`. Lazy: an activation is computed when it is
        used, and only what it needs. Those that were computed stay in memory as long as the trace does, unless
        `hook_points` or `save` named fewer.
    output : array [b, t, vocab]
        The logits, lazy too. Rows shorter than t have no meaning at their padding.
    """

    def __init__(
        self,
        model: InterpretableModel,
        tokens: mx.array,
        valid: mx.array,
        output: mx.array,
        activations: ByPoint[mx.array],
    ) -> None:
        self._model = model
        self.tokens, self.valid = tokens, valid
        self.output, self.activations = output, activations

    def save(self, *hook_points: HookPointLike) -> Trace:
        """Compute the output and the activations named, and let go of all others."""
        self.activations = ByPoint(
            (point, self.activations[point]) for point in resolve_all(self._model.lm.model, list(hook_points))
        )
        mx.eval(self.output, list(self.activations.values()))
        return self

    def __enter__(self) -> Trace:
        self._model._traces.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._model._traces.remove(self)


class Output(NamedTuple):
    """The logits of the trace around."""

    value: mx.array

    def save(self) -> mx.array:
        """Compute them: the array [b, t, vocab], good after the trace."""
        mx.eval(self.value)
        return self.value


class InterpretableModel:
    """A language model with its SAEs: trace, intervene, train, read features, steer.

    Parameters
    ----------
    model : str, path, nn.Module or LanguageModel
        What `mlxsae.lm.load` takes, or a model that is loaded.
    saes : {hook point: SAE or folder}, optional
        Or what :func:`load_saes` gives. Folders are read when their SAE is first used.
    tokenizer : optional
        For a bare `nn.Module`; without one there are token ids only.

    Attributes
    ----------
    lm : LanguageModel
    saes : SAEs
        `model.saes["blocks.10.hook_resid_post"]`; may be assigned to.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module | LanguageModel,
        saes: Mapping[Any, SAE | str | os.PathLike[str]] | None = None,
        *,
        tokenizer: Any = None,
    ) -> None:
        if saes is not None and not isinstance(saes, Mapping):
            raise TypeError(
                "[InterpretableModel] saes must map hook points to SAEs "
                f"but got {type(saes).__name__}; a tokenizer goes into tokenizer=."
            )
        if isinstance(model, (str, os.PathLike)):
            self.lm = lm_room.load(model)
        else:
            self.lm = model if isinstance(model, LanguageModel) else LanguageModel(model, tokenizer)
        self.saes = SAEs(saes, self.lm)
        self._traces: list[Trace] = []
        self._features: ByPoint[Code] = ByPoint()

    def __repr__(self) -> str:
        return f"InterpretableModel({self.lm.name or type(self.lm.model).__name__}, saes at {[*map(str, self.saes)]})"

    def __call__(self, inputs: Inputs) -> mx.array:
        """Logits [b, t, vocab] of text or tokens."""
        return self.lm(self._tokens(inputs)[0])

    # -- activations -------------------------------------------------------------------------------------------------

    @property
    def hook_points(self) -> list[HookPoint]:
        """Every hook point of the model, in the order of computation."""
        return [
            HookPoint(layer, site)
            for layer in range(self.lm.n_layers)
            for site in sites_of(self.lm.model, layer)
        ]

    def trace(
        self,
        inputs: Inputs,
        *,
        interventions: Edits | None = None,
        positions: Positions = "all",
        hook_points: HookPointLike | Iterable[HookPointLike] | None = None,
    ) -> Trace:
        """Run the model once and keep hold of what it computes.

        Parameters
        ----------
        inputs : str, list of str, token ids [t], list of them, or array [t] or [b, t]
            BOS is put before text where the tokenizer has one; ids are taken as they are. Rows of different
            length are padded on the right.
        interventions : {hook point: function}, optional
            See :mod:`mlxsae.interventions`; any function `[b, t, d] -> [b, t, d]` is one. They act from now on:
            what is changed inside the `with` block comes too late.
        positions : "all" or list of int
            At which tokens they act, where they do not say so themselves.
        hook_points : one or several, optional
            What to keep; all there is by default. Attention patterns are computed only if they are looked at.

        Returns
        -------
        Trace
            Also a context manager, in which `model.output` is its output.
        """
        tokens, valid, lengths = self._tokens(inputs)
        net = self.lm.model
        check_positions(positions, min(lengths))
        placed = {spec: place(edit, lengths, positions) for spec, edit in (interventions or {}).items()}
        wanted = self.hook_points if hook_points is None else resolve_all(net, hook_points)
        with lm_room.splice(net, placed):
            output, found = (
                lm_room.run_with_capture(net, tokens, wanted) if wanted else (self.lm(tokens), ByPoint())
            )
        return Trace(self, tokens, valid, output, found)

    @property
    def output(self) -> Output:
        """The logits of the innermost trace around: `output = model.output.save()`."""
        if not self._traces:
            raise ValueError(
                "[output] there must be a trace around: with model.trace(...): model.output.save()."
            )
        return Output(self._traces[-1].output)

    def batch_get_activations(
        self,
        inputs: Sequence[Any],
        hook_points: HookPointLike | Iterable[HookPointLike],
        *,
        batch_size: int = 16,
    ) -> ByPoint[list[mx.array]]:
        """Activations of many prompts: for each hook point, in the order of `inputs`, an array [t, d] each.

        Prompts of like lengths go through the model together, no further than the deepest hook point. BOS is there,
        padding is not. A pattern is [heads, t, t].
        """
        points = resolve_all(self.lm.model, hook_points)
        rows = self._rows(inputs)
        found: ByPoint[list[Any]] = ByPoint((point, [None] * len(rows)) for point in points)
        for places, (tokens, _) in lm_room.batches_by_length(self.lm, rows, batch_size=batch_size):
            x = lm_room.capture(self.lm, tokens, points)
            for point in points:
                for i, row in zip(places, x[point], strict=True):
                    t = len(rows[i])
                    found[point][i] = row[..., :t, :t] if row.ndim == 3 else row[:t]
            # A slice is a view of the batch: computed, each row stands alone.
            for point in points:
                for i in places:
                    found[point][i] = mx.contiguous(found[point][i])
            mx.eval([[found[point][i] for i in places] for point in points])
        return found

    def mean_activation(
        self, inputs: Sequence[Any], hook_point: HookPointLike, *, batch_size: int = 16
    ) -> mx.array:
        """Mean [d] over the valid tokens of `inputs`, float32: what `interventions.replace_with` ablates by."""
        point = resolve(self.lm.model, hook_point)
        total, count = mx.array(0.0), 0
        for _, (tokens, valid) in lm_room.batches_by_length(
            self.lm, self._rows(inputs), batch_size=batch_size
        ):
            x = lm_room.valid_rows(lm_room.capture(self.lm, tokens, point)[point], valid)
            total, count = total + x.astype(mx.float32).sum(axis=0), count + x.shape[0]
            mx.eval(total)
        if not count:
            raise ValueError("[mean_activation] inputs must hold at least one valid token but hold none.")
        return total / count

    def get_token_predictions(self, h: mx.array, top_k: int = 10) -> list[Any]:
        """Ids of the likeliest next tokens, likeliest first: a list of `top_k`, nested as `h` is.

        `h` are logits [..., vocab], or a residual stream [..., d_model], which is unembedded first.
        """
        logits = self.lm.unembed(h) if h.shape[-1] == self.lm.d_model != self.vocab_size else h
        if logits.shape[-1] != self.vocab_size:
            raise ValueError(
                f"[get_token_predictions] h must be [..., {self.vocab_size}] or [..., {self.lm.d_model}] "
                f"but has shape {h.shape}."
            )
        if not 0 < top_k <= self.vocab_size:
            raise ValueError(
                f"[get_token_predictions] top_k must be in (0, {self.vocab_size}] but got {top_k}."
            )
        return cast(list, mx.argsort(-logits.astype(mx.float32), axis=-1)[..., :top_k].tolist())

    def token_to_str(self, token: int) -> str:
        """The text that one token stands for, its leading space included."""
        return self.lm.token_to_str(token)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.lm.model(mx.zeros((1, 1), mx.int32)).shape[-1]  # a graph: nothing is computed

    # -- generation --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[int] | mx.array,
        *,
        max_tokens: int = 100,
        interventions: Edits | None = None,
        positions: Positions = "all",
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> str:
        """The continuation of `prompt`, without it. Arguments as for :func:`mlxsae.lm.stream_generate`."""
        return lm_room.generate(
            self.lm,
            prompt,
            max_tokens=max_tokens,
            edits=interventions,
            positions=positions,
            temperature=temperature,
            seed=seed,
        )

    def stream(
        self,
        prompt: str | Sequence[int] | mx.array,
        *,
        max_tokens: int = 100,
        interventions: Edits | None = None,
        positions: Positions = "all",
        features: HookPointLike | Iterable[HookPointLike] | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[Token]:
        """Yield the continuation token by token, each with the features that it has in the SAEs.

        Parameters
        ----------
        features : hook points, optional
            Of the SAEs to read; all of them by default. Features are those of the activation after interventions.

        Other arguments as for :func:`mlxsae.lm.stream_generate`, with which the tokens agree. The codes are computed
        beside the next token; the prompt's are in `trace`.
        """
        points = list(self.saes) if features is None else resolve_all(self.lm.model, features)
        steps = lm_room.stream_generate(
            self.lm,
            prompt,
            max_tokens=max_tokens,
            edits=interventions,
            positions=positions,
            record={point: partial(_encode_rows, self.saes[point]) for point in points},
            temperature=temperature,
            seed=seed,
        )
        return (Token(*step) for step in steps)

    # -- features at run time ------------------------------------------------------------------------------------------

    @contextmanager
    def interpretation_enabled(
        self, hook_points: HookPointLike | Iterable[HookPointLike] | None = None
    ) -> Iterator[None]:
        """Encode, in every forward pass of this model, the activations that the SAEs are for.

        The passes are `model(...)`, `model.lm(...)`, mlx-lm's own; their outputs keep every bit. `hook_points` names
        some of the SAEs; all by default.
        """
        points = list(self.saes) if hook_points is None else resolve_all(self.lm.model, hook_points)
        if not points:
            raise ValueError(
                "[interpretation_enabled] the model must have SAEs but has none: model.saes[...] = sae."
            )

        def read(point: Point, sae: SAE, x: mx.array) -> mx.array:
            self._features[point] = sae.encode(x)
            return x

        with lm_room.splice(self.lm, {point: partial(read, point, self.saes[point]) for point in points}):
            yield

    def get_active_features(self) -> ByPoint[Code]:
        """The codes of the last forward pass under `interpretation_enabled`, by hook point.

        `SparseCode(values [b, t, k], indices [b, t, k])` each (compressed rows where the number varies); a feature is
        active where its value is > 0. `sae.to_dense(code)` gives [b, t, d_sae].
        """
        mx.eval(list(self._features.values()))
        return ByPoint(self._features)

    def steering(
        self, strengths: Mapping[tuple[HookPointLike, int], float], *, mode: str = "scale"
    ) -> dict[Point, Edit]:
        """Interventions that steer by features: `{(hook point, feature): strength}`.

        `mode` "scale" multiplies a latent (0 ablates it), "set" gives it a value, "add" adds to it. What the SAE does
        not reconstruct stays as it was: an edit adds `(f' - f) W_dec[i]` and nothing else.
        """
        grouped: dict[Point, dict[int, float]] = {}
        for key, strength in strengths.items():
            point, feature = self._feature(key)
            grouped.setdefault(point, {})[feature] = strength
        return {point: steering_edit(self.saes[point], each, mode=mode) for point, each in grouped.items()}

    def steer(
        self,
        inputs: Inputs,
        feature_id: tuple[HookPointLike, int],
        strength: float,
        *,
        mode: str = "scale",
        positions: Positions = "all",
    ) -> mx.array:
        """Logits [b, t, vocab] with one feature multiplied by `strength` (see :meth:`steering`)."""
        edits = self.steering({feature_id: strength}, mode=mode)
        return self.trace(inputs, interventions=edits, positions=positions, hook_points=[]).output

    def steering_enabled(
        self, strengths: Mapping[tuple[HookPointLike, int], float], *, mode: str = "scale"
    ) -> AbstractContextManager[None]:
        """As :meth:`steering`, in every forward pass of this model inside the `with` block."""
        return lm_room.splice(self.lm, self.steering(strengths, mode=mode))

    def _feature(self, feature_id: Any) -> tuple[Point, int]:
        if not isinstance(feature_id, tuple) or len(feature_id) != 2:
            raise ValueError(f"[steer] a feature must be (hook point, index) but got {feature_id!r}.")
        return resolve(self.lm.model, feature_id[0]), feature_id[1]

    # -- SAEs ----------------------------------------------------------------------------------------------------------

    def train_sae(
        self,
        layer: int | None = None,
        component: str = "mlp",
        dataset: Any = None,
        save_path: str | os.PathLike[str] | None = None,
        config: SAEConfig | None = None,
        **options: Any,
    ) -> SAE:
        """Train an SAE on the model's activations at one hook point: :func:`mlxsae.train.train_sae` says what each
        argument means. Afterwards it is also in `model.saes`.
        """
        sae = train.train_sae(self.lm, layer, component, dataset, save_path, config, **options)
        self.saes[self.lm.hook_point(sae.metadata["hook_name"])] = sae
        return sae

    def train_transcoder(
        self,
        from_layer: int | None = None,
        to_layer: int | None = None,
        component: str | None = None,
        dataset: Any = None,
        save_path: str | os.PathLike[str] | None = None,
        config: train.TranscoderConfig | None = None,
        **options: Any,
    ) -> SAE:
        """Train a transcoder, which reads one activation and predicts another: :func:`mlxsae.train.train_transcoder`.
        `layer=10` alone goes from what a block's MLP reads to what it adds to the stream.
        """
        return train.train_transcoder(
            self.lm, from_layer, to_layer, component, dataset, save_path, config, **options
        )

    def train_crosscoder(
        self,
        layer: int | None = None,
        components: Sequence[str] | None = None,
        dataset: Any = None,
        save_path: str | os.PathLike[str] | None = None,
        config: train.CrosscoderConfig | None = None,
        **options: Any,
    ) -> SAE:
        """Train one dictionary for several activations: :func:`mlxsae.train.train_crosscoder`. `layers=[8, 10]` with
        `component="mlp"` in place of `layer` and `components`; `models=[...]` are further models.
        """
        return train.train_crosscoder(self.lm, layer, components, dataset, save_path, config, **options)

    def load_sae(
        self, path_or_name: str | os.PathLike[str], *, layer: int | None = None, component: str | None = None
    ) -> SAE:
        """An SAE from a folder, or `owner/name` on the Hugging Face hub; it is then in `model.saes`.

        Its files say where it belongs, unless `layer` and `component` do.

        Raises
        ------
        FileNotFoundError, OSError
            No such folder; the hub does not have it.
        ValueError
            Damaged files, no hook point in them, a width that is not the model's there.
        """
        folder = Path(path_or_name).expanduser()
        if not folder.exists() and _HUB_NAME.fullmatch(os.fspath(path_or_name)):
            from huggingface_hub import snapshot_download

            try:
                folder = Path(snapshot_download(os.fspath(path_or_name)))
            except Exception as e:
                raise OSError(
                    f"[load_sae] {os.fspath(path_or_name)!r} must be a folder or an SAE on the hub, "
                    f"but there is no such folder and the hub gave: {str(e)[:400]}"
                ) from e
        sae = io.load(folder)
        spec = component if component is not None else sae.metadata.get("hook_name")
        if not isinstance(spec, str):
            raise ValueError(
                f"[load_sae] {folder} must name its hook_name, or layer and component must be given."
            )
        point = resolve(self.lm.model, spec, layer=layer)
        self.saes[point] = sae
        return sae

    def load_saes(self, directory: str | os.PathLike[str]) -> SAEs:
        """Add the SAEs of a directory (:func:`load_saes`), each read when it is first used."""
        self.saes.add(load_saes(directory))
        return self.saes

    def evaluate_sae(
        self,
        sae: SAE | HookPointLike,
        texts: Any,
        *,
        layer: int | None = None,
        component: str | None = None,
        max_tokens: int = 50_000,
        context_size: int | None = None,
        batch_size: int = 16,
    ) -> dict[str, float]:
        """How good an SAE is on `texts`, and what it costs the model: see `mlxsae.metrics.evaluate_in_model`.

        `sae` is one of the model's, or its hook point; one from elsewhere goes with `layer` and `component`.
        """
        if component is not None:
            point = self.lm.hook_point(component, layer=layer)
        elif isinstance(sae, SAE):
            point = next((p for p in self.saes.loaded() if self.saes[p] is sae), None)
            if point is None:
                raise ValueError(
                    "[evaluate_sae] sae must be one of model.saes, or layer and component be given."
                )
        else:
            point = self.lm.hook_point(sae, layer=layer)
        batches = lm_room.token_batches(
            self.lm,
            Documents(texts),
            context_size=context_size or min(_CONTEXT, self.lm.context_size or _CONTEXT),
            batch_size=batch_size,
            max_tokens=max_tokens,
        )
        judged = sae if isinstance(sae, SAE) else self.saes[point]
        return evaluate_in_model(self.lm, judged, cast(HookPoint, point), batches)

    # -- inputs --------------------------------------------------------------------------------------------------------

    def _rows(self, inputs: Inputs) -> list[list[int]]:
        """Token ids of each prompt."""
        inputs = mx.array(inputs) if isinstance(inputs, np.ndarray) else inputs
        if isinstance(inputs, mx.array):
            if inputs.ndim not in (1, 2) or not mx.issubdtype(inputs.dtype, mx.integer):
                raise ValueError(
                    f"[trace] tokens must be integers [t] or [b, t] but got {inputs.dtype} of shape {inputs.shape}."
                )
            inputs = cast(list, inputs.tolist())
        if isinstance(inputs, str) or (len(inputs) > 0 and isinstance(inputs[0], int)):
            inputs = [inputs]
        rows = [self.lm.encode(row) if isinstance(row, str) else list(row) for row in inputs]
        if not rows or not all(rows):
            raise ValueError(_NO_TOKENS)
        self._check_ids(min(map(min, rows)), max(map(max, rows)))
        return rows

    def _check_ids(self, least: int, most: int) -> None:
        """MLX reads a row of the embedding wherever an id points: past its end that may end the process."""
        tables = (m for m in self.lm.model.modules() if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding)))
        rows = max((table.weight.shape[0] for table in tables), default=most + 1)
        if least < 0 or most >= rows:
            raise ValueError(
                f"[trace] token ids must be in [0, {rows}) but got {least if least < 0 else most}."
            )

    def _tokens(self, inputs: Inputs) -> tuple[mx.array, mx.array, list[int]]:
        """Tokens [b, t], which of them are text [b, t], and the length of each row."""
        inputs = mx.array(inputs) if isinstance(inputs, np.ndarray) else inputs
        if isinstance(inputs, mx.array) and inputs.ndim == 2 and mx.issubdtype(inputs.dtype, mx.integer):
            if inputs.size == 0:
                raise ValueError(_NO_TOKENS)
            self._check_ids(int(inputs.min()), int(inputs.max()))  # type: ignore[arg-type]
            return inputs, self._is_text(inputs), [inputs.shape[1]] * inputs.shape[0]
        rows = self._rows(inputs)
        lengths = [len(row) for row in rows]
        width = max(lengths)
        tokens = mx.array([row + [0] * (width - len(row)) for row in rows], mx.int32)
        return tokens, self._is_text(tokens) & (mx.arange(width) < mx.array(lengths)[:, None]), lengths

    def _is_text(self, tokens: mx.array) -> mx.array:
        special = self.lm.special_ids if self.lm.tokenizer is not None else frozenset()
        text: np.ndarray = np.isin(np.array(tokens), sorted(special), invert=True)
        return mx.array(text)


def _encode_rows(sae: SAE, x: mx.array) -> Code:
    """The code of a single token [1, 1, d], as one row."""
    return sae.encode(x[0])
