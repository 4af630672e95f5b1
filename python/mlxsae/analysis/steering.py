"""Steering by features, as deltas: the SAE's error stays in the activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral

import mlx.core as mx

from mlxsae.code import DenseCode, to_slots
from mlxsae.sae import SAE, Crosscoder
from mlxsae.sae.model import layer_norm

MODES = ("scale", "add", "set")


def steer(sae: SAE, strengths: Mapping[int, float], *, mode: str = "scale") -> Callable[[mx.array], mx.array]:
    """An edit ``x -> x + sum_i (f'_i - f_i) W_dec[i]`` for :func:`mlxsae.lm.splice` and ``generate``; for an SAE that
    normalises each token, times the token's standard deviation.

    ``f_i`` is latent ``i`` of ``x``; only the difference that steering makes is added, so whatever the SAE does not
    reconstruct stays as it was, and an edit that changes no latent changes no bit.

    Parameters
    ----------
    sae : SAE
        Input and target are the same activation. A crosscoder steers all its sources at once.
    strengths : {feature: strength}
        Indices in ``[0, d_sae)``.
    mode : str
        ``scale``: ``f' = strength * f``; 0 ablates, and a feature that does not fire stays silent.
        ``add``: ``f' = f + strength``. ``set``: ``f' = strength`` at every token.

    Returns
    -------
    function
        ``[..., d] -> [..., d]``, in the dtype of its argument; for a crosscoder also ``[..., n_sources, d_source]``.

    Raises
    ------
    ValueError
        An unknown mode, no feature, one out of range, a strength that is not finite, a transcoder; from the edit, an
        activation of another width.
    """
    if mode not in MODES:
        raise ValueError(f"[steer] mode must be one of {', '.join(MODES)} but got {mode!r}.")
    if sae.transcoder:
        raise ValueError(
            "[steer] the SAE's target must be its input but it is a transcoder with "
            f"d_in={sae.d_in} and d_out={sae.d_out}."
        )
    if not strengths:
        raise ValueError("[steer] strengths must name at least one feature but is empty.")
    for feature, strength in strengths.items():
        if isinstance(feature, bool) or not isinstance(feature, Integral) or not 0 <= feature < sae.d_sae:
            raise ValueError(f"[steer] a feature must be an int in [0, {sae.d_sae}) but got {feature!r}.")
        if not math.isfinite(strength):
            raise ValueError(f"[steer] a strength must be finite but feature {feature} got {strength}.")
    features = mx.array([int(i) for i in strengths], mx.uint32)
    strength = mx.array([float(s) for s in strengths.values()], mx.float32)
    directions = sae.decoder.weight[features].astype(mx.float32)

    def edit(x: mx.array) -> mx.array:
        if isinstance(sae, Crosscoder) and x.shape[-2:] == (sae.n_sources, sae.d_source):
            return edit(x.reshape(*x.shape[:-2], sae.d_in)).reshape(x.shape)
        if x.shape[-1:] != (sae.d_in,):
            raise ValueError(f"[steer] x must have shape [..., {sae.d_in}] but got {x.shape}.")
        if mode == "add":
            change = mx.broadcast_to(strength, (*x.shape[:-1], strength.size))
        else:
            f = latents_of(sae, x, features)
            change = f * (strength - 1) if mode == "scale" else strength - f
        delta = change @ directions
        if sae.normalize_activations == "layer_norm":
            delta = delta * layer_norm(x)[2]
        return x + delta.astype(x.dtype)

    return edit


def latents_of(sae: SAE, x: mx.array, features: mx.array) -> mx.array:
    """Latents of a few ``features [m]`` for ``x [..., d_in]``: float32 ``[..., m]``, 0 where the rule leaves one out."""
    code = sae.encode(x)
    if isinstance(
        code, DenseCode
    ):  # slots would leave out latents below 0, which an activation of one's own may give
        return code.values[..., features].astype(mx.float32)
    values, indices = to_slots(code)
    chosen = indices[..., None] == features
    latents = mx.where(chosen, values[..., None].astype(mx.float32), 0).sum(axis=-2)
    return latents.reshape(*x.shape[:-1], features.size)
