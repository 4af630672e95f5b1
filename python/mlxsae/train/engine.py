"""Engines: two ways to make one step, one law. From the same state they give the same next state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxsae import ops
from mlxsae.loss import Forward, Loss
from mlxsae.metrics import l0
from mlxsae.sae import SAE
from mlxsae.train.config import TrainConfig
from mlxsae.train.constraints import unit_rows, without_parallel
from mlxsae.train.state import ACTIVATIONS, LOSS

Arrays = dict[str, Any]
"""``TrainState.arrays``."""


class Engine(Protocol):
    name: str

    def optimizer_state(self, params: Arrays) -> Arrays:
        """The state before the first step."""
        ...

    def step(
        self, arrays: Arrays, x: mx.array, y: mx.array, *, lr: float, step: int, auxk: bool
    ) -> tuple[Arrays, dict[str, mx.array]]:
        """Next arrays, and metrics as unread scalars: ``loss``, each term, ``l0``, ``dead_fraction``.

        ``x [n, d_in]`` and ``y [n, d_out]`` are in the parameters' (scaled) space. The given arrays are dead
        afterwards: drop every reference to them before evaluating, or the update copies instead of writing in
        place.
        """
        ...


class AutodiffEngine:
    """Any loss, any MLX optimiser: ``mx.value_and_grad`` with dense weight gradients.

    On a GPU the step is compiled. On the CPU it is not: MLX would start a C++ compiler, for seconds and where
    there is one, to fuse what is a small part of the step.
    """

    name = "autodiff"

    def __init__(self, sae: SAE, loss: Loss, config: TrainConfig, optimizer: optim.Optimizer | None = None):
        o = config.optimizer
        self._sae = sae
        self._loss = loss
        self._config = config
        self._optimizer = optimizer or optim.Adam(1.0, list(o.betas), o.eps, bias_correction=True)
        compiled = mx.compile if mx.default_device().type == mx.gpu else lambda graph: graph
        self._steps = {auxk: compiled(self._graph(auxk)) for auxk in (False, True)}

    def optimizer_state(self, params: Arrays) -> Arrays:
        self._optimizer.init(params)
        return _copied(self._optimizer.state)

    def step(
        self, arrays: Arrays, x: mx.array, y: mx.array, *, lr: float, step: int, auxk: bool
    ) -> tuple[Arrays, dict[str, mx.array]]:
        frozen = self._sae.parameters()
        return self._steps[auxk](arrays, frozen, x, y, mx.array(lr, mx.float32), mx.array(step, mx.int32))

    def _graph(self, auxk: bool) -> Callable[..., tuple[Arrays, dict[str, mx.array]]]:
        config = self._config

        def loss_of(
            params: Arrays, frozen: Arrays, x: mx.array, y: mx.array, tokens_since_fired: mx.array
        ) -> tuple:
            with _parameters(self._sae, frozen, params) as sae:
                code = sae.encode(x)
                fired = ops.update_tokens_since_fired(tokens_since_fired, _detached(code))
                dead = fired >= config.dead_after
                forward = Forward(sae, x, y, code, sae.decode(code), dead if auxk else None)
                total, terms = self._loss(forward)
            return total, terms | {"l0": l0(code)}, fired, dead

        def graph(arrays: Arrays, frozen: Arrays, x: mx.array, y: mx.array, lr: mx.array, step: mx.array):
            params = arrays["params"]
            (total, metrics, fired, dead), gradients = mx.value_and_grad(loss_of)(
                params, frozen, x, y, arrays["tokens_since_fired"]
            )
            constrained = config.normalize_decoder and "weight" in params.get("decoder", {})
            if constrained:
                gradients["decoder"]["weight"] = without_parallel(
                    gradients["decoder"]["weight"], params["decoder"]["weight"]
                )
            if config.optimizer.max_grad_norm is not None:
                gradients, metrics["grad_norm"] = optim.clip_grad_norm(
                    gradients, config.optimizer.max_grad_norm
                )
            self._optimizer.state = _copied(arrays["optimizer"]) | {"learning_rate": lr}
            updated = self._optimizer.apply_gradients(gradients, params)
            if constrained:
                updated["decoder"]["weight"] = unit_rows(updated["decoder"]["weight"])
            failed, good = guard(arrays["failed"], total, x, y, step)
            new = {"params": updated, "optimizer": self._optimizer.state, "tokens_since_fired": fired}
            new = tree_map(lambda a, b: mx.where(good, a, b), new, {key: arrays[key] for key in new})
            metrics |= {"loss": total, "dead_fraction": dead.astype(mx.float32).mean()}
            return new | {"failed": failed}, metrics

        return graph


def guard(
    failed: mx.array, total: mx.array, x: mx.array, y: mx.array, step: mx.array
) -> tuple[mx.array, mx.array]:
    """The next ``failed`` and whether this step may update: once a loss is not finite, nothing is updated any
    more, without asking the host.
    """
    finite = mx.isfinite(x).all() & mx.isfinite(y).all()
    what = mx.where(finite, LOSS, ACTIVATIONS)
    now = mx.stack([step, what]).astype(mx.int32)
    good = (failed[0] < 0) & finite & mx.isfinite(total)
    return mx.where((failed[0] >= 0) | good, failed, now), good


class _parameters:
    """The module with other parameters in it, for the length of a block: tracers must not stay behind."""

    def __init__(self, sae: SAE, *params: Arrays):
        self._sae, self._params = sae, params

    def __enter__(self) -> SAE:
        self._own = self._sae.parameters()
        for params in self._params:
            self._sae.update(params)
        return self._sae

    def __exit__(self, *exception: object) -> None:
        self._sae.update(self._own)


def _detached(code: Any) -> Any:
    return type(code)(*(mx.stop_gradient(part) for part in code))


def _copied(tree: Arrays) -> Arrays:
    """The same arrays in new dicts (MLX's optimisers write into theirs)."""
    return tree_unflatten(tree_flatten(tree))
