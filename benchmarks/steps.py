"""One training step in MLX: ours through the public ops, and the same step in plain MLX ops."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from benchmarks.shapes import Shape, Weights
from mlxsae import SAE, SparseCode, ops
from mlxsae.sae import Rule, TopK
from mlxsae.train import LossConfig, OptimizerConfig, TrainConfig
from mlxsae.train.engine import make_engine

LR, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8
AUXK_WEIGHT = 1 / 32


class OurStep:
    """TopK, mean squared error, decoder projection, dense-exact Adam, unit decoder rows, composed of public ops.

    ``b_dec_path`` lets ``b_dec`` learn through the encoder too, as SAELens and dictionary_learning do; ``clip_norm``
    clips by the global gradient norm; ``auxk`` adds dictionary_learning's AuxK with ``k_aux = d_in / 2`` over a fixed
    twentieth of the features, dead by decree: real ones would come back to life while they are timed. ``certified``
    screens the encoder's product with a shadow that it keeps up to date.
    """

    def __init__(self, shape: Shape, start: Weights, *, certified: bool = False):
        self.shape = shape
        self.params = ops.Params(*(mx.array(a) for a in start))
        self.m = ops.Params(*(mx.zeros_like(p) for p in self.params))
        self.v = ops.Params(*(mx.zeros_like(p) for p in self.params))
        self.tokens_since_fired = mx.zeros(shape.d_sae, mx.int32)
        self.dead = mx.arange(shape.d_sae) % 20 == 7
        self.count = 0
        self.shadow = ops.encoder_shadow(self.params.w_enc) if certified else None
        mx.eval(self.params, self.m, self.v, self.tokens_since_fired, self.dead, self.shadow)

    def step(
        self, x: mx.array, *, b_dec_path: bool = True, clip_norm: float = 0.0, auxk: bool = False
    ) -> float:
        centred, codes = self._encode(x, auxk)
        terms, loss = self._forward(codes, x)
        fired = ops.update_tokens_since_fired(self.tokens_since_fired, codes[0])
        # A kernel in flight holds its weights, and held weights cannot be updated in place.
        mx.eval(centred, terms, loss, fired)
        self._update(centred, terms, loss, b_dec_path, clip_norm)
        self.tokens_since_fired = fired
        mx.eval(self.params, self.m, self.v, self.shadow)
        return loss.item()

    def phases(self, x: mx.array) -> dict[str, float]:
        """Seconds of each part, each forced to end before the next begins: their sum is more than a step."""
        marks = [time.perf_counter()]

        def mark(*arrays: object) -> None:
            mx.eval(*arrays)
            marks.append(time.perf_counter())

        centred, codes = self._encode(x, False)
        mark(centred, codes)
        terms, loss = self._forward(codes, x)
        mark(terms, loss)
        self.tokens_since_fired = ops.update_tokens_since_fired(self.tokens_since_fired, codes[0])
        mark(self.tokens_since_fired)
        self._update(centred, terms, loss, True, 0.0)
        mark(self.params, self.m, self.v)
        names = ("encode", "decode_residual", "bookkeeping", "update")
        return {name: b - a for name, (a, b) in zip(names, pairwise(marks), strict=True)}

    def update_seconds(self, x: mx.array, *, b_dec_path: bool = True, clip_norm: float = 0.0) -> float:
        """A step, and the seconds of its update."""
        centred, codes = self._encode(x, False)
        terms, loss = self._forward(codes, x)
        mx.eval(centred, terms, loss)
        start = time.perf_counter()
        self._update(centred, terms, loss, b_dec_path, clip_norm)
        mx.eval(self.params, self.m, self.v)
        return time.perf_counter() - start

    def encode(self, x: mx.array) -> SparseCode:
        (code,) = self._encode(x, False)[1]
        mx.eval(code)
        return code

    def _encode(self, x: mx.array, auxk: bool) -> tuple[mx.array, tuple[SparseCode, ...]]:
        centred, w, b, k = x - self.params.b_dec, self.params.w_enc, self.params.b_enc, self.shape.k
        if not auxk:
            return centred, (ops.topk_encode(centred, w, b, k=k, shadow=self.shadow),)
        k_aux = self.shape.d_in // 2
        return centred, ops.topk_encode_masked(
            centred, w, b, mask=self.dead, k=k, k_aux=k_aux, shadow=self.shadow
        )

    def _forward(self, codes: tuple[SparseCode, ...], x: mx.array) -> tuple[list[ops.Term], mx.array]:
        residual, square = ops.decode_residual(codes[0], self.params.w_dec, x, self.params.b_dec)
        terms, loss = [ops.Term(residual, codes[0], mx.array(2 / self.shape.n))], mx.mean(square)
        for code in codes[1:]:
            variance = mx.square(residual - residual.mean(axis=0)).sum()
            aux_residual, aux_square = ops.decode_residual(code, self.params.w_dec, -residual)
            terms.append(ops.Term(aux_residual, code, AUXK_WEIGHT * 2 / variance))
            loss = loss + AUXK_WEIGHT * aux_square.sum() / variance
        return terms, loss

    def _update(
        self, centred: mx.array, terms: list[ops.Term], loss: mx.array, b_dec_path: bool, clip_norm: float
    ) -> None:
        self.count += 1
        # The state leaves self before it goes in: a second reference would make the update copy it.
        params, m, v, shadow = self.params, self.m, self.v, self.shadow
        del self.params, self.m, self.v, self.shadow
        self.params, self.m, self.v, _, self.shadow = ops.feature_update(
            centred,
            terms,
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
            shadow=shadow,
        )

    def parameters(self) -> dict[str, np.ndarray]:
        return {name: np.array(a) for name, a in self.params._asdict().items()}


class TrainerStep:
    """The same step as ``mlxsae.fit`` makes it: the engine that it chooses for a mean squared error."""

    def __init__(
        self,
        shape: Shape,
        start: Weights,
        *,
        rule: type[Rule] = TopK,
        precision: str = "float32",
        moments: str = "float32",
    ):
        w_enc, b_enc, w_dec, b_dec = (mx.array(a) for a in start)
        sae = SAE.from_weights(w_enc.T, w_dec, b_enc, b_dec, rule=rule(shape.k))
        config = TrainConfig(
            precision=precision,
            optimizer=OptimizerConfig(learning_rate=LR, betas=BETAS, eps=EPS, moments=moments),
            loss=LossConfig(reconstruction="mse", auxk=None),
        )
        self.engine = make_engine("auto", sae, config.loss.build(sae), config)
        params = sae.trainable_parameters()
        self.arrays: dict[str, Any] = {
            "params": params,
            "optimizer": self.engine.optimizer_state(params),
            "tokens_since_fired": mx.zeros(shape.d_sae, mx.int32),
            "failed": mx.array([-1, 0], mx.int32),
            "rule": sae.rule.initial_state(),
        }
        mx.eval(self.arrays)
        # The engine needs the module for its structure; its weights are the state's.
        sae.update(tree_map(lambda _: mx.zeros(1), sae.parameters()))
        self.count = 0

    def step(self, x: mx.array) -> float:
        arrays = self.arrays
        del self.arrays
        self.arrays, metrics = self.engine.step(arrays, x, x, lr=LR, step=self.count, auxk=False)
        del arrays
        self.count += 1
        mx.eval(self.arrays, metrics)
        return metrics["loss"].item()

    def parameters(self) -> dict[str, np.ndarray]:
        p = self.arrays["params"]
        return {
            "w_enc": np.array(p["encoder"]["weight"]),
            "b_enc": np.array(p["encoder"]["bias"]),
            "w_dec": np.array(p["decoder"]["weight"]),
            "b_dec": np.array(p["decoder"]["bias"]),
        }


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
