"""Dead latents made anew from what the living explain badly (Bricken et al. 2023, "Towards Monosemanticity")."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlxsae.metrics import fire_counts
from mlxsae.train.callbacks import Callback, at_least_1
from mlxsae.train.randomness import seed_step

if TYPE_CHECKING:
    from mlxsae.train.loop import Run

_SCALE = 0.2
_BATCH = 1024


class DeadNeuronCallback(Callback):
    """Every ``resample_every`` steps, give dead latents new rows and no past.

    Dead are latents that fired on at most the share ``threshold`` of ``sample_size`` rows (with 0: on none) and not in the
    last ``dead_after`` tokens of the run either. Each takes a row x of the sample, drawn with probability proportional to
    the square of its squared error (``high_loss_examples``) or evenly (``random``): its decoder row is the unit vector of
    what the encoder saw of x (of the target, for a transcoder), its encoder row the same direction at 0.2 times the mean
    norm of the living's, its bias 0; its moments in the optimiser are 0. Nothing happens in the last tenth of the run.

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
        if not run.widths.ours or "weight" not in run.state.params.get("decoder", {}):
            raise ValueError("[DeadNeuronCallback] the run must train encoder and decoder of an SAE of ours.")

    def on_step(self, run: Run) -> None:
        step = run.state.step
        if step % self.every or step > 0.9 * run.config.total_steps:
            return
        x, y = run.sample(self.sample_size)
        errors, fires = [], mx.zeros(run.widths.d_sae, mx.int32)
        with run.current() as sae:
            for i in range(0, x.shape[0], _BATCH):
                code = sae.encode(x[i : i + _BATCH])
                difference = y[i : i + _BATCH] - sae.decode(code, x[i : i + _BATCH])
                errors.append(mx.square(difference).sum(axis=-1))
                fires = fires + fire_counts(code, run.widths.d_sae)
                mx.eval(errors[-1], fires)
            inner = sae.encoder_input(x)
        silent = np.array(run.state.tokens_since_fired) >= run.config.dead_after
        dead = np.flatnonzero(silent & (np.array(fires) <= self.threshold * x.shape[0]))
        if dead.size == 0 or dead.size == silent.size:
            return
        chosen = self._draw(np.array(mx.concatenate(errors), np.float64), dead.size, run.config.seed, step)
        target = inner if y is x else y - run.state.params["decoder"]["bias"]
        run.state = replace(run.state, **_renewed(run.state, mx.array(dead), inner[chosen], target[chosen]))
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


def _renewed(state: Any, dead: mx.array, inner: mx.array, target: mx.array) -> dict[str, Any]:
    params = tree_map(lambda p: p, state.params)
    encoder, decoder = params["encoder"], params["decoder"]
    alive = mx.ones(encoder["weight"].shape[0]).at[dead].add(-1.0)
    norms = mx.linalg.norm(encoder["weight"], axis=-1)
    mean = (norms * alive).sum() / alive.sum()
    size = mx.linalg.norm(decoder["weight"], axis=-1)
    mean_size = (size * alive).sum() / alive.sum()  # 1 where decoder rows are unit vectors
    encoder["weight"] = _with_rows(encoder["weight"], dead, _unit(inner) * (_SCALE * mean))
    encoder["bias"] = _with_rows(encoder["bias"], dead, mx.zeros(dead.shape[0]))
    decoder["weight"] = _with_rows(decoder["weight"], dead, _unit(target) * mean_size)
    d_sae = encoder["weight"].shape[0]

    def fresh(branch: Any) -> Any:
        # A latent is a row of every array that is d_sae long; a decoder's bias is not among those.
        return tree_map(
            lambda m: (
                _with_rows(m, dead, mx.zeros((dead.shape[0], *m.shape[1:]), m.dtype))
                if m.ndim and m.shape[0] == d_sae
                else m
            ),
            branch,
        )

    return {
        "params": params,
        "optimizer": _moments_reset(state.optimizer, fresh),
        "tokens_since_fired": _with_rows(state.tokens_since_fired, dead, mx.zeros(dead.shape[0], mx.int32)),
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


def _with_rows(a: mx.array, rows: mx.array, new: mx.array) -> mx.array:
    return mx.put_along_axis(
        a,
        mx.broadcast_to(rows.reshape(-1, *(1,) * (a.ndim - 1)), (rows.shape[0], *a.shape[1:])),
        new.astype(a.dtype),
        axis=0,
    )


def _unit(rows: mx.array) -> mx.array:
    return rows / mx.maximum(mx.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
