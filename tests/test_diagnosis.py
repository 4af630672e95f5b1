"""Every fault is named, with a remedy, and nothing is said of a healthy run."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxsae.loss import RECONSTRUCTION, TERMS, Loss
from mlxsae.metrics import in_model
from mlxsae.sae import SAE, CrossLayerTranscoder, HierarchicalSAE, JumpReLU
from mlxsae.train import Callback, NonFiniteError, OptimizerConfig, diagnose, fit
from mlxsae.train.diagnosis import bare_tokens_per_s
from test_train import config, dictionary_data, new_sae, source


def names(*arguments: Any, **options: Any) -> set[str]:
    found = diagnose(*arguments, **options)
    assert all(f.says.endswith(".") and f.remedy and str(f).startswith(f.name) for f in found)
    return {f.name for f in found}


def test_a_healthy_run_has_no_fault() -> None:
    result = fit(new_sae(), source(), config(total_tokens=200 * 64))
    assert names(result, dictionary_data(), bare_rate=1.0) == set()
    assert diagnose() == []


def test_nan_is_named() -> None:
    x = dictionary_data(64)
    x[3, 3] = np.nan
    try:
        fit(new_sae(), [mx.array(dictionary_data(64)), mx.array(x)], config())
    except NonFiniteError as error:
        (finding,) = diagnose(error)
        assert "step 1" in finding.says
        assert "learning rate" in finding.remedy
    assert names([{"loss": 1.0}, {"loss": float("nan")}]) == {"nan"}
    result = fit(new_sae(), source(), config(total_tokens=64))
    broken = replace(result.state, failed=mx.array([3, 2], mx.int32))
    assert names(replace(result, state=broken)) == {"nan"}
    assert names(data=x) == {"nan"}


def test_silence_and_death_are_named() -> None:
    mute = new_sae()
    mute.b_enc = mx.full((48,), -1e3)
    still = OptimizerConfig(learning_rate=1e-9)
    result = fit(mute, source(), config(optimizer=still))
    assert names(result, bare_rate=1.0) == {"zero_l0", "not_learning"}
    half = new_sae()
    half.b_enc = mx.where(mx.arange(48) < 24, mx.array(-1e3), mx.array(0.0))
    found = diagnose(fit(half, source(), config(total_tokens=200 * 64)), bare_rate=1.0)
    assert [f.name for f in found] == ["many_dead"]
    assert "50%" in found[0].says


def test_metrics_that_are_nan_are_a_fault() -> None:
    good = {"fvu": 0.1, "l0": 4.0, "dead_fraction": 0.0, "ce_clean": 1.0, "ce_sae": 1.1, "ce_mean": 1.0}
    assert (
        in_model.diagnose(good | {"loss_recovered_mean": float("nan")}) == []
    )  # there was nothing to recover
    (advice,) = in_model.diagnose(good | {"fvu": float("nan"), "ce_sae": float("nan")})
    assert advice.startswith("fvu and ce_sae are NaN")


def test_a_reconstruction_that_is_only_watched_is_no_fault() -> None:
    """End to end the SAE answers for what the model predicts: FVU over 1 alone says nothing."""
    record = {"loss": 0.1, "fvu": 1.5, "l0": 4.0, "dead_fraction": 0.0}
    assert names([record, record]) == {"not_learning"}
    for term in ("kl", "cross_entropy"):
        assert names([record | {term: 0.1}] * 2) == set()
    far = {"fvu": 1.5, "l0": 4.0, "dead_fraction": 0.0}
    (advice,) = in_model.diagnose(far | {"loss_recovered_mean": 0.9})
    assert "train longer" not in advice
    assert "end to end" in advice
    (advice,) = in_model.diagnose(far | {"loss_recovered_mean": 0.1})
    assert "train longer" in advice


def test_outliers_are_named() -> None:
    x = dictionary_data(1000)
    assert names(data=x) == set()
    x[:3] *= 200
    (finding,) = diagnose(data=x)
    assert finding.name == "norm_outliers"
    assert "3 of 1,000 rows" in finding.says
    assert "without_outliers" in finding.remedy


def test_a_slow_run_is_named() -> None:
    class Dawdle(Callback):
        def on_step(self, run: Any) -> None:
            time.sleep(0.1)

    result = fit(new_sae(), source(), config(total_tokens=20 * 64), callbacks=[Dawdle()])
    (finding,) = (f for f in diagnose(result) if f.name == "slow")
    assert "profile=True" in finding.remedy
    assert bare_tokens_per_s(result.sae, config()) > 64 / 0.1


def test_a_step_that_the_configuration_does_not_know_is_not_measured() -> None:
    """Another loss makes another step: a slower one, or one that cannot be made from the configuration."""
    term = Loss({"fvu": (1.0, RECONSTRUCTION["fvu"])}, terms={"l0": (1e-3, TERMS["l0"])})
    sae = SAE(16, 48, rule=JumpReLU(), seed=0)
    assert "slow" not in names(fit(sae, source(), config(total_tokens=40 * 64), loss=term))

    def slow(x: mx.array, x_recon: mx.array, z: mx.array, step: int) -> mx.array:
        time.sleep(0.05)
        return mx.square(x - x_recon).sum(axis=-1).mean()

    assert "slow" not in names(fit(new_sae(), source(), config(total_tokens=30 * 64), loss=slow))


@pytest.mark.parametrize("engine", ["fused", "autodiff"])
def test_measuring_the_bare_rate_changes_nothing(engine: str) -> None:
    sae = new_sae()
    before = np.array(sae.W_dec)
    assert bare_tokens_per_s(sae, config(engine=engine)) > 0
    np.testing.assert_array_equal(np.array(sae.W_dec), before)


@pytest.mark.parametrize(
    "sae",
    [
        HierarchicalSAE(16, 20, 28, k_coarse=2, k_fine=3, seed=0),
        SAE(16, 48, k=4, d_out=16, skip=True, seed=0),
        CrossLayerTranscoder(8, 2, 24, k=3, seed=0),
    ],
    ids=lambda sae: type(sae).__name__,
)
def test_the_bare_rate_of_every_shape(sae: SAE) -> None:
    assert bare_tokens_per_s(sae, config(), steps=2) > 0


@pytest.mark.parametrize(
    ("data", "got"), [((mx.zeros((3, 2)), mx.zeros((3, 2))), "tuple"), (np.zeros(3), r"shape \(3,\)")]
)
def test_data_must_be_one_array_of_rows(data: object, got: str) -> None:
    with pytest.raises(ValueError, match=rf"data must be an array \[..., d\] of activations but got {got}"):
        diagnose(data=data)


@pytest.mark.parametrize("run", [5, "x", [{}], [1], SAE(4, 8, k=2)])
def test_what_is_no_run_is_told(run: object) -> None:
    with pytest.raises(
        ValueError, match="run must be a result, a run, its history or the error that ended it"
    ):
        diagnose(run)  # type: ignore[arg-type]
