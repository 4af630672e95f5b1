"""Accumulators over many batches: float64 sums on the host, one synchronisation per batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsae.code import Code, n_tokens
from mlxsae.metrics.functions import ce_loss_recovered, fire_bins


class Reconstruction:
    """FVU, explained variance and NMSE over the whole set, not a mean over batches.

    Each batch is reduced on the device about its own mean and merged in float64 (Chan et al. 1979), so a mean
    that is large against the spread costs no digits.
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean: np.ndarray | float = 0.0
        self._scatter = 0.0  # sum of squared distances from the mean so far
        self._error = 0.0
        self._ratio = 0.0

    def update(self, x: mx.array, x_hat: mx.array) -> None:
        """``x`` and ``x_hat`` of shape ``[..., d]``; leading axes are tokens."""
        self._merge(self._reduce(x, x_hat))

    @staticmethod
    def _reduce(x: mx.array, x_hat: mx.array) -> tuple[int, *tuple[mx.array, ...]]:
        shapes = x.shape, x_hat.shape
        x, x_hat = (a.reshape(-1, a.shape[-1]).astype(mx.float32) for a in (x, x_hat))
        if x.shape != x_hat.shape:
            raise ValueError(
                f"[Reconstruction] x and x_hat must have one shape [..., d] but got {shapes[0]} and {shapes[1]}."
            )
        first = x[:1]  # equal tokens have no variance, to the last digit
        apart = x - first
        about = apart.mean(axis=0)
        rest = apart - about
        # The mean in two parts: their float32 sum would be off by its rounding.
        mean = first.sum(axis=0), about + rest.mean(axis=0)
        error = mx.square(x - x_hat).sum(axis=-1)
        # Rows are summed by the host: a float32 sum over a large batch would lose digits.
        return x.shape[0], *mean, mx.square(rest).sum(axis=-1), error, error / mx.square(x).sum(axis=-1)

    def _merge(self, parts: tuple[int, *tuple[mx.array, ...]]) -> None:
        n, *arrays = parts
        if n == 0:
            return
        mx.eval(arrays)
        first, about, scatter, error, ratio = (np.array(a, dtype=np.float64) for a in arrays)
        shift = first + about - self._mean
        total = self.n + n
        # A batch's mean is off by the rounding of a spread; the scatter about it is exact up to n * rounding^2.
        self._scatter += float(scatter.sum()) + float(shift @ shift) * self.n * n / total
        self._mean = self._mean + shift * (n / total)
        self._error += float(error.sum())
        self._ratio += float(ratio.sum())
        self.n = total

    @property
    def mean(self) -> np.ndarray:
        """Mean activation over all tokens, float64 ``[d]``: what mean ablation puts in its place."""
        return np.asarray(self._mean)

    def result(self) -> dict[str, float]:
        if self.n == 0:
            raise ValueError("[Reconstruction] there must be at least one token but got none.")
        with np.errstate(divide="ignore", invalid="ignore"):
            fvu = float(np.float64(self._error) / np.float64(self._scatter))
        return {
            "fvu": fvu,
            "explained_variance": 1.0 - fvu,
            "nmse": self._ratio / self.n,
            "mse": self._error / self.n,
        }


class FireCounter:
    """How often each latent fires, and how many fire per token.

    Counts stay on the device as int32 per batch and join a 64-bit total on the host.
    """

    def __init__(self, d_sae: int) -> None:
        self.n = 0
        self.counts = np.zeros(d_sae, np.int64)

    def update(self, code: Code) -> None:
        """Count one batch.

        Raises
        ------
        ValueError
            Latents that fire and are not below ``d_sae``; dense ones of another width.
        """
        self._merge(n_tokens(code), fire_bins(code, self.counts.size))

    def _merge(self, n: int, bins: mx.array) -> None:
        found = np.array(bins, dtype=np.int64)
        if found[-1]:
            raise ValueError(
                f"[FireCounter] latents must be below d_sae={self.counts.size} but {found[-1]} firings are of others."
            )
        self.counts += found[:-1]
        self.n += n

    @property
    def fire_rate(self) -> np.ndarray:
        """Fraction of tokens on which each latent fired: float64 ``[d_sae]``."""
        return self.counts / max(self.n, 1)

    def result(self) -> dict[str, float]:
        if self.n == 0:
            raise ValueError("[FireCounter] there must be at least one token but got none.")
        return {"l0": float(self.counts.sum()) / self.n, "dead_fraction": float((self.counts == 0).mean())}


