"""Engines: two ways to make one step, one law. From the same state they give the same next state."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxsae import ops
from mlxsae.code import DenseCode, Sparse, detached
from mlxsae.loss import Context, Forward, Loss
from mlxsae.loss.matryoshka import bands
from mlxsae.metrics import l0
from mlxsae.sae import SAE, Rule
from mlxsae.sae.rule import State
from mlxsae.train.config import TrainConfig
from mlxsae.train.constraints import unit_rows, without_parallel
from mlxsae.train.gradients import recomputed, value_and_grad
from mlxsae.train.optimizers import OPTIMIZERS, emptied, set_learning_rate
from mlxsae.train.state import ACTIVATIONS, GRADIENT, LOSS, Lazy

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

        With ``auxk`` the loss has its AuxK term, over latents that were dead before this batch
        (``tokens_since_fired >= dead_after``); ``dead_fraction`` counts those that are dead after it.
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
        reason = FusedEngine.refusal(sae, loss, config) or "autodiff was asked for"
        if config.precision not in ("float32", "tf32"):
            raise ValueError(
                f"[fit] precision must be float32 or tf32 for the autodiff engine but got {config.precision}: {reason}."
            )
        if o.moments != "float32":
            raise ValueError(
                f"[fit] moments must be float32 for the autodiff engine but got {o.moments}: {reason}."
            )
        if config.precision == "float32" and not sae.rule.fused and ops.products_are_tf32():
            warnings.warn(
                "[fit] precision is float32 but MLX multiplies float32 in TF32 on this GPU: set MLX_ENABLE_TF32=0, or "
                "say precision='tf32'.",
                stacklevel=2,
            )
        if o.variant != "dense":
            raise ValueError(
                f"[fit] variant must be dense for the autodiff engine but got {o.variant}: {reason}."
            )
        self._sae = sae
        self._loss = loss
        self._config = config
        self._optimizer = optimizer or OPTIMIZERS[o.name](o)
        self._eager = mx.default_device().type != mx.gpu
        self._compiled = (lambda graph: graph) if self._eager else mx.compile
        self._steps: dict[tuple[bool, int | None], Callable[..., tuple[Arrays, dict[str, mx.array]]]] = {}

    def optimizer_state(self, params: Arrays) -> Arrays:
        self._optimizer.init(params)
        state, self._optimizer.state = self._optimizer.state, emptied(self._optimizer)
        return _copied(state)

    def step(
        self,
        arrays: Arrays,
        x: mx.array,
        y: mx.array,
        *,
        lr: float,
        step: int,
        auxk: bool,
        context: Context | None = None,
    ) -> tuple[Arrays, dict[str, mx.array]]:
        k = self._config.k_at(step, self._sae.rule, self._sae.d_sae)
        frozen = self._sae.parameters()
        scheduled = self._loss.scheduled(step, self._sae.d_sae, self._config.seed)
        scheduled |= {"lr": mx.array(lr, mx.float32), "step": mx.array(step, mx.int32)}
        if context is not None:  # through a language model, which hooks want eager
            return self._graph(auxk, k)(arrays, frozen, x, y, scheduled | context.named())
        if (auxk, k) not in self._steps:
            self._steps[auxk, k] = self._compiled(self._graph(auxk, k))
        return self._steps[auxk, k](arrays, frozen, x, y, scheduled)

    def _graph(self, auxk: bool, k: int | None) -> Callable[..., tuple[Arrays, dict[str, mx.array]]]:
        config = self._config

        def loss_of(params: Arrays, frozen: Arrays, x: mx.array, y: mx.array, carried: Arrays) -> tuple:
            silent = carried["tokens_since_fired"]
            scheduled = carried["scheduled"]
            with (
                substituted(self._sae, frozen, params) as sae,
                recomputed(sae, config.gradient_checkpointing),
            ):
                rule = rule_of_step(sae.rule, k, config)
                code, state, pre_acts = sae.learn(x, carried["rule"], rule=rule)
                dead = silent >= config.dead_after if auxk else None
                forward = Forward(sae, x, y, code, sae.decode(code, x), dead, pre_acts, scheduled, k)
                total, terms = self._loss(forward)
                metrics = terms | {"l0": l0(code)} | rule.metrics(state)
            fired = ops.update_tokens_since_fired(silent, detached(code))
            return total, metrics, carried | {"tokens_since_fired": fired, "rule": state}

        gradient_of = value_and_grad(loss_of, config, eager=self._eager)

        def graph(arrays: Arrays, frozen: Arrays, x: mx.array, y: mx.array, scheduled: Arrays):
            params = arrays["params"]
            carried = {key: arrays.get(key, {}) for key in ("tokens_since_fired", "rule")}
            carried["scheduled"] = scheduled
            (total, metrics, carried), gradients = gradient_of(params, frozen, x, y, carried)
            carried.pop("scheduled")
            slopes = all_finite(gradients)
            constrained = config.normalize_decoder and "weight" in params.get("decoder", {})
            if constrained:
                gradients["decoder"]["weight"] = without_parallel(
                    gradients["decoder"]["weight"], params["decoder"]["weight"]
                )
            if config.optimizer.max_grad_norm is not None:
                gradients, metrics["grad_norm"] = optim.clip_grad_norm(
                    gradients, config.optimizer.max_grad_norm
                )
            self._optimizer.state = _copied(arrays["optimizer"])
            set_learning_rate(self._optimizer, scheduled["lr"])
            updated = self._optimizer.apply_gradients(gradients, params)
            # What stays in the optimiser would be a second copy of the moments, or tracers.
            optimizer, self._optimizer.state = self._optimizer.state, emptied(self._optimizer)
            if constrained:
                updated["decoder"]["weight"] = unit_rows(updated["decoder"]["weight"])
            if auxk and config.wake:
                bias = woken(updated["encoder"]["bias"], arrays["tokens_since_fired"], config)
                updated["encoder"] = updated["encoder"] | {"bias": bias}
            if "rule" in updated:
                updated["rule"] = self._sae.rule.constrain(updated["rule"])
            failed, good = guard(arrays["failed"], total, slopes, x, y, scheduled["step"])
            new = {"params": updated, "optimizer": optimizer} | carried
            old = {key: arrays.get(key, {}) for key in new}
            new = tree_map(lambda a, b: mx.where(good, a, b), new, old)
            metrics |= {"loss": total, "dead_fraction": _dead_fraction(new["tokens_since_fired"], config)}
            return new | {"failed": failed}, metrics

        return graph


class FusedEngine:
    """Adam in one pass over features, without gradient buffers: :func:`mlxsae.ops.feature_update`.

    For losses made of reconstruction terms and AuxK (see :meth:`refusal`). Weights, moments and the encoder's
    shadow are updated in place. The forward pass is awaited, so the host decides what becomes of a bad batch.

    Under lazy Adam (``OptimizerConfig.variant``) a step leaves decoder rows behind, and ``arrays["lazy"]`` says which:
    the decoder and its moments in the given ``arrays`` are replaced by ones that have caught up where the batch reads
    them, which is the same state. :meth:`settled` lets all rows catch up.
    """

    name = "fused"

    def __init__(self, sae: SAE, loss: Loss, config: TrainConfig):
        if reason := self.refusal(sae, loss, config):
            raise ValueError(f"[fit] engine must be autodiff for this run but got fused: {reason}.")
        # No weights among these: they are the state's.
        self._rule = sae.rule
        self._d_sae = sae.d_sae
        self._b_dec_to_input = sae.apply_b_dec_to_input
        self._loss = loss
        self._config = config

    @staticmethod
    def refusal(sae: SAE, loss: Loss, config: TrainConfig) -> str:
        """Why the pass cannot make this run's steps; empty where it can."""
        if config.autodiff_only:
            return config.autodiff_only
        if type(sae).learn is not SAE.learn or sae.rank_by_decoder_norm:
            return f"the {type(sae).__name__} chooses latents in a way of its own"
        rule = type(sae.rule)
        if not rule.fused or tree_flatten(sae.rule.parameters()):
            return f"the rule {rule.__name__} has no fused op"
        if config.precision == "certified" and not rule.certified:
            return f"the op of the rule {rule.__name__} does not screen in bfloat16"
        if loss.terms:
            return f"the loss has the terms {sorted(loss.terms)}"
        if loss.auxk is not None and not loss.auxk[1].fused:
            return f"the AuxK preset {loss.auxk[1].preset} has no fused form"
        trained = {name for name, _ in tree_flatten(sae.parameters())}
        if trained != {f"{part}.{name}" for part, name in _PLACES}:
            return "encoder and decoder are not all of its parameters, or are tied"
        if len(tree_flatten(sae.trainable_parameters())) != len(trained):
            return "some parameters are frozen"
        return ""

    def optimizer_state(self, params: Arrays) -> Arrays:
        # The tree of mlx.optimizers.Adam: a run may change engines at a checkpoint.
        adam = optim.Adam(1.0, bias_correction=True)
        adam.init(params)
        state = _copied(adam.state)
        kept = getattr(mx, self._config.optimizer.moments)
        for part in ("encoder", "decoder"):
            state[part]["weight"] = tree_map(lambda a: a.astype(kept), state[part]["weight"])
        return state

    def step(
        self, arrays: Arrays, x: mx.array, y: mx.array, *, lr: float, step: int, auxk: bool
    ) -> tuple[Arrays, dict[str, mx.array]]:
        config = self._config
        variant = config.optimizer.variant
        shadow = arrays.get("shadow")
        if shadow is None and config.precision in ("certified", "bfloat16"):
            dtype = mx.bfloat16 if config.precision == "bfloat16" else None
            shadow = ops.encoder_shadow(arrays["params"]["encoder"]["weight"], dtype=dtype)
        rule = rule_of_step(self._rule, config.k_at(step, self._rule, self._d_sae), config)
        scheduled = self._loss.scheduled(step, self._d_sae, config.seed)
        carried = arrays["tokens_since_fired"], arrays.get("rule", {})
        encoded = self._encode(_rows(arrays["params"]), shadow, rule, *carried, x, auxk)
        lazy = touched = None
        if variant == "lazy":
            lazy = arrays.get("lazy") or Lazy(mx.full(self._d_sae, step, mx.int32), step, (), config)
            touched = _touched(self._d_sae, encoded.code, encoded.aux_code)
            mx.eval(encoded, touched)
            due = mx.arange(self._d_sae) % LAZY_WINDOW == step % LAZY_WINDOW
            _catch_up(arrays, lazy, touched | due)
        params = _rows(arrays["params"])
        f = self._forward(encoded, params, rule, carried[0], x, y, scheduled.get("prefixes"))
        # A kernel in flight holds its weights, and weights that are held cannot be updated in place: the forward
        # pass must be over before the update is begun, or the step copies them.
        mx.eval(f)
        failed, metrics = arrays["failed"], f.metrics
        first = int(np.array(failed)[0])
        what = 0 if mx.isfinite(f.witness).item() else _fault(metrics["loss"], x, y)
        clip = config.optimizer.max_grad_norm
        if first >= 0 or what:
            if clip is not None:
                metrics["grad_norm"] = mx.array(math.nan)
            behind = {} if lazy is None else {"lazy": lazy}
            now = failed if first >= 0 else mx.array([step, what], mx.int32)
            return arrays | {"failed": now} | behind, metrics
        adam = arrays["optimizer"]
        m, v = (ops.Params(*(adam[part][name][moment] for part, name in _PLACES)) for moment in "mv")
        updated = ops.feature_update(
            f.inner,
            f.terms,
            params,
            m,
            v,
            loss=metrics["loss"],
            lr=lr,
            step=step + 1,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            project_decoder=config.normalize_decoder,
            normalize_decoder=config.normalize_decoder,
            b_dec_to_input=self._b_dec_to_input,
            clip_norm=clip or 0.0,
            untouched={"dense": "step", "lazy": "keep_decoder", "row_sparse": "keep"}[variant],
            shadow=shadow,
        )
        if clip is not None:
            metrics["grad_norm"] = updated.grad_norm
        moments = _tree([{"m": a, "v": b} for a, b in zip(updated.m, updated.v, strict=True)])
        after = updated.params
        if auxk and config.wake:
            after = after._replace(b_enc=woken(after.b_enc, arrays["tokens_since_fired"], config))
        new = {
            "params": _tree(after),
            "optimizer": moments | {"step": adam["step"] + 1, "learning_rate": mx.array(lr, mx.float32)},
            "tokens_since_fired": f.tokens_since_fired,
            "failed": failed,
            "rule": f.rule,
        }
        if lazy is not None and touched is not None:
            last_step = mx.where(touched, step + 1, lazy.last_step)
            new["lazy"] = replace(
                lazy, last_step=last_step, step=step + 1, rates=(*lazy.rates, lr)[-LAZY_WINDOW:]
            )
        return new if shadow is None else new | {"shadow": updated.shadow}, metrics

    @staticmethod
    def settled(arrays: Arrays) -> Arrays:
        """``arrays`` of a run under lazy Adam with every row of the decoder at the last step, without ``lazy``."""
        arrays = dict(arrays)
        lazy = arrays.pop("lazy")
        _catch_up(arrays, lazy, mx.ones(lazy.last_step.shape, mx.bool_))
        return arrays

    def _encode(
        self,
        params: ops.Params,
        shadow: ops.Shadow | None,
        rule: Rule,
        tokens_since_fired: mx.array,
        state: State,
        x: mx.array,
        auxk: bool,
    ) -> _Encoded:
        inner = x - params.b_dec if self._b_dec_to_input else x
        encoder = inner, params.w_enc, params.b_enc
        if self._config.precision == "bfloat16" and shadow is not None:
            encoder, shadow = (inner.astype(mx.bfloat16), shadow.w16, params.b_enc), None
        dead = tokens_since_fired >= self._config.dead_after
        auxiliary = self._loss.auxk if auxk else None
        if auxiliary is None:
            encoded, aux_code = rule.learn(*encoder, state, shadow), None
        else:
            k_aux = min(auxiliary[1].k_aux, self._d_sae)
            encoded, aux_code = rule.learn_masked(*encoder, state, dead, k_aux, shadow)
        assert not isinstance(encoded.code, DenseCode)
        aux_code = None if aux_code is None else _in_float32(aux_code)
        return _Encoded(inner, _in_float32(encoded.code), aux_code, encoded.state, dead)

    def _forward(
        self,
        encoded: _Encoded,
        params: ops.Params,
        rule: Rule,
        tokens_since_fired: mx.array,
        x: mx.array,
        y: mx.array,
        prefixes: mx.array | None,
    ) -> _Forward:
        """What follows the encoder in a step, but for the update.

        MLX's elementwise ops run on one CPU thread, so passes over ``[n, d]`` count: beside our kernels there are
        ``inner`` and what the loss asks of ``y``.
        """
        code, aux_code = encoded.code, encoded.aux_code
        nested = [code] if prefixes is None else bands(code, prefixes)
        residuals, squares = [], []
        for (
            band
        ) in nested:  # what one prefix leaves over is what the next band of latents is measured against
            target = -residuals[-1] if residuals else y
            r, s = ops.decode_residual(band, params.w_dec, target, None if residuals else params.b_dec)
            residuals.append(r)
            squares.append(s)
        residual = residuals[-1]
        (total, metrics), weights = mx.value_and_grad(self._loss.of_squares)(squares, y)
        if prefixes is None and self._loss.uniform:
            terms = [ops.Term(residual, code, 2 * weights[0][0])]
        else:
            terms = self._nested_terms(nested, residuals, weights)
        if aux_code is not None:
            assert self._loss.auxk is not None
            weight, term = self._loss.auxk
            goal = term.goal(-residual, code, lambda part: ops.sparse_decode(part, params.w_dec))
            aux_residual, aux_squares = ops.decode_residual(aux_code, params.w_dec, goal)
            factor = term.factor(y, goal, encoded.dead)
            metrics["auxk"] = factor * aux_squares.sum()
            total = total + weight * metrics["auxk"]
            terms.append(ops.Term(aux_residual, aux_code, 2 * weight * factor))
        fired = ops.update_tokens_since_fired(tokens_since_fired, code)
        metrics |= {"loss": total, "l0": l0(code), "dead_fraction": _dead_fraction(fired, self._config)}
        metrics |= rule.metrics(encoded.rule)
        # What is not finite in y shows in its square; in x it may be lost where every pre-activation falls.
        witness = total + squares[-1].sum() + (0 if y is x else x.sum())
        return _Forward(encoded.inner, terms, metrics, fired, encoded.rule, witness)

    def _nested_terms(
        self, nested: list[Any], residuals: list[mx.array], weights: list[mx.array]
    ) -> list[ops.Term]:
        """A latent answers for every prefix that it is in: for its own band's and all wider ones."""
        terms, gradient = [], None
        for band, r, w in reversed(list(zip(nested, residuals, weights, strict=True))):
            own = r * (w[0] if self._loss.uniform else w[:, None])
            gradient = own if gradient is None else gradient + own
            terms.append(ops.Term(gradient, band, mx.array(2.0)))
        return terms[::-1]


