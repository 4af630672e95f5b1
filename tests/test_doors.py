"""The three doors: from text in one call, by configuration, and with everything of one's own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlxsae import io, lm
from mlxsae.data import ArraySource
from mlxsae.metrics import evaluate
from mlxsae.metrics.in_model import evaluate_in_model
from mlxsae.model import InterpretableModel
from mlxsae.sae import SAE, HierarchicalSAE, JumpReLU
from mlxsae.train import (
    DEFAULT_CROSSCODER_CONFIG,
    DEFAULT_SAE_CONFIG,
    DEFAULT_TRANSCODER_CONFIG,
    CheckpointCallback,
    CrosscoderConfig,
    CrossLayerConfig,
    DeadNeuronCallback,
    EarlyStoppingCallback,
    Experiment,
    Job,
    LossConfig,
    OptimizerConfig,
    ProfiSAETrainer,
    SAEConfig,
    SAETrainer,
    TrainConfig,
    TranscoderConfig,
    fit,
    fit_many,
    train_cross_layer_transcoder,
    train_crosscoder,
    train_sae,
    train_sae_from_activations,
    train_saes,
    train_transcoder,
)
from mlxsae.train.config import TrackingConfig, overruled
from mlxsae.train.flat_names import FLAT_NAMES, nested
from mlxsae.train.schedules import in_steps
from mlxsae.train.tracking import LocalTracker, TrackingCallback, read_metrics
from test_train import StopAt, assert_same_bits, dictionary_data, new_sae, weights

SMALL: dict[str, Any] = {"k": 4, "expansion_factor": 2, "batch_size": 128, "progress": False}


@pytest.fixture(scope="module")
def model() -> lm.LanguageModel:
    return lm.load("tiny")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(lm.tiny.texts(80, seed=0))


# ---- configuration -----------------------------------------------------------------------------------------


def test_one_step_is_not_the_whole_run() -> None:
    train = SAEConfig(warmup_steps=1, lr_decay_steps=1, sparsity_warm_up_steps=1, k=4).train
    spans = (train.optimizer.warmup, train.optimizer.decay, train.loss.warmup, train.k_warmup)
    assert [in_steps(span, 100) for span in spans] == [1, 1, 1, 1]
    assert in_steps(SAEConfig(warmup_steps=0.3).train.optimizer.warmup, 100) == 30


def test_flat_names_build_nested_configurations() -> None:
    config = SAEConfig(
        k=100,
        learning_rate=1e-4,
        batch_size=256,
        num_epochs=10,
        warmup_steps=500,
        lr_scheduler="cosine",
        gradient_clip=1.0,
        checkpoint_every=1000,
        normalize_activations=True,
        tied_weights=False,
        dead_neuron_threshold=0.001,
        use_ghost_grads=True,
        sae_type="batchtopk",
        use_wandb=True,
        wandb_project="p",
        wandb_tags=["a", "b"],
        validation_split=0.05,
        resample_dead_every=700,
    )
    o = OptimizerConfig(learning_rate=1e-4, warmup=500, shape="cosine", decay=0.95, max_grad_norm=1.0)
    assert config.train.optimizer == o
    assert config.train.loss == LossConfig(dead_after=1000)
    train = config.train
    assert (train.batch_size, train.epochs, train.checkpoint_every, train.resample_every) == (
        256,
        10,
        1000,
        700,
    )
    assert (config.architecture, config.k, train.normalize) == ("batchtopk", 100, "expected_norm")
    assert config.tracking == TrackingConfig(wandb=True, project="p", tags=("a", "b"))
    assert config.data.validation_split == 0.05
    assert SAEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    # A nested part given beside them is the base that they overrule.
    both = SAEConfig(train=TrainConfig(seed=3, batch_size=8), batch_size=16, use_ghost_grads=False)
    assert (both.train.seed, both.train.batch_size, both.train.loss.auxk) == (3, 16, None)
    assert SAEConfig(lr_scheduler="linear", lr_decay_steps=70).train.optimizer.decay == 70
    assert nested({"lambda_sparse": 0.5}) == {"train": {"loss": {"terms": {"l1": 0.5}}}}
    with pytest.raises(
        ValueError, match=r"\[config\] keys must be known but got kk, learnin_rate; known are"
    ):
        SAEConfig(learnin_rate=1, kk=3)
    with pytest.raises(ValueError, match="warmup must be float but got 'long'"):
        SAEConfig(warmup_steps="long")
    assert nested({"seed": None}) == {}
    assert {"learning_rate", "use_wandb", "lr_scheduler"} <= set(FLAT_NAMES)


def test_flat_names_that_mean_a_term_of_the_architecture() -> None:
    """They did nothing, or took the place of terms that the rule cannot do without."""

    def terms(**options: Any) -> Any:
        return SAEConfig(**options).train.loss.terms

    assert terms(architecture="relu", use_ghost_grads=True) == {"ghost_gradients": 0.1, "l1": 1e-2}
    assert terms(architecture="relu", use_ghost_grads=True, l1_coefficient=0.5) == {
        "ghost_gradients": 0.1,
        "l1": 0.5,
    }
    assert terms(architecture="gated", l1_coefficient=0.5) == {"gate_l1": 0.5, "gate_reconstruction": 1.0}
    assert terms(architecture="topk", use_ghost_grads=True) is None  # AuxK
    assert terms(architecture="jumprelu", use_ghost_grads=True) is None
    assert terms(architecture="relu") is None
    gated = SAEConfig(architecture="gated", d_sae=48, l1_coefficient=1e-2)
    assert SAEConfig.from_dict(json.loads(json.dumps(gated.to_dict()))) == gated
    sae = gated.build(16)
    fit(sae, ArraySource(dictionary_data(), batch_size=64), replace(gated.train, total_tokens=20 * 64))
    with pytest.raises(
        ValueError, match="terms must have gate_reconstruction for a Gated, whose gate learns"
    ):
        LossConfig(terms={"l1": 1.0}).build(sae)
    with pytest.raises(ValueError, match="target_l0 must be at most d_sae=48 but got 49"):
        LossConfig(target_l0=49).build(sae)


@pytest.mark.parametrize(
    ("architecture", "more", "wanted"),
    [
        ("relu", {}, 6.0),
        ("gated", {}, 6.0),
        ("sigmoid_gated", {}, 6.0),
        ("relu", {"target_l0": 9.0}, 9.0),
        ("relu", {"lambda_sparse": 1e-2}, None),  # a weight is a weight
        ("relu", {"end_to_end": "kl"}, None),
        ("topk", {}, None),
        ("jumprelu", {}, None),
    ],
)
def test_a_k_for_a_rule_without_one_is_the_l0_to_reach(architecture: str, more: dict, wanted: float) -> None:
    config = overruled(SAEConfig(architecture=architecture), {"k": 6} | more)
    assert config.train.loss.target_l0 == wanted
    assert overruled(SAEConfig(architecture=architecture), more).train.loss.target_l0 == more.get("target_l0")


@pytest.mark.parametrize("kind", [SAEConfig, TranscoderConfig, CrosscoderConfig])
def test_every_configuration_goes_through_json_and_refuses_what_it_does_not_know(kind: type) -> None:
    config = kind(k=7, learning_rate=1e-3)
    assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="keys must be known but got nonsense"):
        kind.from_dict(config.to_dict() | {"nonsense": 1})
    with pytest.raises(ValueError, match="k must be positive"):
        kind(k=0)


def test_defaults_of_the_plans() -> None:
    assert (SAEConfig().expansion_factor, TranscoderConfig().expansion_factor) == (32, 8)
    assert (TranscoderConfig().k, CrosscoderConfig().k, CrosscoderConfig().expansion_factor) == (50, 150, 24)
    assert SAEConfig(**DEFAULT_SAE_CONFIG).train.optimizer.learning_rate == 3e-4
    assert TranscoderConfig(**DEFAULT_TRANSCODER_CONFIG).train.optimizer.learning_rate == 5e-5
    assert CrosscoderConfig(**DEFAULT_CROSSCODER_CONFIG).train.batch_size == 128
    with pytest.raises(ValueError, match="tied must be False for a transcoder"):
        TranscoderConfig(tied_weights=True)
    assert TranscoderConfig(k=2).build(8, 5).d_out == 5


# ---- from text ---------------------------------------------------------------------------------------------


def test_train_sae_in_one_call(model: lm.LanguageModel, texts: list[str], tmp_path: Path) -> None:
    sae = train_sae(
        model, 1, "residual", texts, tmp_path / "sae", total_tokens=12_000, validation_split=0.2, **SMALL
    )
    assert sae.metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert sae.metadata["model_name"] == model.name
    assert sae.metadata["training"]["tokens"] >= 12_000
    assert_same_bits(weights(io.load(tmp_path / "sae")), weights(sae))
    point = model.hook_point("resid", layer=1)
    batches = lm.token_batches(model, texts, context_size=64, batch_size=16)
    x = mx.concatenate([lm.valid_rows(lm.capture(model, b.tokens, point)[point], b.valid) for b in batches])
    assert evaluate(sae, [x])["fvu"] < 0.5
    # The same by configuration, on an instance and on the class; and interrupted.
    config = SAEConfig(k=4, expansion_factor=2, batch_size=128, total_tokens=12_000, validation_split=0.2)
    trainer = SAETrainer(config)
    for again in (
        trainer.train(model, layer=1, component="resid", dataset=texts, progress=False),
        SAETrainer.train(model, 1, "resid", texts, config=config, progress=False),
    ):
        assert_same_bits(weights(again), weights(sae))
    assert trainer.result is not None
    assert trainer.result.validations[-1]["val_fvu"] < 0.6
    options = {"config": config, "progress": False, "checkpoint_dir": tmp_path / "c"}
    with pytest.raises(KeyboardInterrupt):
        train_sae(model, 1, "resid", texts, callbacks=[StopAt(40)], **options)
    assert_same_bits(weights(train_sae(model, 1, "resid", texts, resume=True, **options)), weights(sae))


def test_what_watches_a_door_knows_model_and_hook_point(
    model: lm.LanguageModel, texts: list[str], tmp_path: Path
) -> None:
    best = CheckpointCallback(save_every=3, keep_best=1, directory=tmp_path / "best")
    options = SMALL | {"total_tokens": 700, "tracking": TrackingConfig(local=str(tmp_path / "log"))}
    sae = train_sae(model, 1, "resid", texts, callbacks=[best], **options)
    told = json.loads((tmp_path / "log" / "run.json").read_text())["config"]["metadata"]
    assert told["hook_name"] == "blocks.1.hook_resid_post"
    assert told["model_name"] == model.name
    assert best.best is not None
    kept = InterpretableModel(model).load_sae(best.best)  # it says where it belongs
    assert kept.metadata["hook_name"] == sae.metadata["hook_name"] == "blocks.1.hook_resid_post"
    train_saes(model, [0, 1], "resid", texts, **options)
    log = tmp_path / "log" / "blocks.0.hook_resid_post" / "run.json"
    assert json.loads(log.read_text())["config"]["metadata"]["hook_name"] == "blocks.0.hook_resid_post"


def test_a_hook_point_in_place_of_a_layer(model: lm.LanguageModel, texts: list[str]) -> None:
    options = SMALL | {"total_tokens": 500}
    named = train_sae(model, dataset=texts, hook_point="blocks.1.hook_mlp_out", **options)
    assert_same_bits(weights(named), weights(train_sae(model, 1, "mlp", texts, **options)))
    config = SAEConfig.from_model(
        model, 2, k=4, expansion_factor=2, dead_latent_threshold=0.01, total_tokens=500
    )
    assert (config.d_in, config.train.loss.dead_after) == (model.d_model, 100)
    sae = SAETrainer(config).train(model, dataset=texts, progress=False)
    assert sae.metadata["hook_name"] == "blocks.2.hook_resid_post"


def test_several_layers_from_one_forward_pass(
    model: lm.LanguageModel, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxsae.data import model_activations

    passes: list[int] = []
    capture_each = model_activations.capture_each
    monkeypatch.setattr(
        model_activations,
        "capture_each",
        lambda *a: passes.extend(len(a[2]) for _ in a[1]) or capture_each(*a),
    )
    options = SMALL | {"total_tokens": 3000, "validation_split": 0.2}
    made = train_saes(model, [0, 2], "residual", texts, tmp_path, **options)
    together = len(passes)
    assert set(passes) == {2}
    for layer, sae in made.items():
        passes.clear()
        alone = train_sae(model, layer, "residual", texts, **options)
        assert len(passes) == together
        assert_same_bits(weights(sae), weights(alone))
        assert sae.metadata["hook_name"] == alone.metadata["hook_name"]
        assert io.load(tmp_path / f"layer_{layer}").d_in == model.d_model


def test_each_of_several_runs_has_callbacks_of_its_own(
    model: lm.LanguageModel, texts: list[str], tmp_path: Path
) -> None:
    """What one SAE alone would keep, stop by and log, each of several does."""
    options = SMALL | {"total_tokens": 128 * 12, "log_every": 3}

    def callbacks(experiment: Experiment, place: Path) -> list[Any]:
        return [
            CheckpointCallback(save_every=3, keep_best=2, directory=place),
            EarlyStoppingCallback(patience=1, metric="loss", min_delta=0.02),
            TrackingCallback(LocalTracker(place), "log"),
            experiment.get_callback(),
        ]

    experiment = Experiment("e", directory=tmp_path)
    with experiment.start_run("together"):
        made = train_saes(
            model, [0, 2], "resid", texts, callbacks=callbacks(experiment, tmp_path / "c"), **options
        )
    for n in (0, 2):
        point, alone = f"blocks.{n}.hook_resid_post", Experiment("e", directory=tmp_path / str(n))
        with alone.start_run("alone"):
            sae = train_sae(
                model, n, "resid", texts, callbacks=callbacks(alone, tmp_path / f"d{n}"), **options
            )
        assert_same_bits(weights(made[n]), weights(sae))
        kept = sorted(p.name for p in (tmp_path / f"d{n}").glob("step_*"))
        assert sorted(p.name for p in (tmp_path / "c" / point).iterdir()) == kept
        for name in kept:
            assert_same_bits(
                weights(io.load(tmp_path / "c" / point / name)), weights(io.load(tmp_path / f"d{n}" / name))
            )
        together = experiment.compare_runs(f"{point}/train/fvu").rows[0]
        assert together["last"] == alone.compare_runs("fvu").rows[0]["last"]
        logged = [r["train/fvu"] for r in read_metrics(tmp_path / f"d{n}" / "log")]
        assert [r["train/fvu"] for r in read_metrics(tmp_path / "c" / f"log-{point}")] == logged
    stop = EarlyStoppingCallback(metric="loss")
    jobs = [Job(new_sae(), TrainConfig(), callbacks=[stop]) for _ in range(2)]
    with pytest.raises(ValueError, match="EarlyStoppingCallback must watch one job but is given to several"):
        fit_many(jobs, ArraySource(dictionary_data(), batch_size=64))


def test_lengths_of_a_run_on_text(model: lm.LanguageModel, texts: list[str]) -> None:
    def tokens(*arguments: Any, **options: Any) -> int:
        made = train_sae(model, 0, "mlp", *arguments, **(SMALL | options))
        return made.metadata["training"]["tokens"]

    few = texts[:6]
    once = tokens(few, num_epochs=1, validation_split=0.0, batch_size=16)
    there = sum(int(b.valid.sum()) for b in lm.token_batches(model, few, context_size=256, batch_size=16))
    assert once == there
    assert tokens(few, validation_split=0.0, batch_size=16) == 10 * there  # where nothing is said
    assert tokens([{"text": t} for t in few], num_epochs=1, validation_split=0.0, batch_size=16) == there
    assert tokens(iter(few), total_tokens=10**6, batch_size=16) == there  # a stream is walked once


def test_held_out_documents_are_not_trained_on(
    model: lm.LanguageModel, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxsae.train import doors

    walks = []
    real = doors.lm_room.token_batches
    monkeypatch.setattr(
        doors.lm_room,
        "token_batches",
        lambda *a, **o: walks.append((o["split"], o["heldout_fraction"])) or real(*a, **o),
    )
    trainer = SAETrainer(SAEConfig(k=4, expansion_factor=2, validation_split=0.3, total_tokens=1000))
    trainer.train(model, 0, dataset=texts, progress=False)
    assert set(walks) == {("heldout", 0.3), ("train", 0.3)}
    assert trainer.result is not None
    assert len(trainer.result.validations) == 1


def test_train_transcoder(model: lm.LanguageModel, texts: list[str], tmp_path: Path) -> None:
    coder = train_transcoder(model, layer=1, dataset=texts, save_path=tmp_path / "t", num_epochs=2, **SMALL)
    assert coder.metadata["hook_name"] == "blocks.1.mlp.hook_in"
    assert coder.metadata["hook_name_out"] == "blocks.1.hook_mlp_out"
    assert not coder.apply_b_dec_to_input
    assert_same_bits(weights(io.load(tmp_path / "t")), weights(coder))
    across = train_transcoder(model, 0, 2, "attn", texts, total_tokens=500, **SMALL)
    assert (across.metadata["hook_name"], across.metadata["hook_name_out"]) == (
        "blocks.0.hook_attn_out",
        "blocks.2.hook_attn_out",
    )
    for bad in ({"from_layer": 2, "to_layer": 0}, {"layer": 1, "component": "mlp"}):
        with pytest.raises(ValueError, match="the target must be computed after the input"):
            train_transcoder(model, dataset=texts, **bad)
    with pytest.raises(ValueError, match="layer, or from_layer and to_layer, must be given"):
        train_transcoder(model, from_layer=1, dataset=texts)


def test_end_to_end_through_the_model(model: lm.LanguageModel, texts: list[str], tmp_path: Path) -> None:
    """Trained for what the model predicts, an SAE of one latent a token serves the model better than by reconstruction."""
    options: dict[str, Any] = {"expansion_factor": 2, "k": 1, "learning_rate": 3e-3, "context_size": 64}
    options |= {"batch_size": 256, "log_every": 2, "seed": 1}
    judged = list(lm.token_batches(model, lm.tiny.texts(8, seed=9), context_size=64, batch_size=8))
    found = {}
    for name in (None, "kl"):
        config = SAEConfig(**options, total_tokens=10_000, end_to_end=name)
        sae = train_sae(model, 1, "resid", texts, config=config, progress=False)
        found[name] = evaluate_in_model(model, sae, "blocks.1.hook_resid_post", judged)
    assert found["kl"]["ce_sae"] < found[None]["ce_sae"] - 0.05
    assert found["kl"]["fvu"] > found[None]["fvu"]
    config = SAEConfig(
        **options,
        total_tokens=1500,
        checkpoint_every=2,
        end_to_end="cross_entropy",
        validation_split=0.2,
        normalize_activations="layer_norm",
    )
    config = overruled(config, {"data": replace(config.data, validation_tokens=500)})
    whole = SAETrainer(config)
    expected = weights(whole.train(model, 1, "resid", texts, progress=False))
    assert whole.result is not None
    assert whole.result.validations[-1]["val_cross_entropy"] > 0
    assert {"cross_entropy", "fvu"} <= whole.result.history[-1].keys()
    with pytest.raises(KeyboardInterrupt):
        whole.train(model, 1, "resid", texts, progress=False, checkpoint_dir=tmp_path, callbacks=[StopAt(3)])
    again = whole.train(model, 1, "resid", texts, progress=False, checkpoint_dir=tmp_path, resume=True)
    assert_same_bits(weights(again), expected)
    with pytest.raises(ValueError, match="end_to_end must be None but for SAEs and transcoders on text"):
        train_sae(model, 1, "resid", mx.zeros((64, model.d_model)), config=config)
    with pytest.raises(ValueError, match=r"\[config\] end_to_end must be None without a model and text"):
        fit(new_sae(), ArraySource(dictionary_data(), batch_size=64), config.train)


def test_doors_name_what_is_missing(model: lm.LanguageModel, texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\[train\] dataset must be given"):
        train_sae(model, 1)
    with pytest.raises(ValueError, match="keys must be known but got magic"):
        train_sae(model, 1, dataset=texts, magic=3)
    with pytest.raises(ValueError, match="model must be a path, a name or a LanguageModel but got int"):
        train_sae(3, 1, dataset=texts)
    with pytest.raises(ValueError, match="layer or hook_point must be given"):
        SAETrainer.train(model, dataset=texts)
    with pytest.raises(ValueError, match="entry 0 of the dataset must be a string or an object but is int"):
        train_sae(model, 1, dataset=[1, 2], validation_split=0.0)


@pytest.mark.parametrize(
    ("door", "options", "message"),
    [
        (
            train_sae,
            {"layer": 1, "config": TranscoderConfig()},
            "config must be of SAEConfig but got Transcod",
        ),
        (train_sae, {"layer": 1, "config": {"k": 4}}, "config must be of SAEConfig but got dict"),
        (
            train_transcoder,
            {"layer": 1, "config": SAEConfig()},
            "config must be of TranscoderConfig but got SAE",
        ),
        (
            train_crosscoder,
            {"layers": [0, 1], "config": SAEConfig()},
            "config must be of CrosscoderConfig but",
        ),
        (train_sae, {"layer": 1, "components": ["mlp"]}, "components must not be given for SAEConfig"),
        (train_sae, {"layer": 1, "from_layer": 0}, "from_layer must not be given for SAEConfig"),
        (
            train_sae,
            {"layer": 1, "hook_point": "blocks.2.hook_mlp_out"},
            "layer and component must be those of",
        ),
        (
            train_transcoder,
            {"layer": 1, "hook_point": "blocks.2.hook_mlp_out"},
            "hook_point must not be given",
        ),
        (train_transcoder, {"layer": 1, "from_layer": 1, "to_layer": 2}, "layer must not be given beside"),
        (train_crosscoder, {"layer": 1, "components": []}, "must be lists that name at least one but got"),
        (train_crosscoder, {"layer": 1, "components": "mlp"}, "must be lists that name at least one but got"),
        (train_saes, {"layers": []}, "layers must name at least one"),
        (train_cross_layer_transcoder, {"layers": []}, "layers must name at least one"),
        (SAETrainer(CrossLayerConfig()).train, {"layer": 1}, "layer must not be given for CrossLayerConfig"),
        (train_sae, {"layer": 1, "context_size": 100_000}, "context_size must be at most the model's 64"),
        (
            train_sae,
            {"layer": 1, "dataset": 5},
            "dataset must be texts, a file, a folder or activations but got",
        ),
        (train_transcoder, {"layer": 1, "dataset": np.ones((64, 128))}, "must hold 2 arrays for Transcoder"),
        (train_sae, {"layer": 1, "dataset": (np.ones((9, 128)),) * 2}, "must hold 1 array for SAEConfig but"),
        (
            train_sae,
            {"layer": 1, "dataset": ArraySource(np.ones((9, 128)), batch_size=4), "validation_split": 0.1},
            "validation_split must be 0 for a source",
        ),
    ],
)
def test_nothing_that_a_door_is_given_is_left_aside(
    door: Any, options: dict, message: str, model: lm.LanguageModel, texts: list[str]
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        door(model, **{"dataset": texts, "progress": False} | options)


def test_what_cannot_be_saved_or_called_is_found_before_training(
    model: lm.LanguageModel, texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    options = SMALL | {"total_tokens": 10**9}  # it would take for ever
    with pytest.raises(
        OSError, match=r"save_path must be a folder that can be written but .*file gives: File exists"
    ):
        train_sae(model, 1, dataset=texts, save_path=tmp_path / "file", **options)
    with pytest.raises(OSError, match="save_dir must be a folder that can be written"):
        train_sae_from_activations(dictionary_data(), save_dir=tmp_path / "file", num_epochs=10**6)
    for callbacks in (5, CheckpointCallback()):
        with pytest.raises(TypeError, match=f"callbacks must be a list .* got {type(callbacks).__name__}"):
            train_sae(model, 1, dataset=texts, callbacks=callbacks, **options)
        with pytest.raises(TypeError, match="callbacks must be a list of objects"):
            fit(new_sae(), ArraySource(dictionary_data(), batch_size=64), callbacks=callbacks)


def test_save_path_may_be_in_home(model: Any, texts: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    train_sae(model, 1, dataset=texts, save_path="~/one", total_tokens=200, **SMALL)
    train_saes(model, [0, 1], dataset=texts, save_path="~/two", total_tokens=200, **SMALL)
    found = {str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob("cfg.json")}
    assert found == {"home/one", "home/two/layer_0", "home/two/layer_1"}
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_the_last_rows_of_what_is_stored_are_held_out(model: lm.LanguageModel, texts: list[str]) -> None:
    from mlxsae.data import ActivationDataset

    x = dictionary_data(1000)
    options = {"k": 4, "expansion_factor": 3, "batch_size": 64, "num_epochs": 2}
    split = train_sae_from_activations(x, validation_split=0.2, **options)
    by_hand = train_sae_from_activations(x[:800], validation=x[800:], **options)
    assert split.validations == by_hand.validations
    assert_same_bits(weights(split.sae), weights(by_hand.sae))
    with pytest.raises(ValueError, match=r"validation_split must be 0 where validation is given but is 0.2"):
        train_sae_from_activations(x, validation_split=0.2, validation=x, **options)
    with pytest.raises(ValueError, match=r"validation_split must leave rows to train on but is 0.9 of 1"):
        train_sae_from_activations(x[:1], validation_split=0.9, **options)
    points = {"layer": [0, 1], "component": ["resid", "mlp_in", "mlp"]}
    stored = ActivationDataset.from_texts(model, texts[:20], **points)

    class Count:
        def on_validation_end(self, step: int, record: dict) -> None:
            self.last = record["val_fvu"]

    for config in (SAEConfig, TranscoderConfig, CrosscoderConfig, CrossLayerConfig):
        where = {"layers": [0, 1]} if config in (CrosscoderConfig, CrossLayerConfig) else {"layer": 1}
        made = SAETrainer(
            config(k=4, expansion_factor=2, batch_size=128, total_tokens=1000, validation_split=0.25)
        )
        watch = Count()
        made.train(model, dataset=stored, callbacks=[watch], progress=False, **where)
        assert made.result is not None
        assert 0 < made.result.validations[-1]["val_fvu"] == watch.last
        assert made.result.state.tokens == 1024


def test_train_sae_from_activations_as_the_plans_write_it(model: lm.LanguageModel, tmp_path: Path) -> None:
    config = SAEConfig.from_model(model, layer_idx=2, expansion_factor=2, k=4, total_tokens=500)
    assert config == SAEConfig.from_model(model, 2, expansion_factor=2, k=4, total_tokens=500)
    with pytest.raises(ValueError, match="layer must be given"):
        SAEConfig.from_model(model)
    x = mx.random.normal((600, model.d_model))
    sae, trainer = train_sae_from_activations(
        activations=x, config=config, device="cpu", save_dir=tmp_path / "layer_2"
    )
    assert trainer.sae is sae
    assert trainer.history
    assert io.load(tmp_path / "layer_2").metadata["hook_name"] == "blocks.2.hook_resid_post"
    for device in ("tpu", *(() if mx.is_available(mx.gpu) else ("cuda",))):
        with pytest.raises(ValueError, match=rf"device must be one of \['cpu'.*\] here but got '{device}'"):
            train_sae_from_activations(x, config, device=device)
    for bad in (x.tolist(), x[0], None):
        with pytest.raises(ValueError, match=r"activations must have shape \[n, d_in\] but got"):
            train_sae_from_activations(bad)  # type: ignore[arg-type]


def test_train_sae_from_activations_with_flat_names(tmp_path: Path) -> None:
    x = dictionary_data()
    result = train_sae_from_activations(
        x,
        k=4,
        d_hidden=48,
        batch_size=64,
        num_epochs=1,
        learning_rate=3e-3,
        save_dir=tmp_path,
        validation=x[:500],
    )
    assert result.state.tokens >= 6000
    assert result.validations[-1]["val_fvu"] < 0.9
    assert io.load(tmp_path).d_sae == 48


# ---- with everything of one's own --------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self, d: int = 16, d_hidden: int = 48):
        super().__init__()
        mx.random.seed(3)
        self.encoder = nn.Sequential(
            nn.Linear(d, d_hidden), nn.LayerNorm(d_hidden), nn.ReLU(), nn.Dropout(0.1)
        )
        self.decoder = nn.Linear(d_hidden, d)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        z = self.encoder(x)
        return self.decoder(z), z


def hoyer_loss(x: mx.array, x_recon: mx.array, z: mx.array, step: int) -> tuple[mx.array, dict]:
    recon = mx.mean((x - x_recon) ** 2)
    l1, l2 = mx.abs(z).sum(axis=-1), mx.sqrt(mx.square(z).sum(axis=-1)) + 1e-8
    strength = 1e-3 * (1 + 0.1 * mx.log(1 + step / 1000))
    hoyer = mx.square(l1 / l2).mean()
    return recon + strength * hoyer, {"recon": recon, "hoyer": hoyer, "lambda": strength}


def lr_schedule(step: Any) -> Any:
    return 3e-3 * (step + 1) / 10 if step < 10 else 3e-3 * 0.5 * (1 + mx.cos(mx.pi * (step - 10) / 100))


def preprocess(batch: mx.array) -> mx.array:
    batch = batch - mx.mean(batch, axis=-1, keepdims=True)
    batch = batch / (mx.std(batch, axis=-1, keepdims=True) + 1e-8)
    return batch + mx.random.normal(batch.shape) * 0.01


def test_profi_trainer_does_what_each_argument_says(tmp_path: Path) -> None:
    seen: list[int] = []

    class Mine:
        def on_batch_end(self, step: int, loss: Any, metrics: dict) -> None:
            seen.append(step)
            assert f"{metrics.get('hoyer', 0):.4f}"

    def run(**changes: Any) -> Any:
        x = dictionary_data()
        options: dict[str, Any] = {
            "loss_fn": hoyer_loss,
            "optimizer": optim.AdamW(learning_rate=lr_schedule, weight_decay=0.01),
            "dataset": x,
            "preprocess_fn": preprocess,
            "callbacks": [Mine()],
            "num_steps": 30,
            "batch_size": 64,
            "validation_dataset": dictionary_data(300, seed=4),
            "validate_every": 12,
            "log_every": 5,
            "seed": 42,
        }
        return ProfiSAETrainer().train(Own(), **(options | changes))

    base = run()
    assert seen == list(range(1, 31))
    assert base.history[-1]["recon"] < base.history[0]["recon"]
    assert {"recon", "hoyer", "lambda", "loss", "l0"} <= base.history[0].keys()
    assert [r["step"] for r in base.history] == [5, 10, 15, 20, 25, 30]
    assert [v["step"] for v in base.validations] == [12, 24, 30]
    assert "val_recon" in base.validations[0]
    assert base.profile is None
    assert_same_bits(weights(run().sae), weights(base.sae))

    def differs(**changes: Any) -> bool:
        other = run(**changes)
        return any((weights(other.sae)[n] != w).any() for n, w in weights(base.sae).items())

    assert differs(seed=43)
    assert differs(preprocess_fn=None)
    assert differs(loss_fn=None)
    assert differs(optimizer=None)
    assert differs(mixed_precision=True)
    assert differs(batch_size=32)
    assert differs(max_grad_norm=1e-3)
    assert differs(
        gradient_checkpointing=True
    )  # other masks of the dropout; memory: test_checkpointing_saves_memory
    assert not differs(validation_dataset=None, log_every=7, callbacks=())
    accumulated = run(gradient_accumulation_steps=4)
    assert accumulated.state.tokens == 4 * 30 * 64
    assert run(profile=True).profile["steps"] == 30
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[StopAt(17)], checkpoint_dir=tmp_path)
    assert_same_bits(weights(run(checkpoint_dir=tmp_path, resume=True).sae), weights(base.sae))


def test_profi_trainer_takes_data_in_any_form(model: lm.LanguageModel, texts: list[str]) -> None:
    x = dictionary_data()
    y = (x @ np.ones((16, 3))).astype(np.float32)

    def first_loss(dataset: Any, sae: Any = None, **options: Any) -> float:
        made = sae or new_sae()
        return (
            ProfiSAETrainer()
            .train(made, dataset=dataset, num_steps=2, batch_size=64, log_every=1, **options)
            .history[0]["loss"]
        )

    array = first_loss(x)
    assert first_loss(mx.array(x)) == first_loss(ArraySource(x, batch_size=64)) == array
    assert first_loss((x, y), new_sae(d_out=3)) > 0
    assert first_loss([mx.array(x[:64]), mx.array(x[64:128])]) > 0
    trainer = ProfiSAETrainer(model, layer=1, component="residual")
    sae = SAE(model.d_model, 64, k=4, seed=0)
    result = trainer.train(
        sae, dataset=texts, num_steps=20, batch_size=64, validation_dataset=texts[:5], log_every=5
    )
    assert result.history[-1]["fvu"] < result.history[0]["fvu"]
    assert result.validations[-1]["val_fvu"] > 0
    trainer.train(SAE(model.d_model, 32, k=2, seed=0), num_steps=2, batch_size=64)  # the same texts again
    with pytest.raises(ValueError, match="dataset must be given"):
        ProfiSAETrainer().train(new_sae())
    with pytest.raises(ValueError, match="model and layer must be given for a dataset of texts"):
        ProfiSAETrainer().train(new_sae(), dataset=texts)


# ---- resampling --------------------------------------------------------------------------------------------


def never_firing(n: int = 12) -> SAE:
    sae = new_sae()
    sae.b_enc = mx.where(mx.arange(48) < n, mx.array(-1e3), mx.array(0.0))
    return sae


@pytest.mark.parametrize("precision", ["float32", "certified"])
@pytest.mark.parametrize("strategy", DeadNeuronCallback.STRATEGIES)
def test_dead_latents_are_made_anew(strategy: str, precision: str) -> None:
    config = TrainConfig(
        total_tokens=300 * 64,
        batch_size=64,
        log_every=10,
        precision=precision,
        loss=LossConfig(auxk=None, dead_after=640),
        optimizer=OptimizerConfig(learning_rate=3e-3, decay=0.2),
    )
    data = dictionary_data()
    plain = fit(never_firing(), ArraySource(data, batch_size=64), config)
    assert plain.history[-1]["dead_fraction"] >= 12 / 48
    watcher = DeadNeuronCallback(resample_every=50, resample_strategy=strategy, sample_size=2000)
    revived = fit(never_firing(), ArraySource(data, batch_size=64), config, callbacks=[watcher])
    assert watcher.resampled[0] == (50, 12)
    assert revived.history[-1]["dead_fraction"] < 8 / 48
    assert revived.history[-1]["loss"] < plain.history[-1]["loss"]
    assert all(step <= 270 for step, _ in watcher.resampled)


@pytest.mark.parametrize(
    "architecture", ["jumprelu", "topk_jumprelu", "gated", "sigmoid_gated", "hierarchical"]
)
def test_what_silences_a_latent_in_its_rule_goes_too(architecture: str) -> None:
    """A threshold out of reach, a magnitude below 0, a gate that is shut: new encoder rows alone would stay silent."""
    dead = mx.arange(48) % 4 == 0
    if architecture == "hierarchical":
        sae: SAE = HierarchicalSAE(16, 8, 40, coarse=JumpReLU(2), fine=JumpReLU(2), seed=0)
        rule = sae.levels
        rule.coarse.threshold, rule.fine.threshold = (
            mx.where(part, 1e3, 0.05) for part in (dead[:8], dead[8:])
        )
    else:
        sae = SAEConfig(d_sae=48, architecture=architecture, k=4).build(16)
        name, shut, open_ = {"gated": ("b_mag", -1e3, 0.0), "sigmoid_gated": ("gate_bias", -1e3, 0.0)}.get(
            architecture, ("threshold", 1e3, 0.05)
        )
        sae.rule[name] = mx.where(dead, shut, open_)
    sae.b_enc = mx.full((48,), 1e-6)  # as a trained one, which is not begun anew
    config = TrainConfig(
        total_tokens=120 * 64, batch_size=64, wake=0.0, loss=LossConfig(auxk=None, dead_after=640)
    )
    watcher = DeadNeuronCallback(resample_every=40, sample_size=2000)
    fit(sae, ArraySource(dictionary_data(), batch_size=64), config, callbacks=[watcher])
    assert watcher.resampled[0][0] == 40
    acts = np.array(sae.to_dense(sae.encode(mx.array(dictionary_data(2000, seed=7)))))
    assert (acts[:, ::4] > 0).any(axis=0).sum() >= 4  # rows of a fifth of the size win where they can


def test_resampling_says_what_it_cannot_do() -> None:
    source = ArraySource(dictionary_data(), batch_size=64)
    config = TrainConfig(total_tokens=20 * 64, batch_size=64, wake=0.0)
    with pytest.warns(UserWarning, match="resample_every must be at most 18 for a run of 20 steps"):
        fit(new_sae(), source, config, callbacks=[DeadNeuronCallback(resample_every=19)])
    sae = new_sae()
    sae.encoder.freeze(keys=["bias"])
    with pytest.raises(ValueError, match="must train encoder and decoder of an SAE of ours"):
        fit(sae, source, config, callbacks=[DeadNeuronCallback(resample_every=5)])


def test_what_a_resampled_latent_is_made_of(tmp_path: Path) -> None:
    """Rows, bias, moments and counter, at the moment after; and the run resumes to the same bits."""
    config = TrainConfig(
        total_tokens=40 * 64, batch_size=64, loss=LossConfig(auxk=None, dead_after=640), checkpoint_every=7
    )
    x, found = dictionary_data(), {}

    class Look(DeadNeuronCallback):
        def on_step(self, run: Any) -> None:
            before = run.state
            super().on_step(run)
            if run.state is not before:
                found.update(before=before, after=run.state, sample=run.sample(2000)[0])

    def run(*more: Any, **options: Any) -> Any:
        watcher = Look(resample_every=20, sample_size=2000)
        return fit(
            never_firing(), ArraySource(x, batch_size=64), config, callbacks=[watcher, *more], **options
        )

    whole = run()
    before, after, dead = found["before"], found["after"], np.arange(48) < 12
    names = {"encoder.weight", "encoder.bias", "decoder.weight"}
    a, b = (
        {f"{p}.{n}": np.array(s.params[p][n]) for p, n in (name.split(".") for name in names)}
        for s in (before, after)
    )
    for name in names:
        np.testing.assert_array_equal(a[name][~dead], b[name][~dead])
    np.testing.assert_array_equal(
        np.array(before.params["decoder"]["bias"]), np.array(after.params["decoder"]["bias"])
    )
    np.testing.assert_allclose(np.linalg.norm(b["decoder.weight"][dead], axis=1), 1, rtol=1e-5)
    mean = np.linalg.norm(a["encoder.weight"][~dead], axis=1).mean()
    np.testing.assert_allclose(
        b["encoder.weight"][dead], 0.2 * mean * b["decoder.weight"][dead], rtol=1e-4, atol=1e-6
    )
    assert (b["encoder.bias"][dead] == 0).all()
    inner = np.array(found["sample"]) - np.array(after.params["decoder"]["bias"])
    unit = inner / np.linalg.norm(inner, axis=1, keepdims=True)
    assert (np.abs(b["decoder.weight"][dead] @ unit.T).max(axis=1) > 0.9999).all()  # each a row of the data
    for part, name in (("encoder", "weight"), ("encoder", "bias"), ("decoder", "weight")):
        for moment in "mv":
            m = np.array(after.optimizer[part][name][moment])
            assert (m[dead] == 0).all()
            np.testing.assert_array_equal(m[~dead], np.array(before.optimizer[part][name][moment])[~dead])
    assert (np.array(after.tokens_since_fired)[dead] == 0).all()
    with pytest.raises(KeyboardInterrupt):
        run(StopAt(33), checkpoint_dir=tmp_path)
    assert_same_bits(weights(run(checkpoint_dir=tmp_path, resume=True).sae), weights(whole.sae))


def test_rows_with_large_errors_are_drawn_more_often() -> None:
    watcher = DeadNeuronCallback()
    errors = np.array([1.0] * 50 + [10.0] * 50)
    drawn = np.concatenate([np.array(watcher._draw(errors, 10, 0, step)) for step in range(50)])
    assert (drawn >= 50).mean() > 0.9  # 100 to 1
    drawn = np.array(watcher._draw(np.zeros(100), 100, 0, 0))
    assert sorted(drawn) == list(range(100))
    for bad in ({"threshold": 1.0}, {"resample_every": 0}, {"resample_strategy": "magic"}):
        with pytest.raises(ValueError, match=r"\[DeadNeuronCallback\]"):
            DeadNeuronCallback(**bad)
    with pytest.raises(ValueError, match="must train encoder and decoder of an SAE of ours"):
        ProfiSAETrainer().train(
            Own(), dataset=dictionary_data(), num_steps=2, callbacks=[DeadNeuronCallback()]
        )


def test_resampling_by_configuration() -> None:
    config = SAEConfig(d_sae=48, k=4, resample_dead_every=10, total_tokens=2000, batch_size=64)
    assert config.train.resample_every == 10
    result = train_sae_from_activations(
        dictionary_data(), config, dead_neuron_threshold=0.01, use_ghost_grads=False
    )
    assert result.state.step == 32


# ---- crosscoders -------------------------------------------------------------------------------------------


def sources(n: int = 6000) -> np.ndarray:
    """Two activations that vie for latents, the second a hundred times as large as the first."""
    a, b = dictionary_data(n), dictionary_data(n, seed=1)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0]
    return np.concatenate([a, 100 * (b @ turn)], axis=1).astype(np.float32)


def shares_of_error(coder: Any, x: np.ndarray) -> np.ndarray:
    """FVU of each source."""
    rows = mx.array(x)
    error = np.array(rows - coder(rows)).reshape(len(x), 2, 16)
    centred = (x - x.mean(0)).reshape(len(x), 2, 16)
    return (error**2).sum((0, 2)) / (centred**2).sum((0, 2))


def test_sources_get_a_scale_each_and_their_weights() -> None:
    x = sources()
    fvus = {}
    for name, options in {
        "even": {},
        "weighed": {"component_weights": (1.0, 100.0)},
        "ranked": {"rank_by_decoder_norm": True},
    }.items():
        config = CrosscoderConfig(
            k=2,
            d_sae=48,
            batch_size=64,
            total_tokens=400 * 64,
            learning_rate=3e-3,
            use_ghost_grads=False,
            **options,
        )
        coder = config.build(16, 2)
        result = fit(coder, ArraySource(x, batch_size=64), config.train)
        fvus[name] = shares_of_error(coder, x[:1000])
        if name == "even":
            # What the run measured on scaled activations is the mean of what the raw ones show.
            assert result.history[-1]["fvu"] == pytest.approx(fvus[name].mean(), rel=0.3)
    assert 0.5 < fvus["even"][0] / fvus["even"][1] < 2
    assert fvus["weighed"][1] < 0.8 * fvus["even"][1]
    assert fvus["even"][0] < 0.8 * fvus["weighed"][0]
    assert fvus["ranked"][1] < fvus["ranked"][0]  # one scale for all: the large source rules
    with pytest.raises(ValueError, match="source_weights must be 3 numbers"):
        CrosscoderConfig(source_weights=(1.0, 2.0)).build(16, 3)
    bad = CrosscoderConfig(k=2, d_sae=48, rank_by_decoder_norm=True, normalize_activations="mean_std")
    with pytest.raises(ValueError, match="normalize must not be mean_std where latents are ranked"):
        fit(bad.build(16, 2), ArraySource(x, batch_size=64), bad.train)


def test_train_crosscoder(model: lm.LanguageModel, texts: list[str], tmp_path: Path) -> None:
    coder = train_crosscoder(
        model,
        layer=1,
        components=["mlp", "attn"],
        dataset=texts,
        save_path=tmp_path / "c",
        total_tokens=4000,
        **SMALL,
    )
    assert (coder.n_sources, coder.d_source, coder.d_sae) == (2, model.d_model, 2 * model.d_model)
    assert coder.metadata["sources"] == ["blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"]
    assert_same_bits(weights(io.load(tmp_path / "c")), weights(coder))
    assert sum(coder.sharing().values()) >= coder.d_sae
    over = train_crosscoder(
        model, layers=[0, 1, 2], component="residual", dataset=texts, total_tokens=500, **SMALL
    )
    assert over.n_sources == 3
    twins = train_crosscoder(model, 1, ["mlp"], texts, models=[model], total_tokens=500, **SMALL)
    assert twins.n_sources == 2
    for bad, said in (
        ({"layer": 1, "layers": [1]}, "either layer or layers"),
        ({}, "either layer or layers"),
    ):
        with pytest.raises(ValueError, match=said):
            train_crosscoder(model, dataset=texts, **bad)


def test_train_cross_layer_transcoder(model: lm.LanguageModel, texts: list[str], tmp_path: Path) -> None:
    trainer = SAETrainer(
        CrossLayerConfig(k=4, expansion_factor=2, batch_size=128, num_epochs=1, validation_split=0.2)
    )
    coder = trainer.train(model, dataset=texts, progress=False)
    n = model.n_layers
    assert (coder.n_layers, coder.d_layer, coder.d_in) == (n, 2 * model.d_model, n * model.d_model)
    assert coder.metadata["inputs"][1] == "blocks.1.mlp.hook_in"
    assert coder.metadata["targets"][-1] == f"blocks.{n - 1}.hook_mlp_out"
    assert trainer.result is not None
    assert trainer.result.validations[-1]["val_fvu"] < 0.9
    # Rows are tokens, sides are inputs and targets: on activations taken by hand it does as well.
    batch = next(iter(lm.token_batches(model, texts, context_size=64, batch_size=16)))
    names = [*coder.metadata["inputs"], *coder.metadata["targets"]]
    found = lm.capture(model, batch.tokens, names)
    x, y = (
        mx.concatenate([lm.valid_rows(found[name], batch.valid) for name in side], axis=-1)
        for side in (names[:n], names[n:])
    )
    assert evaluate(coder, [(x, y)])["fvu"] < 0.9
    two = train_cross_layer_transcoder(model, [0, 2], texts, total_tokens=500, **SMALL)
    assert two.n_layers == 2
    assert CrossLayerConfig.from_dict(trainer.config.to_dict()) == trainer.config
    # Saved, and resumed.
    options = SMALL | {"total_tokens": 700, "checkpoint_every": 2, "architecture": "jumprelu"}
    whole = train_cross_layer_transcoder(model, None, texts, tmp_path / "clt", **options)
    with pytest.raises(KeyboardInterrupt):
        train_cross_layer_transcoder(
            model, None, texts, checkpoint_dir=tmp_path / "c", callbacks=[StopAt(3)], **options
        )
    again = train_cross_layer_transcoder(
        model, None, texts, checkpoint_dir=tmp_path / "c", resume=True, **options
    )
    assert_same_bits(weights(again), weights(whole))
    read = io.load(tmp_path / "clt")
    assert_same_bits(weights(read), weights(whole))
    assert read.metadata["inputs"] == whole.metadata["inputs"]
    assert (tmp_path / "clt" / "config.yaml").is_file()  # what circuit-tracer asks for


@pytest.mark.parametrize("skip", [False, True])
def test_normalisation_of_a_transcoder_folds(skip: bool) -> None:
    x = dictionary_data()
    y = (np.maximum(x @ np.random.default_rng(3).normal(size=(16, 5)), 0) * 40 + 3).astype(np.float32)
    settings = TranscoderConfig(
        k=4, d_sae=48, skip=skip, batch_size=64, total_tokens=300 * 64, normalize_activations="mean_std"
    )
    coder = settings.build(16, 5)
    result = fit(coder, ArraySource(x, y, batch_size=64), settings.train, validation=(x[:640], y[:640]))
    got = evaluate(coder, [(mx.array(x[:640]), mx.array(y[:640]))])["fvu"]
    # Per coordinate the errors weigh differently, so the numbers agree roughly, and exactly in what the run saw.
    assert got == pytest.approx(result.validations[-1]["val_fvu"], rel=0.5)
    assert ("W_skip" in coder) == skip


def test_every_door_reads_stored_activations(model: lm.LanguageModel, texts: list[str]) -> None:
    from mlxsae.data import ActivationDataset

    stored = ActivationDataset.from_texts(
        model, texts[:20], layer=[0, 1], component=["resid", "mlp_in", "mlp"]
    )
    options = SMALL | {"total_tokens": 1000}
    sae = train_sae(model, 1, "resid", stored, **options)
    made = train_saes(model, [0, 1], "resid", stored, **options)
    assert_same_bits(weights(made[1]), weights(sae))
    coder = train_transcoder(model, layer=1, dataset=stored, **options)
    assert coder.metadata["hook_name_out"] == "blocks.1.hook_mlp_out"
    assert train_crosscoder(model, layers=[0, 1], component="resid", dataset=stored, **options).n_sources == 2
    one = ActivationDataset.from_texts(model, texts[:10], layer=1, component="resid")
    held_out = ActivationDataset.from_texts(model, texts[10:15], layer=1, component="resid")
    result = ProfiSAETrainer().train(
        SAE(model.d_model, 64, k=4, seed=0),
        dataset=one,
        num_steps=4,
        batch_size=64,
        validation_dataset=held_out,
        validate_every=2,
    )
    assert [v["step"] for v in result.validations] == [2, 4]
