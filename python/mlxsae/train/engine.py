"""Engines: two ways to make one step, one law. From the same state they give the same next state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class FusedEngine:
    """Adam in one pass over features, without gradient buffers: :func:`mlxsae.ops.feature_update`.

    For losses made of reconstruction terms and AuxK (see :meth:`refusal`). Weights and moments are updated in
    place.
    """

    name = "fused"

    def __init__(self, sae: SAE, loss: Loss, config: TrainConfig):
        if reason := self.refusal(sae, loss):
            raise ValueError(f"[fit] engine must be autodiff for this run but got fused: {reason}.")
        self._sae = sae
        self._loss = loss
        self._config = config

    @staticmethod
    def refusal(sae: SAE, loss: Loss) -> str:
        """Why the pass cannot make this run's steps; empty where it can."""
        if not sae.rule.fused or tree_flatten(sae.rule.parameters()):
            return f"the rule {type(sae.rule).__name__} has no fused op"
        if loss.terms:
            return f"the loss has the terms {sorted(loss.terms)}"
        if loss.auxk is not None and not loss.auxk[1].fused:
            return f"the AuxK preset {loss.auxk[1].preset} has no fused form"
        if len(tree_flatten(sae.trainable_parameters())) != len(tree_flatten(sae.parameters())):
            return "some parameters are frozen"
        return ""

    def optimizer_state(self, params: Arrays) -> Arrays:
        # The tree of mlx.optimizers.Adam: a run may change engines at a checkpoint.
        adam = optim.Adam(1.0, bias_correction=True)
        adam.init(params)
        return _copied(adam.state)

    def step(
        self, arrays: Arrays, x: mx.array, y: mx.array, *, lr: float, step: int, auxk: bool
    ) -> tuple[Arrays, dict[str, mx.array]]:
        config, params = self._config, _rows(arrays["params"])
        with _parameters(self._sae, arrays["params"]) as sae:
            inner = sae.encoder_input(x)
            code = sae.rule.encode(inner, params.w_enc, params.b_enc)
            residual, squares = ops.decode_residual(code, params.w_dec, y, params.b_dec)
            (total, metrics), weights = mx.value_and_grad(self._loss.of_squares)(squares, y)
            fired = ops.update_tokens_since_fired(arrays["tokens_since_fired"], code)
            dead = fired >= config.dead_after
            terms = [ops.Term(residual * weights[:, None], code, mx.array(2.0))]
            if auxk and self._loss.auxk is not None:
                weight, term = self._loss.auxk
                aux_code = term.code(sae, x, dead)
                aux_hat = ops.sparse_decode(aux_code, params.w_dec)
                value, gradient = mx.value_and_grad(lambda a: term.distance(y, y + residual, a, dead))(
                    aux_hat
                )
                metrics["auxk"] = value
                total = total + weight * value
                terms.append(ops.Term(gradient, aux_code, mx.array(weight)))
        failed, good = guard(arrays["failed"], total, x, y, mx.array(step, mx.int32))
        # A kernel in flight holds its weights, and weights that are held cannot be updated in place: the forward
        # pass must be over before the update is begun, or the step copies them.
        mx.eval(terms, metrics, fired, dead, failed, good)
        adam = arrays["optimizer"]
        m, v = (ops.Params(*(adam[part][name][moment] for part, name in _PLACES)) for moment in "mv")
        clip = config.optimizer.max_grad_norm
        updated, m, v, norm, _ = ops.feature_update(
            inner,
            terms,
            params,
            m,
            v,
            loss=mx.where(good, total, mx.array(float("nan"))),
            lr=lr,
            step=step + 1,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            project_decoder=config.normalize_decoder,
            normalize_decoder=config.normalize_decoder,
            b_dec_to_input=self._sae.apply_b_dec_to_input,
            clip_norm=clip or 0.0,
        )
        metrics |= {"loss": total, "l0": l0(code), "dead_fraction": dead.astype(mx.float32).mean()}
        if clip is not None:
            metrics["grad_norm"] = norm
        moments = _tree([{"m": a, "v": b} for a, b in zip(m, v, strict=True)])
        counted = {"step": adam["step"] + good.astype(mx.uint64), "learning_rate": mx.array(lr, mx.float32)}
        new = {
            "params": _tree(updated),
            "optimizer": moments | counted,
            "tokens_since_fired": mx.where(good, fired, arrays["tokens_since_fired"]),
            "failed": failed,
        }
        return new, metrics


def make_engine(name: str, sae: SAE, loss: Loss, config: TrainConfig) -> Engine:
    """The engine ``autodiff`` or ``fused``; ``auto`` is the fused one wherever it can make the steps."""
    if name == "auto":
        name = "autodiff" if FusedEngine.refusal(sae, loss) else "fused"
    return (FusedEngine if name == "fused" else AutodiffEngine)(sae, loss, config)


def _rows(tree: Arrays) -> ops.Params:
    return ops.Params(*(tree[part][name] for part, name in _PLACES))


def _tree(leaves: Sequence[Any]) -> Arrays:
    tree: Arrays = {"encoder": {}, "decoder": {}}
    for (part, name), leaf in zip(_PLACES, leaves, strict=True):
        tree[part][name] = leaf
    return tree


_PLACES = (("encoder", "weight"), ("encoder", "bias"), ("decoder", "weight"), ("decoder", "bias"))


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