class _Encoded(NamedTuple):
    """What :class:`FusedEngine` has of a step once the latents are chosen."""

    inner: mx.array  # what the encoder saw, [n, d_in]
    code: Sparse
    aux_code: Sparse | None
    rule: State
    dead: mx.array  # bool [d_sae]


class _Forward(NamedTuple):
    """What :class:`FusedEngine` knows of a step before the update."""

    inner: mx.array  # what the encoder saw, [n, d_in]
    terms: list[ops.Term]
    metrics: dict[str, mx.array]
    tokens_since_fired: mx.array
    rule: State
    witness: mx.array  # finite only if loss and activations are


LAZY_WINDOW = 64
"""Steps that a row of the decoder stays behind at most under lazy Adam."""


def _touched(d_sae: int, *codes: Sparse | None) -> mx.array:
    """bool [d_sae]: the latents that the codes use."""
    one = mx.ones(d_sae, mx.int32)
    found = [ops.update_tokens_since_fired(one, code) == 0 for code in codes if code is not None]
    return found[0] if len(found) == 1 else found[0] | found[1]


def _catch_up(arrays: Arrays, lazy: Lazy, rows: mx.array) -> None:
    """Lets ``rows`` of the decoder in ``arrays`` catch up. It leaves them before it goes in: a second reference would make
    the op copy it."""
    if not lazy.rates:  # nobody is behind
        return
    decoder, adam = arrays["params"]["decoder"], arrays["optimizer"]["decoder"]["weight"]
    out = ops.adam_catch_up(
        decoder.pop("weight"),
        adam.pop("m"),
        adam.pop("v"),
        lazy.last_step,
        rows,
        step=lazy.step,
        lr=lazy.rates,
        betas=lazy.config.optimizer.betas,
        eps=lazy.config.optimizer.eps,
        normalize=lazy.config.normalize_decoder,
    )
    decoder["weight"], adam["m"], adam["v"], lazy.last_step = out
    mx.eval(out)