class LossRecovered:
    """Cross entropy with the SAE spliced in, against the clean model and against ablations, over many
    batches.

    ``update`` takes summed cross entropies (nats) over the same ``n`` predicted tokens, any set of names that
    contains ``clean`` and ``sae``; every other name, such as ``zero`` and ``mean``, is an ablation.
    """

    def __init__(self) -> None:
        self.n = 0
        self._sums: dict[str, float] = {}

    def update(self, n: int, **ce_sums: mx.array | float) -> None:
        if {"clean", "sae"} - ce_sums.keys():
            raise ValueError(f"[LossRecovered] sums must contain clean and sae but got {sorted(ce_sums)}.")
        if self._sums and ce_sums.keys() != self._sums.keys():
            raise ValueError(
                f"[LossRecovered] every batch must give {sorted(self._sums)} but got {sorted(ce_sums)}."
            )
        mx.eval(list(ce_sums.values()))
        for name, value in ce_sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self.n += int(n)

    def result(self) -> dict[str, float]:
        """``ce_<name>`` per token, and ``loss_recovered_<ablation>`` for each ablation."""
        if self.n == 0:
            raise ValueError("[LossRecovered] there must be at least one token but got none.")
        ce = {name: total / self.n for name, total in self._sums.items()}
        recovered = {
            f"loss_recovered_{name}": ce_loss_recovered(ce["clean"], ce["sae"], value)
            for name, value in ce.items()
            if name not in ("clean", "sae")
        }
        return {f"ce_{name}": value for name, value in ce.items()} | recovered


class Throughput:
    """Tokens per second between construction (or ``restart``) and now."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        self.tokens = 0
        self._start = self._clock()

    def update(self, n_tokens: int) -> None:
        self.tokens += n_tokens

    @property
    def seconds(self) -> float:
        return self._clock() - self._start

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


class Evaluation:
    """All metrics of an SAE on held-out activations: ``fvu``, ``explained_variance``, ``nmse``, ``mse``,
    ``l0``, ``dead_fraction``, ``n_tokens``.

    ``dead_fraction`` is over the tokens seen here, so it falls with their number: state it.
    """

    def __init__(self, d_sae: int) -> None:
        self.reconstruction = Reconstruction()
        self.fired = FireCounter(d_sae)

    def update(self, y: mx.array, y_hat: mx.array, code: Code) -> None:
        """Target and reconstruction ``[..., d_out]`` and the code between them."""
        sums = self.reconstruction._reduce(y, y_hat)
        bins = fire_bins(code, self.fired.counts.size)
        mx.eval(sums[1:], bins)
        self.fired._merge(n_tokens(code), bins)
        self.reconstruction._merge(sums)

    def result(self) -> dict[str, float]:
        return self.reconstruction.result() | self.fired.result() | {"n_tokens": self.fired.n}


def evaluate(sae: Any, batches: Iterable[mx.array | tuple[mx.array, mx.array]]) -> dict[str, float]:
    """Metrics of ``sae`` over ``batches`` of activations ``[..., d_in]``, or of pairs (input, target) for a
    transcoder. A token of a crosscoder is that of all its sources together, however they are given.

    Raises
    ------
    ValueError
        No token; a batch of a transcoder without its target.
    """
    evaluation = Evaluation(sae.d_sae)
    for batch in batches:
        if not isinstance(batch, tuple) and getattr(sae, "transcoder", False):
            raise ValueError(
                "[evaluate] batches of a transcoder must be tuples (input, target) but got "
                f"{type(batch).__name__}: its target is not its input."
            )
        x, y = batch if isinstance(batch, tuple) else (batch, batch)
        code = sae.encode(x)
        y_hat = sae.decode(code, x)
        evaluation.update(y.reshape(y_hat.shape), y_hat, code)
    return evaluation.result()
