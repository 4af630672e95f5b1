"""Nested prefixes over any rule, and annealing of k."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxsae import loss as L
from mlxsae import ops, to_dense
from mlxsae.metrics import evaluate
from mlxsae.sae import RULES, SAE, BatchTopK, GroupMax, JumpReLU, TopK, of_rule
from mlxsae.train import Callback, LossConfig, Run, SAEConfig, fit
from test_rules import D_SAE, D, K, data, half_dead, settings, source, weights


@pytest.mark.parametrize("reconstruction", ["mse", "nmse"])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_loss_and_gradients_are_those_of_the_definition(rule: str, reconstruction: str) -> None:
    """Prefix by prefix, on dense latents, with plain MLX."""
    kind = RULES[rule]
    x = mx.array(data(64))
    sae = of_rule(D, D_SAE, rule=kind(K) if "k" in kind.PARAMETERS else kind(), seed=0)
    widths, shares = [6, 20, D_SAE], [0.5, 0.3, 0.2]
    loss = L.Loss(
        {"r": (2.0, L.RECONSTRUCTION[reconstruction])},
        prefixes=L.FixedPrefixes((6, 20), weights=(5, 3, 2)),
    )

    def ours(x: mx.array) -> mx.array:
        code, _, pre_acts = sae.learn(x, sae.rule.initial_state())
        scheduled = loss.scheduled(0, D_SAE)
        return loss(L.Forward(sae, x, x, code, sae.decode(code), None, pre_acts, scheduled))[0]

    def dense(x: mx.array) -> mx.array:
        acts = to_dense(sae.learn(x, sae.rule.initial_state()).code, D_SAE)
        total = mx.array(0.0)
        for width, share in zip(widths, shares, strict=True):
            y_hat = acts[:, :width] @ sae.decoder.weight[:width] + sae.decoder.bias
            error = mx.square(x - y_hat).sum(axis=1)
            term = error.mean() if reconstruction == "mse" else (error / mx.square(x).sum(axis=1)).mean()
            total = total + 2 * share * term
        return total

    (a, da), (b, db) = (nn.value_and_grad(sae, f)(x) for f in (ours, dense))
    assert a.item() == pytest.approx(b.item(), rel=1e-5)
    for (name, mine), theirs in zip(_flat(da), dict(_flat(db)).values(), strict=True):
        scale = np.abs(np.array(theirs)).max()
        # The main loss moves no gate, and no threshold that is far from what was selected.
        assert scale > 0 or (rule, name) in (("gated", "encoder.bias"), ("topk_jumprelu", "rule.threshold"))
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * scale + 1e-12, err_msg=name)


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    return sorted(tree_flatten(tree))  # type: ignore[arg-type]


@pytest.mark.parametrize("reconstruction", ["fvu", "nmse"])
@pytest.mark.parametrize("rule", [TopK, BatchTopK])
@pytest.mark.parametrize("prefixes", [dict(prefixes=(0.125, 0.5)), dict(random_prefixes=4)])
def test_two_engines_one_law(prefixes: dict, rule: type, reconstruction: str) -> None:
    """With AuxK, clipping and fresh random prefixes at each step."""
    loss = LossConfig(reconstruction=reconstruction, dead_after=640, k_aux=6, **prefixes)
    trained = []
    for engine in ("fused", "autodiff"):
        sae = half_dead(SAE(D, D_SAE, rule=rule(K), seed=0))
        config = settings(50, engine=engine, loss=loss, log_every=1)
        config = replace(config, optimizer=replace(config.optimizer, max_grad_norm=0.05))
        history = fit(sae, source(), config).history
        trained.append((weights(sae), history))
    (fused, history), (autodiff, other) = trained
    assert max(r.get("auxk", 0) for r in history) > 0
    for a, b in zip(history, other, strict=True):
        for name in ("loss", "prefixes", reconstruction):
            assert a[name] == pytest.approx(b[name], rel=2e-4)
    for name, a in autodiff.items():
        assert np.abs(fused[name] - a).max() <= 5e-5 * np.abs(a).max(), name


def test_the_fused_engine_gathers_no_more_than_without(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    op = ops.feature_update

    def counted(x: mx.array, terms: list, *rest: Any, **options: Any) -> Any:
        seen.append([int((t.code.values > 0).sum()) for t in terms])
        return op(x, terms, *rest, **options)

    monkeypatch.setattr(ops, "feature_update", counted)
    loss = LossConfig(auxk=None, prefixes=(0.25, 0.5))
    fit(SAE(D, D_SAE, k=K, seed=0), source(), settings(2, loss=loss))
    assert [len(s) for s in seen] == [3, 3]
    assert sum(seen[0]) <= 64 * K


def test_a_prefix_stands_by_itself() -> None:
    """The first eighth of the latents explains far more than that of an SAE trained without prefixes."""

    def prefix_fvu(loss: LossConfig) -> tuple[float, float]:
        sae = SAE(D, D_SAE, k=K, seed=0)
        fit(sae, source(), settings(500, loss=loss))
        x = mx.array(data(2000, seed=7))
        short = SAE.from_weights(sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, k=K)
        short.decoder.weight = mx.where(mx.arange(D_SAE)[:, None] < D_SAE // 4, sae.W_dec, 0)
        return evaluate(short, [x])["fvu"], evaluate(sae, [x])["fvu"]

    nested, whole = prefix_fvu(LossConfig(prefixes=(0.25,)))
    plain, _ = prefix_fvu(LossConfig())
    assert nested < 0.7 * plain
    assert whole < 0.2


def test_random_prefixes_depend_on_seed_and_step_alone() -> None:
    draw = L.RandomPrefixes(6)
    drawn = np.array([draw.at(step, 1000, seed=3) for step in range(2000)])
    assert (drawn == [draw.at(step, 1000, seed=3) for step in range(2000)]).all()
    assert drawn.shape == (2000, 6)
    assert (np.diff(drawn) >= 0).all()
    assert drawn.min() >= 1
    assert (drawn[:, -1] == 1000).all()
    # The law: P(width > w) = (w^-a - d^-a) / (1 - d^-a).
    for w in (4, 30, 300):
        share = (drawn[:, :-1] >= w).mean()
        assert share == pytest.approx((w**-0.5 - 1000**-0.5) / (1 - 1000**-0.5), abs=0.02)
    assert (drawn != [draw.at(step, 1000, seed=4) for step in range(2000)]).any()


def test_resumed_with_random_prefixes(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_step(self, run: Run) -> None:
            if run.state.step == 33:
                raise KeyboardInterrupt

    config = settings(loss=LossConfig(random_prefixes=3), k_start=12, k_warmup=0.8)
    whole = SAE(D, D_SAE, k=K, seed=0)
    fit(whole, source(), config)
    with pytest.raises(KeyboardInterrupt):
        fit(SAE(D, D_SAE, k=K, seed=0), source(), config, checkpoint_dir=tmp_path, callbacks=[Stop()])
    resumed = SAE(D, D_SAE, k=K, seed=0)
    fit(resumed, source(), config, checkpoint_dir=tmp_path, resume=True)
    for name, a in weights(whole).items():
        np.testing.assert_array_equal(weights(resumed)[name], a, err_msg=name)


@pytest.mark.parametrize("engine", ["fused", "autodiff"])
@pytest.mark.parametrize("rule", [TopK, BatchTopK])
def test_k_is_annealed(rule: Any, engine: str) -> None:
    config = settings(20, engine=engine, log_every=1, k_start=12, k_warmup=0.5, loss=LossConfig(auxk=None))
    sae = SAE(D, D_SAE, rule=rule(K), seed=0)
    l0 = [r["l0"] for r in fit(sae, source(), config).history]
    assert l0 == pytest.approx([round(12 - 0.8 * s) for s in range(10)] + [K] * 10)
    assert sae.rule.k == K
    config = replace(config, engine="auto")
    # The warm-up of a sparsity that no penalty makes: k falls from 8 times itself, or from all.
    seeds = SAEConfig(architecture=sae.rule.architecture, k=K, sparsity_warm_up_steps=5)
    assert (seeds.train.k_start, seeds.train.k_warmup) == (8 * K, 5)
    seeds = replace(config, k_start=8 * K, k_warmup=5)
    sae = SAE(D, 4 * K, rule=rule(K), seed=0)
    assert [seeds.k_at(s, sae.rule, 4 * K) for s in range(6)] == [
        *(round(4 * K - 3 * K * s / 5) for s in range(5)),
        None,
    ]
    l0 = [r["l0"] for r in fit(sae, source(), seeds).history]
    assert l0[0] > 1.5 * K
    assert max(l0[5:]) <= K
    for rule, message in (
        (JumpReLU(), r"k_start wants a rule with a k but got JumpReLU"),
        (JumpReLU(K), r"\[JumpReLU\] k must not be annealed, since only the loss aims at it, but got k=12"),
        (GroupMax(K), r"\[GroupMax\] k must not be annealed, since it must divide d_sae, but got k=12"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(SAE(D, D_SAE, rule=rule, seed=0), source(), config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L.FixedPrefixes(()), "widths must be positive"),
        (lambda: L.FixedPrefixes((0.5, -1)), "widths must be positive"),
        (lambda: L.FixedPrefixes((0.5,), weights=(0.0, 0.0)), "weights must be at least 0, not all"),
        (lambda: L.FixedPrefixes((30, 20)).at(0, 48, 0), "widths must ascend to at most d_sae=48 but are"),
        (lambda: L.FixedPrefixes((30, 60)).at(0, 48, 0), "widths must ascend to at most d_sae=48 but are"),
        (lambda: L.FixedPrefixes((30,), weights=(1.0,)).shares(2), "there must be 2 weights but got 1"),
        (
            lambda: L.FixedPrefixes((30.7,)),
            "widths must be positive, and whole numbers where over 1, but got",
        ),
        (lambda: L.FixedPrefixes((float("inf"),)), "widths must be positive, and whole numbers where over 1"),
        (lambda: L.RandomPrefixes(0), "n must be a positive whole number and alpha positive but got n=0"),
        (lambda: L.RandomPrefixes(2.5), "n must be a positive whole number and alpha positive but got n=2.5"),
        (lambda: LossConfig(prefixes=(0.5,), random_prefixes=2), "must not both be given"),
        (lambda: settings(k_start=0), "k_start must be positive"),
        (lambda: settings(k_start=8, k_warmup=0.0), "k_warmup must be positive where k_start is given"),
        (lambda: SAE(D, D_SAE, rule=JumpReLU(49)), "k must be in .0, d_sae. but got k=49 with d_sae=48"),
    ],
)
def test_bad_prefixes(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