def make_engine(
    name: str, sae: SAE, loss: Loss, config: TrainConfig, optimizer: optim.Optimizer | None = None
) -> Engine:
    """The engine ``autodiff`` or ``fused``; ``auto`` is the fused one wherever it can make the steps. An ``optimizer``
    of one's own wants autodiff."""
    if optimizer is not None:
        if name == "fused":
            raise ValueError("[fit] engine must be autodiff for an optimizer of your own but got fused.")
        return AutodiffEngine(sae, loss, config, optimizer)
    if name == "auto":
        name = "autodiff" if FusedEngine.refusal(sae, loss, config) else "fused"
    return (FusedEngine if name == "fused" else AutodiffEngine)(sae, loss, config)


def rule_of_step(rule: Rule, k: int | None, config: TrainConfig) -> Rule:
    """``rule`` as a step of a run takes it: with the ``k`` of the step, at the run's precision."""
    rule = rule if k is None else rule.with_k(k)
    return rule.with_tf32() if config.precision == "tf32" else rule


def _in_float32(code: Sparse) -> Sparse:
    return code if code.values.dtype == mx.float32 else code._replace(values=code.values.astype(mx.float32))


def _rows(tree: Arrays) -> ops.Params:
    return ops.Params(*(tree[part][name] for part, name in _PLACES))


