"""The engine for modules and losses of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map, tree_unflatten

from mlxsae.sae import SAE
from mlxsae.sae.rule import State
from mlxsae.train.config import TrainConfig
from mlxsae.train.constraints import unit_rows, without_parallel
from mlxsae.train.engine import Arrays, all_finite, guard, rule_of_step, substituted, woken
from mlxsae.train.gradients import recomputed, value_and_grad
from mlxsae.train.optimizers import OPTIMIZERS, emptied, set_learning_rate
from mlxsae.train.state import flat

LossFunction = Callable[..., Any]
"""``loss_fn(x, x_recon, z, step) -> total`` or ``(total, {name: value})``; ``z [n, d_sae]`` dense, ``step`` an int from
0. Further outputs of the module follow ``z`` as ``extra=`` if the function takes that name; of an SAE of ours that is
``(pre_acts,)`` where its rule makes them."""


def forward(module: nn.Module, x: mx.array) -> tuple[mx.array, mx.array, tuple]:
    """``(x_recon [n, d_out], z [n, d_sae], rest)`` of any module that returns ``(x_recon, z, ...)``."""
    out = module(x)  # type: ignore[operator]
    if not isinstance(out, (tuple, list)) or len(out) < 2:
        raise ValueError(f"[fit] the module must return (x_recon, z) but returned {type(out).__name__}.")
    x_recon, z, *rest = out
    if z.ndim != 2 or z.shape[0] != x.shape[0]:
        raise ValueError(f"[fit] z must have shape [n, d_sae] with n={x.shape[0]} but got {z.shape}.")
    return x_recon, z, tuple(rest)


def _checked(total: Any = None, terms: Any = None, *more: Any) -> tuple[mx.array, dict[str, Any]]:
    """What a loss returned: ``total``, and named numbers that no metric of the run has."""
    got = None
    if more or not isinstance(total, mx.array) or total.ndim:
        got = (
            f"total of {getattr(total, 'shape', type(total).__name__)}"
            + f" and {1 + len(more)} more" * bool(more)
        )
    elif not isinstance(terms, (dict, type(None))):
        got = f"{type(terms).__name__} after total"
    elif taken := [n for n in ("loss", "step", "tokens") if terms and n in terms and terms[n] is not total]:
        got = f"the name {taken[0]}, which the run uses"
    else:
        got = next(
            (f"{n} of shape {v.shape}" for n, v in (terms or {}).items() if getattr(v, "size", 1) != 1), None
        )
    if got is not None:
        raise ValueError(
            f"[fit] loss must return a scalar array, or (total, {{name: number}}), but returned {got}."
        )
    return total, terms or {}


def own_loss(x: mx.array, x_recon: mx.array, z: mx.array, step: int, **options: Any) -> Any:
    """For a module without a loss: the mean squared error, summed over coordinates."""
    recon = mx.square(x.astype(mx.float32) - x_recon.astype(mx.float32)).sum(axis=-1).mean()
    return recon, {"recon_loss": recon}


class ModuleEngine:
    """Any ``nn.Module`` with parameters, any loss, any MLX optimiser.

    Eager on every device, so that a loss may branch on ``step`` in Python. Dead are units whose ``z`` is not over 0.
    """

    name = "module"

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFunction | None,
        config: TrainConfig,
        optimizer: optim.Optimizer | None = None,
    ):
        if config.precision != "float32":
            raise ValueError(
                f"[fit] precision must be float32 for a module or loss of your own but got {config.precision}."
            )
        if config.optimizer.moments != "float32":
            raise ValueError(
                "[fit] moments must be float32 for a module or loss of your own but got "
                f"{config.optimizer.moments}."
            )
        if config.optimizer.variant != "dense":
            raise ValueError(
                "[fit] variant must be dense for a module or loss of your own but got "
                f"{config.optimizer.variant}."
            )
        if config.k_start is not None and not isinstance(module, SAE):
            raise ValueError(
                f"[fit] k_start must be None for a module of your own but got k_start={config.k_start}."
            )
        self._module = module
        self._loss_fn = loss_fn or own_loss
        if not callable(self._loss_fn):
            raise ValueError(
                f"[fit] loss must be a function (x, x_recon, z, step) but got {type(loss_fn).__name__}."
            )
        names = inspect.signature(self._loss_fn).parameters.values()
        self._wants_extra = any(p.name == "extra" or p.kind is p.VAR_KEYWORD for p in names)
        self._config = config
        o = config.optimizer
        self._optimizer = optimizer or OPTIMIZERS[o.name](o)
        self._step = 0
        self._gradient = value_and_grad(self._loss_of, config, eager=True)

    def optimizer_state(self, params: Arrays) -> Arrays:
        self._optimizer.init(params)
        state, self._optimizer.state = self._optimizer.state, emptied(self._optimizer)
        return tree_unflatten(list(flat(state).items()))

    def step(
        self, arrays: Arrays, x: mx.array, y: mx.array, *, lr: float, step: int, auxk: bool
    ) -> tuple[Arrays, dict[str, mx.array]]:
        config, params = self._config, arrays["params"]
        self._step = step
        carried = {key: arrays.get(key, {}) for key in ("tokens_since_fired", "rule")}
        (total, metrics, carried), gradients = self._gradient(
            params, self._module.parameters(), x, y, carried
        )
        slopes = all_finite(gradients)
        constrained = isinstance(self._module, SAE) and config.normalize_decoder
        constrained = constrained and "weight" in params.get("decoder", {})
        if constrained:
            gradients["decoder"]["weight"] = without_parallel(
                gradients["decoder"]["weight"], params["decoder"]["weight"]
            )
        if config.optimizer.max_grad_norm is not None:
            gradients, metrics["grad_norm"] = optim.clip_grad_norm(gradients, config.optimizer.max_grad_norm)
        self._optimizer.state = tree_map(lambda a: a, arrays["optimizer"])
        set_learning_rate(self._optimizer, mx.array(lr, mx.float32))
        updated = self._optimizer.apply_gradients(gradients, params)
        optimizer, self._optimizer.state = self._optimizer.state, emptied(self._optimizer)
        if constrained:
            updated["decoder"]["weight"] = unit_rows(updated["decoder"]["weight"])
        if auxk and config.wake:
            bias = woken(updated["encoder"]["bias"], arrays["tokens_since_fired"], config)
            updated["encoder"] = updated["encoder"] | {"bias": bias}
        if isinstance(self._module, SAE) and "rule" in updated:
            updated["rule"] = self._module.rule.constrain(updated["rule"])
        failed, good = guard(arrays["failed"], total, slopes, x, y, mx.array(step, mx.int32))
        new = {"params": updated, "optimizer": optimizer} | carried
        new = tree_map(lambda a, b: mx.where(good, a, b), new, {key: arrays.get(key, {}) for key in new})
        dead = (new["tokens_since_fired"] >= config.dead_after).astype(mx.float32).mean()
        return new | {"failed": failed}, metrics | {"loss": total, "dead_fraction": dead}

    def evaluate(self, arrays: Arrays, x: mx.array, y: mx.array, *, step: int) -> tuple[dict, mx.array]:
        """``loss``, its named parts and ``l0`` of one batch without a step, and how often each unit fired."""
        self._step = step
        with substituted(self._module, arrays["params"]) as module:
            total, terms, _, z = self._measured(module, x, y, arrays.get("rule", {}))
        return terms | {"loss": total}, (z > 0).sum(axis=0)

    def _loss_of(self, params: Arrays, frozen: Arrays, x: mx.array, y: mx.array, carried: Arrays) -> tuple:
        with substituted(self._module, frozen, params) as module:
            with recomputed(module, self._config.gradient_checkpointing):
                total, terms, state, z = self._measured(module, x, y, carried["rule"])
            fires = mx.stop_gradient((z > 0).any(axis=0))
        # No further than int32 counts.
        before = mx.minimum(carried["tokens_since_fired"], 2**31 - 1 - x.shape[0])
        silent = mx.where(fires, 0, before + x.shape[0])
        return total, terms, {"tokens_since_fired": silent, "rule": state}

    def _measured(
        self, module: Any, x: mx.array, y: mx.array, state: State
    ) -> tuple[mx.array, dict, State, mx.array]:
        watched: dict[str, mx.array] = {}
        if isinstance(module, SAE):
            # As in training: in use a threshold has no gradient, and a BatchTopK has one only once it is trained.
            rule = rule_of_step(
                module.rule, self._config.k_at(self._step, module.rule, module.d_sae), self._config
            )
            code, state, pre_acts = module.learn(x, state, rule=rule)
            x_recon, z, rest = module.decode(code, x), module.to_dense(code), (pre_acts,)
            rest, watched = rest if pre_acts is not None else (), rule.metrics(state)
        else:
            x_recon, z, rest = forward(module, x)
        found = self._loss_fn(y, x_recon, z, self._step, **({"extra": rest} if self._wants_extra else {}))
        total, terms = _checked(*found) if isinstance(found, (tuple, list)) else _checked(found)
        # float32 by name: a loss may count or give Python numbers.
        named = {name: mx.array(value).astype(mx.float32) for name, value in terms.items()}
        l0 = {"l0": (z > 0).sum(axis=-1).astype(mx.float32).mean()}
        return total, l0 | watched | named, state, z
