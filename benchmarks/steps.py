"""One training step in MLX: ours through the public ops, and the same step in plain MLX ops."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import mlx.core as mx
import numpy as np

from benchmarks.shapes import Shape, Weights
from mlxsae import ops

LR, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8


class OurStep:
    """TopK, mean squared error, decoder projection, dense-exact Adam, unit decoder rows.

    ``b_dec_path`` lets ``b_dec`` learn through the encoder too, as SAELens and dictionary_learning do; ``clip_norm``
    clips by the global gradient norm.
    """

    def __init__(self, shape: Shape, start: Weights):
        self.shape = shape
        self.params = ops.Params(*(mx.array(a) for a in start))
        self.m = ops.Params(*(mx.zeros_like(p) for p in self.params))
        self.v = ops.Params(*(mx.zeros_like(p) for p in self.params))
        self.tokens_since_fired = mx.zeros(shape.d_sae, mx.int32)
        self.count = 0
        mx.eval(self.params, self.m, self.v, self.tokens_since_fired)

    def step(self, x: mx.array, *, b_dec_path: bool = True, clip_norm: float = 0.0) -> float:
        centred, code = self._encode(x)
        residual, loss = self._decode(code, x)
        self.tokens_since_fired = ops.update_tokens_since_fired(self.tokens_since_fired, code)
        self._update(centred, code, residual, loss, b_dec_path, clip_norm)
        del centred, code, residual
        mx.eval(self.params, self.m, self.v, self.tokens_since_fired, loss)
        return loss.item()

    def phases(self, x: mx.array, *, b_dec_path: bool = True, clip_norm: float = 0.0) -> dict[str, float]:
        """Seconds of each part, each forced to end before the next begins: their sum is more than a step."""
        marks = [time.perf_counter()]

        def mark(*arrays: object) -> None:
            mx.eval(*arrays)
            marks.append(time.perf_counter())

        centred, code = self._encode(x)
        mark(centred, code)
        residual, loss = self._decode(code, x)
        mark(residual, loss)
        self.tokens_since_fired = ops.update_tokens_since_fired(self.tokens_since_fired, code)
        mark(self.tokens_since_fired)
        self._update(centred, code, residual, loss, b_dec_path, clip_norm)
        mark(self.params, self.m, self.v)
        names = ("encode", "decode_residual", "bookkeeping", "update")
        return {name: b - a for name, (a, b) in zip(names, pairwise(marks), strict=True)}

    def encode(self, x: mx.array) -> ops.SparseCode:
        code = self._encode(x)[1]
        mx.eval(code)
        return code

    def _encode(self, x: mx.array) -> tuple[mx.array, ops.SparseCode]:
        centred = x - self.params.b_dec
        return centred, ops.topk_encode(centred, self.params.w_enc, self.params.b_enc, k=self.shape.k)

    def _decode(self, code: ops.SparseCode, x: mx.array) -> tuple[mx.array, mx.array]:
        residual, square = ops.decode_residual(code, self.params.w_dec, x, self.params.b_dec)
        return residual, mx.mean(square)

    def _update(
        self,
        centred: mx.array,
        code: ops.SparseCode,
        residual: mx.array,
        loss: mx.array,
        b_dec_path: bool,
        clip_norm: float,
    ) -> None:
        self.count += 1
        term = ops.Term(residual, code, mx.array(2 / self.shape.n))
        # The state leaves self before it goes in: a second reference would make the update copy it.
        params, m, v = self.params, self.m, self.v
        del self.params, self.m, self.v
        self.params, self.m, self.v, _ = ops.feature_update(
            centred,
            [term],
            params,
            m,
            v,
            loss=loss,
            lr=LR,
            step=self.count,
            betas=BETAS,
            eps=EPS,
            b_dec_to_input=b_dec_path,
            clip_norm=clip_norm,
        )

    def parameters(self) -> dict[str, np.ndarray]:
        return {name: np.array(a) for name, a in self.params._asdict().items()}


class PlainStep:
    """The same step written with MLX's own ops and automatic differentiation.

    ``decode="dense"`` scatters the code into ``[n, d_sae]`` and multiplies; ``"gather"`` sums gathered rows, which takes
    ``[n, k, d_in]``.
    """

    def __init__(self, shape: Shape, start: Weights, decode: str):
        self.shape = shape
        self.params = {name: mx.array(a) for name, a in start._asdict().items()}
        self.m = {name: mx.zeros_like(p) for name, p in self.params.items()}
        self.v = {name: mx.zeros_like(p) for name, p in self.params.items()}
        self.tokens_since_fired = mx.zeros(shape.d_sae, mx.int32)
        self.count = 0
        self._decode: Callable[..., mx.array] = {"dense": _decode_dense, "gather": _decode_gather}[decode]
        mx.eval(self.params, self.m, self.v, self.tokens_since_fired)

    def step(self, x: mx.array) -> float:
        self.count += 1

        def loss_of(params: dict[str, mx.array]) -> tuple[mx.array, mx.array, mx.array]:
            z = (x - params["b_dec"]) @ params["w_enc"].T + params["b_enc"]
            indices = mx.argpartition(mx.stop_gradient(z), kth=-self.shape.k, axis=-1)[:, -self.shape.k :]
            values = mx.maximum(mx.take_along_axis(z, indices, axis=-1), 0)
            x_hat = self._decode(values, indices, params["w_dec"], z) + params["b_dec"]
            return mx.square(x_hat - x).sum(axis=-1).mean(), values, indices

        (loss, values, indices), grads = mx.value_and_grad(loss_of)(self.params)
        w_dec = self.params["w_dec"]
        grads["w_dec"] = grads["w_dec"] - (grads["w_dec"] * w_dec).sum(axis=-1, keepdims=True) * w_dec
        for name, g in grads.items():
            self.m[name] = BETAS[0] * self.m[name] + (1 - BETAS[0]) * g
            self.v[name] = BETAS[1] * self.v[name] + (1 - BETAS[1]) * mx.square(g)
            m_hat = self.m[name] / (1 - BETAS[0] ** self.count)
            v_hat = self.v[name] / (1 - BETAS[1] ** self.count)
            self.params[name] = self.params[name] - LR * m_hat / (mx.sqrt(v_hat) + EPS)
        norm = mx.linalg.norm(self.params["w_dec"], axis=-1, keepdims=True)
        self.params["w_dec"] = self.params["w_dec"] / norm
        fired = mx.zeros(self.shape.d_sae).at[indices.flatten()].maximum(values.flatten()) > 0
        self.tokens_since_fired = mx.where(fired, 0, self.tokens_since_fired + self.shape.n)
        del grads
        mx.eval(self.params, self.m, self.v, self.tokens_since_fired, loss)
        return loss.item()

    def select(self, x: mx.array) -> np.ndarray:
        z = (x - self.params["b_dec"]) @ self.params["w_enc"].T + self.params["b_enc"]
        return np.array(mx.argpartition(z, kth=-self.shape.k, axis=-1)[:, -self.shape.k :])

    def parameters(self) -> dict[str, np.ndarray]:
        return {name: np.array(a) for name, a in self.params.items()}


def _decode_dense(values: mx.array, indices: mx.array, w_dec: mx.array, z: mx.array) -> mx.array:
    return mx.put_along_axis(mx.zeros_like(z), indices, values, axis=-1) @ w_dec


def _decode_gather(values: mx.array, indices: mx.array, w_dec: mx.array, z: mx.array) -> mx.array:
    return (w_dec[indices] * values[..., None]).sum(axis=1)