def _tree(leaves: Sequence[Any]) -> Arrays:
    tree: Arrays = {"encoder": {}, "decoder": {}}
    for (part, name), leaf in zip(_PLACES, leaves, strict=True):
        tree[part][name] = leaf
    return tree


_PLACES = (("encoder", "weight"), ("encoder", "bias"), ("decoder", "weight"), ("decoder", "bias"))


def guard(
    failed: mx.array, total: mx.array, slopes: mx.array, x: mx.array, y: mx.array, step: mx.array
) -> tuple[mx.array, mx.array]:
    """The next ``failed`` and whether this step may update: once a loss is not finite, or ``slopes`` says that of
    its gradients, nothing is updated any more, without asking the host.
    """
    finite = mx.isfinite(x).all() & mx.isfinite(y).all()
    what = mx.where(finite, mx.where(mx.isfinite(total), GRADIENT, LOSS), ACTIVATIONS)
    now = mx.stack([step, what]).astype(mx.int32)
    good = (failed[0] < 0) & finite & mx.isfinite(total) & slopes
    return mx.where((failed[0] >= 0) | good, failed, now), good


def all_finite(gradients: Arrays) -> mx.array:
    """Of a finite loss too they may not be: the root of a latent that is 0 has none."""
    leaves: Any = tree_flatten(gradients)
    return mx.stack([mx.isfinite(g).all() for _, g in leaves]).all()


