r"""Steps with a gradient: pseudo-derivatives of discontinuous functions (Rajamanoharan et al. 2024, arXiv 2407.14435).

A threshold :math:`\theta` moves what fires only in jumps. The derivative of the *expected* loss is estimated from the
pre-activations within half a bandwidth :math:`\epsilon` of it, with the rectangle kernel
:math:`K(u) = [|u| < 1/2]`, :math:`u = (z - \theta) / \epsilon`.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx


def _near(pre_acts: mx.array, threshold: mx.array, bandwidth: float) -> mx.array:
    """``K(u) / epsilon``."""
    return (mx.abs(pre_acts - threshold) < 0.5 * bandwidth) / bandwidth


def jump_relu(
    pre_acts: mx.array, threshold: mx.array, *, bandwidth: float, through_input: bool = False
) -> mx.array:
    r""":math:`z [z > \theta]` of ``pre_acts [n, d_sae]`` and ``threshold [d_sae]``, or one of the shape of ``pre_acts``.

    Derivatives: :math:`[z > \theta]` for z, :math:`-\theta K(u) / \epsilon` for the threshold. ``through_input`` adds the
    negative of the latter to z's (Anthropic, January 2025): moving the threshold down is moving z up.
    """

    def step_gradient(near: mx.array, threshold: mx.array) -> mx.array:
        return threshold * near

    return _stepped(lambda z, t: mx.where(z > t, z, 0), step_gradient, True, bandwidth, through_input)(
        pre_acts, threshold
    )


def step(
    pre_acts: mx.array, threshold: mx.array, *, bandwidth: float, through_input: bool = False
) -> mx.array:
    r""":math:`[z > \theta]` as 0 or 1: its sum over latents is the L0 of a token.

    Derivatives: 0 for z, :math:`-K(u) / \epsilon` for the threshold; ``through_input`` as in :func:`jump_relu`.
    """
    return _stepped(
        lambda z, t: (z > t).astype(z.dtype), lambda near, t: near, False, bandwidth, through_input
    )(pre_acts, threshold)


def _stepped(
    value: Callable[[mx.array, mx.array], mx.array],
    height: Callable[[mx.array, mx.array], mx.array],
    slope: bool,
    bandwidth: float,
    through_input: bool,
) -> Callable[[mx.array, mx.array], mx.array]:
    """A function of (z, theta) that jumps by a height at theta and has slope 1 or 0 above it."""

    @mx.custom_function
    def f(z: mx.array, t: mx.array) -> mx.array:
        return value(z, t)

    @f.vjp
    def f_vjp(primals, cotangent, _):  # type: ignore[no-untyped-def]
        z, t = primals
        jump = cotangent * height(_near(z, t, bandwidth), t)
        dz = cotangent * (z > t) if slope else mx.zeros_like(z)
        per_latent = t.ndim < z.ndim
        dt = -(jump.sum(axis=0) if per_latent else jump)
        # Thresholds are float32 where the rest of a step is bfloat16 (mixed precision).
        return (dz + jump if through_input else dz).astype(z.dtype), dt.astype(t.dtype)

    return f  # type: ignore[return-value]
