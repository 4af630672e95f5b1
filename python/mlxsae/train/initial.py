"""What the first sample of activations decides: the scale of the data, where ``b_dec`` and the dictionary start."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxsae.sae import SAE, CrossLayerTranscoder, Decoder, Encoder, Gated, SigmoidGated


def geometric_median(x: mx.array, *, iterations: int = 100, tolerance: float = 1e-6) -> mx.array:
    """The point with the least summed Euclidean distance to the rows of ``x [n, d]``, by Weiszfeld's
    iteration.

    Outliers such as attention sinks, which drag the mean, weigh no more here than any other token. Stops when
    a step is shorter than ``tolerance`` times the mean distance. Float32 ``[d]``.
    """
    if x.ndim != 2 or x.shape[0] == 0:
        raise ValueError(f"[geometric_median] x must have shape [n, d] with n > 0 but got {x.shape}.")
    x = x.astype(mx.float32)
    median = x.mean(axis=0)
    for _ in range(iterations):
        distance = mx.linalg.norm(x - median, axis=-1)
        mean_distance = distance.mean()
        # A row on the median itself would weigh infinitely; cap it far above the rest.
        weight = 1.0 / mx.maximum(distance, 1e-6 * mean_distance + 1e-30)
        moved = (weight[:, None] * x).sum(axis=0) / weight.sum()
        done = mx.linalg.norm(moved - median) <= tolerance * mean_distance
        median = moved
        if done.item():
            break
    return median


def finite_rows(*fields: mx.array) -> tuple[mx.array, ...]:
    """Rows that are finite in every field. A bad row must not spoil the start; the step that meets it names
    its batch.
    """
    good = mx.stack([mx.isfinite(f).all(axis=-1) for f in fields]).all(axis=0)
    rows = mx.array(np.flatnonzero(np.array(good)).astype(np.uint32))
    if rows.size == 0:
        raise ValueError(
            "[fit] activations must be finite but every row of the first sample holds NaN or inf."
        )
    return tuple(f[rows] for f in fields)


def expected_norm_scale(x: mx.array) -> float:
    """``sqrt(d) / mean |x|``: the factor that brings rows of ``x [n, d]`` to norm ``sqrt(d)`` on average."""
    norm = float(mx.linalg.norm(x.astype(mx.float32), axis=-1).mean())
    if not norm > 0:
        raise ValueError(f"[fit] activations must have a positive mean norm to be scaled but got {norm}.")
    return math.sqrt(x.shape[-1]) / norm


def column_statistics(x: mx.array) -> tuple[mx.array, mx.array]:
    """Mean and standard deviation of each coordinate of ``x [n, d]``, float32 ``[d]``; a coordinate that never varies
    has deviation 1.
    """
    x = x.astype(mx.float32)
    apart = x - x[:1]  # one that never varies is 0 then, to the last digit
    mean = apart.mean(axis=0)
    std = mx.sqrt(mx.square(apart - mean).mean(axis=0))
    return x[0] + mean, mx.where(std > 0, std, mx.ones_like(std))


class Spread(NamedTuple):
    """How a sample spreads: ``mean [d]``, variances ``[d]`` along orthonormal ``axes [d, d]`` (columns), ascending."""

    mean: mx.array
    variances: np.ndarray
    axes: np.ndarray

    def whitening(self, power: float) -> tuple[mx.array, mx.array]:
        """``W = c C^(-power / 2)`` and its inverse for the covariance ``C``, symmetric, float32 ``[d, d]``.

        ``(x - mean) W`` has mean squared norm ``d``; with ``power`` 1 the variance is 1 along every axis. Variances count
        as at least a thousandth of the largest: a sample says little about smaller ones, and 1 over them would be noise.
        """
        floored = np.maximum(self.variances, 1e-3 * self.variances[-1])
        c = math.sqrt(len(floored) / np.sum(self.variances * floored**-power))
        roots = c * floored ** (-power / 2)
        there, back = ((self.axes * r) @ self.axes.T for r in (roots, 1 / roots))
        return mx.array(there.astype(np.float32)), mx.array(back.astype(np.float32))


def spread(x: mx.array) -> Spread:
    """The :class:`Spread` of rows ``x [n, d]``, in float64. ValueError where they do not vary."""
    rows = np.array(x.astype(mx.float32), np.float64)
    mean = rows.mean(axis=0)
    variances, axes = np.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    if not variances[-1] > 0:
        raise ValueError("[fit] activations must vary to be whitened but all rows of the sample are equal.")
    return Spread(mx.array(mean.astype(np.float32)), np.maximum(variances, 0), axes)


def source_statistics(
    x: mx.array, n_sources: int, weights: list[float] | None = None
) -> tuple[mx.array, mx.array]:
    """Centre 0 and a scale for each source of ``x [n, n_sources * d]``: its rows come to norm ``sqrt(d)`` on average, times
    the root of its weight, so that its squared error counts ``weight`` times. Float32 ``[n_sources * d]`` each.
    """
    apart = x.astype(mx.float32).reshape(x.shape[0], n_sources, -1)
    d = apart.shape[-1]
    norms = mx.linalg.norm(apart, axis=-1).mean(axis=0)
    if not bool((norms > 0).all()):
        raise ValueError(f"[fit] every source must have a positive mean norm but got {norms.tolist()}.")
    weight = mx.ones(n_sources) if weights is None else mx.array(weights)
    scale = mx.repeat(norms / (math.sqrt(d) * mx.sqrt(weight)), d)
    return mx.zeros_like(scale), scale


DIRECTIONS = ("data", "pca", "random")


def directions(how: str, x: mx.array, n: int, *, seed: int = 0) -> mx.array:
    """``n`` unit rows to start a dictionary for centred activations ``x [rows, d]`` with: float32 ``[n, d]``.

    ``pca``: both signs of the principal components, those of most variance first, then random directions (there are but
    ``2 d`` signed components). ``data``: directions of random rows of ``x``, then random ones. ``random``: uniform.
    """
    if how not in DIRECTIONS:
        raise ValueError(f"[directions] how must be one of {list(DIRECTIONS)} but got {how!r}.")
    if n <= 0:
        raise ValueError(f"[directions] n must be positive but got {n}.")
    if x.ndim != 2 or x.shape[0] == 0:
        raise ValueError(f"[directions] x must have shape [rows, d] with rows > 0 but got {x.shape}.")
    if not mx.isfinite(x).all().item():
        raise ValueError("[directions] x must be finite but holds NaN or inf.")
    rng = np.random.default_rng(seed)
    rows, found = np.array(x.astype(mx.float32), np.float64), np.empty((0, x.shape[1]))
    if how == "pca":
        _, vectors = np.linalg.eigh(rows.T @ rows)  # ascending
        found = np.stack([vectors.T[::-1], -vectors.T[::-1]], axis=1).reshape(-1, x.shape[1])
    elif how == "data":
        found = rows[rng.permutation(len(rows))[:n]]
        found = found[np.linalg.norm(found, axis=1) > 0]
    found = found[:n]
    found = np.concatenate([found, rng.standard_normal((n - len(found), x.shape[1]))])
    return mx.array((found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32))


def initialize(sae: SAE, x: mx.array, y: mx.array | None = None, *, how: str = "pca", seed: int = 0) -> SAE:
    """Start ``sae`` from activations ``x [n, d_in]`` (and targets ``y [n, d_out]``), in place.

    Decoder rows become :func:`directions` of the centred target, of the norm they had; encoder rows the same, or for a
    transcoder those of the centred input. Then the encoder is scaled by the one factor that makes the first
    reconstruction explain most (Gao et al. 2024, appendix A.1), where the rule has no threshold that would have to follow.
    Biases stay.
    """
    target = x if y is None else y
    for name, a, width in (("x", x, sae.d_in), ("y", target, sae.d_out)):
        if a.ndim != 2 or a.shape[1] != width or a.shape[0] != x.shape[0]:
            raise ValueError(
                f"[initialize] {name} must have shape [n, {width}] with n={x.shape[0]} but got {a.shape}."
            )
    norms = mx.linalg.norm(sae.decoder.weight.astype(mx.float32), axis=-1, keepdims=True)
    rows = directions(how, target - target.mean(axis=0), sae.d_sae, seed=seed)
    if "weight" in sae.decoder:
        sae.decoder.weight = (rows * norms).astype(sae.dtype)
    inner = rows if y is None else directions(how, x - x.mean(axis=0), sae.d_sae, seed=seed)
    sae.encoder.weight = inner.astype(sae.dtype)
    if "weight" in sae.decoder and not sae.rule.UNITS:
        sample = x[:2048]
        code = sae.encode(sample)
        out = (sae.decode(code, sample) - sae.decoder.bias).astype(mx.float32)
        along = _size(out, target[:2048] - sae.decoder.bias)
        sae.encoder.weight = sae.encoder.weight * along.astype(sae.dtype)
    mx.eval(sae.parameters())
    return sae


def waits_for_data(sae: SAE) -> bool:
    """Whether :func:`begin` has something to do: a rule that chooses by a threshold, in an SAE that was never trained and
    whose encoder and rule are free to follow.
    """
    free = not any(name.startswith(("encoder", "rule")) for name in frozen(sae))
    return sae.rule.starts_from_data and untrained(sae) and free


def frozen(sae: Any) -> set[str]:
    """Names of the parameters that training leaves alone."""
    named, free = (tree_flatten(p) for p in (sae.parameters(), sae.trainable_parameters()))
    return {name for name, _ in named} - {name for name, _ in free}


def untrained(sae: SAE) -> bool:
    """Whether no encoder has a bias yet: training gives it one."""
    return not any(bool(e.bias.any()) for e in _encoders(sae))


def begin(sae: SAE, x: mx.array, y: mx.array, l0: float | None) -> SAE:
    """Let an untrained SAE start where training can go on, in place: from a few rows ``x [n, d_in]`` and targets ``y``.

    Biases (and thresholds) are such that ``l0`` latents a token fire, where that is known, as in Anthropic's update of
    January 2025; then the encoder has the size at which the reconstruction explains most (Gao et al. 2024, appendix A.1), a
    gate's magnitudes one of their own. From unit rows half of all latents fire, and reconstruct many times too much:
    a short run ends before the penalty has made up for that. The size is left alone where the decoder does not read
    backwards what the encoder reads: transcoders, tied weights.
    """
    if isinstance(sae.rule, SigmoidGated) and l0 is not None:
        sae.rule.gate_weight = sae.encoder.weight
    ranks = sae.ranks(sae.rule)
    bias = sae.rule.start(sae.pre_acts(x) * ranks, l0)
    if bias is not None:
        bias = mx.where(ranks > 0, bias / ranks, 0)
        encoders = _encoders(sae)
        for encoder, own in zip(encoders, mx.split(bias, len(encoders)), strict=True):
            encoder.bias = own.astype(sae.dtype)
    if not sae.transcoder and sae.one_product and "weight" in sae.decoder:
        encoded, target = sae.learn(x, sae.rule.initial_state()), y - sae.decoder.bias
        factor = _size(sae.written(encoded.code), target)
        if isinstance(sae.rule, Gated) and encoded.pre_acts is not None:
            gate = _size(mx.maximum(encoded.pre_acts, 0) @ sae.decoder.weight, target)
            sae.rule.r_mag = mx.broadcast_to(mx.log(factor / gate), sae.rule.r_mag.shape)
            factor = gate
        sae.encoder.weight = sae.encoder.weight * factor
        sae.encoder.bias = sae.encoder.bias * factor
        sae.rule.rescale(factor)
    mx.eval(sae.parameters())
    return sae


def _encoders(sae: SAE) -> list[Encoder]:
    return sae.encoders if isinstance(sae, CrossLayerTranscoder) else [sae.encoder]


def _size(out: mx.array, target: mx.array) -> mx.array:
    """The factor on ``out`` that explains most of ``target``."""
    return mx.maximum((out * target).sum() / mx.maximum(mx.square(out).sum(), 1e-12), 1e-3)


def initialize_decoder_from_pca(decoder: Decoder, batches: Iterable[mx.array], *, seed: int = 0) -> Decoder:
    """Decoder rows from the principal components of ``batches`` of activations ``[n, d]``, see :func:`directions`."""
    d, found = decoder.weight.shape[1], [batch.reshape(-1, batch.shape[-1]) for batch in batches]
    if not found or any(batch.shape[1] != d for batch in found):
        shapes = [batch.shape for batch in found]
        raise ValueError(f"[initialize_decoder_from_pca] batches must be of width {d} but got {shapes}.")
    x = mx.concatenate(found)
    rows = directions("pca", x - x.mean(axis=0), decoder.weight.shape[0], seed=seed)
    decoder.weight = rows.astype(decoder.weight.dtype)
    return decoder


def initialize_encoder_as_transpose(encoder: Encoder, decoder: Decoder) -> Encoder:
    """Encoder rows that read what the decoder's write, which must be as wide."""
    if encoder.weight.shape != decoder.weight.shape:
        raise ValueError(
            "[initialize_encoder_as_transpose] encoder and decoder must agree in shape but have "
            f"{encoder.weight.shape} and {decoder.weight.shape}."
        )
    encoder.weight = mx.array(decoder.weight)
    return encoder