def _fault(total: mx.array, x: mx.array, y: mx.array) -> int:
    """What of a suspect step is not finite; 0 if all is, and only a sum of it overflowed."""
    if not (mx.isfinite(x).all() & mx.isfinite(y).all()).item():
        return ACTIVATIONS
    return 0 if mx.isfinite(total).item() else LOSS


def woken(bias: mx.array, tokens_since_fired: mx.array, config: TrainConfig) -> mx.array:
    """The encoder's bias, risen by ``wake`` where a latent was dead before the batch."""
    assert config.wake is not None  # the run has decided
    return bias + config.wake * (tokens_since_fired >= config.dead_after).astype(bias.dtype)


def _dead_fraction(tokens_since_fired: mx.array, config: TrainConfig) -> mx.array:
    return (tokens_since_fired >= config.dead_after).astype(mx.float32).mean()


class substituted:
    """The module with other parameters in it, for the length of a block: tracers must not stay behind."""

    def __init__(self, sae: Any, *params: Arrays):
        self._sae, self._params = sae, params

    def __enter__(self) -> Any:
        self._own = self._sae.parameters()
        for params in self._params:
            self._sae.update(params)
        return self._sae

    def __exit__(self, *exception: object) -> None:
        self._sae.update(self._own)


def _copied(tree: Arrays) -> Arrays:
    """The same arrays in new dicts (MLX's optimisers write into theirs)."""
    return tree_unflatten(tree_flatten(tree))
