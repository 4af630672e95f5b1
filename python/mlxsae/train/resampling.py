"""Dead latents made anew from what the living explain badly (Bricken et al. 2023, "Towards Monosemanticity")."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlxsae.metrics import fire_counts
from mlxsae.sae import Rule
from mlxsae.sae.rule import mean_of_others, with_rows
from mlxsae.train.callbacks import Callback, at_least_1
from mlxsae.train.randomness import seed_step

if TYPE_CHECKING:
    from mlxsae.train.loop import Run

_SCALE = 0.2
_BATCH = 1024
_UNTIL = 0.9  # of the run: what is made later has no time to learn


class DeadNeuronCallback(Callback):
    """Every ``resample_every`` steps, give dead latents new rows and no past.

    Dead are latents that fired on at most the share ``threshold`` of ``sample_size`` rows (with 0: on none) and not in the
    last ``dead_after`` tokens of the run either. Each takes a row x of the sample, drawn with probability proportional to
    the square of its squared error (``high_loss_examples``) or evenly (``random``): its decoder row is the unit vector of
    what the encoder saw of x (of the target, for a transcoder), its encoder row the same direction at 0.2 times the mean
    norm of the living's, its bias 0, a threshold or gate such as goes with that (:meth:`~mlxsae.sae.Rule.renewed`); its
    moments in the optimiser are 0. Nothing happens in the last tenth of the run, and where all are dead.

    ``resampled`` lists (step, number of latents).
    """

    STRATEGIES = ("high_loss_examples", "random")

    def __init__(
        self,
        threshold: float = 0.0,
        resample_every: int = 10_000,
        resample_strategy: str = "high_loss_examples",
        *,
        sample_size: int = 8192,
    ):
        if not 0 <= threshold < 1:
            raise ValueError(f"[DeadNeuronCallback] threshold must be in [0, 1) but got {threshold}.")
        at_least_1("DeadNeuronCallback", resample_every=resample_every, sample_size=sample_size)
        if resample_strategy not in self.STRATEGIES:
            raise ValueError(
                f"[DeadNeuronCallback] resample_strategy must be one of {list(self.STRATEGIES)} "
                f"but got {resample_strategy!r}."
            )
        self.threshold, self.every, self.strategy = threshold, resample_every, resample_strategy
        self.sample_size = sample_size
        self.resampled: list[tuple[int, int]] = []

    def of(self, name: str) -> Callback:
        return copy.deepcopy(self)

    def on_begin(self, run: Run) -> None:
        encoder, decoder = (run.state.params.get(part, {}) for part in ("encoder", "decoder"))
        if not run.widths.ours or not ("weight" in encoder and "bias" in encoder and "weight" in decoder):
            raise ValueError("[DeadNeuronCallback] the run must train encoder and decoder of an SAE of ours.")
        last = int(_UNTIL * run.config.total_steps)
        if self.every > last:
            warnings.warn(
                f"[DeadNeuronCallback] resample_every must be at most {last} for a run of {run.config.total_steps} steps, "
                f"or nothing is resampled, but is {self.every}.",
                stacklevel=2,
            )

    def on_step(self, run: Run) -> None:
        step = run.state.step
        if step % self.every or step > _UNTIL * run.config.total_steps:
            return
        x, y = run.sample(self.sample_size)
        if x.shape[0] == 0:  # the data end here
            return
        errors, fires = [], mx.zeros(run.widths.d_sae, mx.int32)
        with run.current() as sae:
            for i in range(0, x.shape[0], _BATCH):
                code = sae.learn(x[i : i + _BATCH], run.state.rule).code
                difference = y[i : i + _BATCH] - sae.decode(code, x[i : i + _BATCH])
                errors.append(mx.square(difference).sum(axis=-1))
                fires = fires + fire_counts(code, run.widths.d_sae)
                mx.eval(errors[-1], fires)
            inner = sae.encoder_input(x)
            target = inner if y is x else y - sae.decoder.bias
        silent = np.array(run.state.tokens_since_fired) >= run.config.dead_after
        dead = np.flatnonzero(silent & (np.array(fires) <= self.threshold * x.shape[0]))
        if dead.size == 0 or dead.size == silent.size:
            return
        chosen = self._draw(np.array(mx.concatenate(errors), np.float64), dead.size, run.config.seed, step)
        new = _renewed(run.state, run.sae.rule, mx.array(dead), inner[chosen], target[chosen])
        run.state = replace(run.state, **new)
        mx.eval(run.state.arrays)
        self.resampled.append((step, int(dead.size)))

    def _draw(self, errors: np.ndarray, n: int, seed: int, step: int) -> mx.array:
        weight = errors**2 if self.strategy == "high_loss_examples" else np.ones_like(errors)
        if not weight.sum() > 0:
            weight = np.ones_like(errors)
        seed_step(seed, step, stream=4)
        words = np.array(mx.random.randint(0, 2**31 - 1, (4,)))
        rng = np.random.default_rng(words.astype(np.uint32))
        # Without replacement as long as there are rows enough: two latents from one row would stay twins.
        few = np.count_nonzero(weight) < n
        return mx.array(
            rng.choice(errors.size, n, replace=bool(few), p=weight / weight.sum()).astype(np.uint32)
        )

    def state(self) -> dict[str, Any]:
        return {"resampled": [list(entry) for entry in self.resampled]}

    def restore(self, state: dict[str, Any]) -> None:
        self.resampled = [(step, n) for step, n in state["resampled"]]


def _renewed(state: Any, rule: Rule, dead: mx.array, inner: mx.array, target: mx.array) -> dict[str, Any]:
    params = tree_map(lambda p: p, state.params)
    encoder, decoder = params["encoder"], params["decoder"]
    mean, mean_size = (  # the latter 1 where decoder rows are unit vectors
        mean_of_others(mx.linalg.norm(part["weight"], axis=-1), dead) for part in (encoder, decoder)
    )
    encoder["weight"] = with_rows(encoder["weight"], dead, _unit(inner) * (_SCALE * mean))
    encoder["bias"] = with_rows(encoder["bias"], dead, mx.zeros(dead.shape[0]))
    decoder["weight"] = with_rows(decoder["weight"], dead, _unit(target) * mean_size)
    if "rule" in params:
        params["rule"] = rule.renewed(params["rule"], dead, _unit(inner), _SCALE)
    d_sae = encoder["weight"].shape[0]

    def fresh(branch: Any) -> Any:
        # A latent is a row of every array that is d_sae long; a decoder's bias is not among those.
        return tree_map(
            lambda m: (
                with_rows(m, dead, mx.zeros((dead.shape[0], *m.shape[1:]), m.dtype))
                if m.ndim and m.shape[0] == d_sae
                else m
            ),
            branch,
        )

    return {
        "params": params,
        "optimizer": _moments_reset(state.optimizer, fresh),
        "tokens_since_fired": with_rows(state.tokens_since_fired, dead, mx.zeros(dead.shape[0], mx.int32)),
        "shadow": None,  # it follows from the encoder, and is made again
    }


def _moments_reset(tree: Any, fresh: Any, name: str = "") -> Any:
    if isinstance(tree, dict):
        return {
            key: value if (name, key) == ("decoder", "bias") else _moments_reset(value, fresh, key)
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [_moments_reset(value, fresh, name) for value in tree]
    return fresh(tree)


def _unit(rows: mx.array) -> mx.array:
    return rows / mx.maximum(mx.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
