"""Hooks by module path, on models that are none of mlx-lm's and on the inside of those that are."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from lm_toys import LAYERS, VOCAB, WIDTH, make, tokens_of
from mlxsae import lm
from mlxsae.lm import HookPoint, ModulePoint
from mlxsae.lm.families import resolve


class Pair(NamedTuple):
    hidden: mx.array
    gate: mx.array


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def __call__(self, x: mx.array) -> Pair:
        y = self.fc(x)
        return Pair(y, mx.sigmoid(y))


class Vision(nn.Module):
    """Two inputs, images [b, h, w, c], modules in lists and dicts, a NamedTuple between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.stages = [nn.Linear(4, 6), Gated()]
        self.heads = {"class": nn.Linear(6, 3)}

    def __call__(self, image: mx.array, offset: mx.array) -> mx.array:
        x = self.stages[0](self.conv(image)).mean((1, 2)) + offset
        y = self.stages[1](x)
        return self.heads["class"](y.hidden * y.gate)


@pytest.fixture
def vision() -> Vision:
    mx.random.seed(0)
    return Vision()


@pytest.fixture
def inputs() -> tuple[mx.array, mx.array]:
    return mx.random.normal((2, 5, 5, 2)), mx.random.normal((6,))


def test_capture_by_path(vision: Vision, inputs: tuple[mx.array, mx.array]) -> None:
    plain = vision(*inputs)
    points = ["conv", "stages.0.input", "stages.1", "stages.1.fc.output", "heads.class"]
    output, found = lm.run_with_capture(vision, inputs, points)
    assert mx.array_equal(output, plain)
    assert [str(point) for point in found] == [
        "conv.output", "stages.0.input", "stages.1.output", "stages.1.fc.output", "heads.class.output",
    ]  # fmt: skip
    assert mx.array_equal(found["conv"], vision.conv(inputs[0]))
    assert mx.array_equal(found["stages.0.input"], found["conv"])
    assert mx.array_equal(found["stages.1"], found["stages.1.fc"])
    assert mx.array_equal(found["heads.class"], plain)


def test_capture_stops_early(vision: Vision, inputs: tuple[mx.array, mx.array]) -> None:
    def forbidden(x: mx.array) -> mx.array:
        raise AssertionError("was run")

    with lm.splice(vision, {"heads.class.input": forbidden}):
        assert lm.capture(vision, inputs, "stages.0")["stages.0"].shape == (2, 3, 3, 6)
        with pytest.raises(AssertionError, match="was run"):
            vision(*inputs)


def test_edits_by_path(vision: Vision, inputs: tuple[mx.array, mx.array]) -> None:
    with lm.splice(vision, {"stages.1.output": lambda x: 2 * x, "stages.0.input": lambda x: x + 1}):
        edited, found = lm.run_with_capture(vision, inputs, ["stages.1", "stages.1.input"])
    x = vision.stages[0](vision.conv(inputs[0]) + 1).mean((1, 2)) + inputs[1]
    y = vision.stages[1](x)
    np.testing.assert_allclose(found["stages.1.input"], x, rtol=1e-6)
    np.testing.assert_allclose(found["stages.1"], 2 * y.hidden, rtol=1e-6)
    np.testing.assert_allclose(edited, vision.heads["class"](2 * y.hidden * y.gate), rtol=1e-5)


def test_an_sae_can_be_trained_on_any_module(vision: Vision) -> None:
    import mlxsae

    image, offset = mx.random.normal((64, 5, 5, 2)), mx.zeros(6)
    x = lm.capture(vision, (image, offset), "stages.0")["stages.0"].reshape(-1, 6)
    sae = mlxsae.SAE(6, 24, k=3, seed=0)
    mlxsae.fit(
        sae,
        mlxsae.data.ArraySource(x, batch_size=64),
        mlxsae.TrainConfig(total_tokens=12_800, batch_size=64),
    )
    assert mlxsae.metrics.evaluate(sae, [x])["fvu"] < 0.2
    with lm.splice(vision, {"stages.0": sae}):
        assert mx.isfinite(vision(image, offset)).all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stages.2", r"Vision has no module 'stages.2'; it has .*stages.0"),
        ("fcc", r"Vision has no module 'fcc'"),
        ("blocks.1.hook_resid_post", "must be an mlx-lm model with a list"),
        (HookPoint(0, "mlp_out"), "must be an mlx-lm model with a list"),
        (ModulePoint("stages.9"), "has no module 'stages.9'"),
    ],
)
def test_what_is_not_there_is_refused(
    vision: Vision, inputs: tuple[mx.array, mx.array], spec: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lm.capture(vision, inputs, spec)  # type: ignore[arg-type]


def test_a_module_without_an_array_is_refused(vision: Vision, inputs: tuple[mx.array, mx.array]) -> None:
    class Text(nn.Module):
        def __call__(self, word: str) -> str:
            return word

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = Text()

        def __call__(self, x: mx.array) -> mx.array:
            self.text("a")
            return x

    with pytest.raises(ValueError, match="must return an array but gave str"):
        lm.capture(Holder(), inputs[1], "text")
    with pytest.raises(ValueError, match="must get an array first but got no such argument"):
        lm.capture(Holder(), inputs[1], "text.input")


def test_paths_inside_mlx_lms_models() -> None:
    model, tokens = make("llama"), tokens_of(1, 5)
    assert resolve(model, "layers.2.mlp") == HookPoint(2, "mlp_out")
    for spec in ("model.layers.2.mlp.gate_proj", "layers.2.mlp.gate_proj", "2.mlp.gate_proj"):
        assert resolve(model, spec) == ModulePoint("model.layers.2.mlp.gate_proj")
    assert resolve(model, "layers.2.mlp.down_proj.input") == ModulePoint(
        "model.layers.2.mlp.down_proj", "input"
    )
    found = lm.capture(model, tokens, ["layers.2.mlp.down_proj.input", "layers.2.mlp_post", "model.norm"])
    assert mx.array_equal(found["layers.2.mlp_post"], found["layers.2.mlp.down_proj.input"])
    assert found["model.norm"].shape == (1, 5, WIDTH)
    with pytest.raises(ValueError, match="component must be one of resid_pre"):
        resolve(model, "gate_proj")  # of which layer?


def test_a_language_model_of_ones_own() -> None:
    """Blocks in `.layers` are enough for the residual stream, in TransformerLens' spelling too."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(WIDTH, WIDTH)

        def __call__(self, x: mx.array) -> mx.array:
            return x + nn.gelu(self.mlp(x))

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, WIDTH)
            self.layers = [Block() for _ in range(LAYERS)]

        def __call__(self, tokens: mx.array) -> mx.array:
            x = self.embed(tokens)
            for block in self.layers:
                x = block(x)
            return self.embed.as_linear(x)

    model, tokens = Own(), tokens_of(2, 5)
    found = lm.capture(
        model, tokens, ["blocks.1.hook_resid_post", "layers.2", "layers.1.mlp", ("resid_pre", 2)]
    )
    assert list(map(str, found)) == [
        "blocks.1.hook_resid_post", "layers.2.output", "layers.1.mlp.output", "blocks.2.hook_resid_pre",
    ]  # fmt: skip
    assert mx.array_equal(found["blocks.1.hook_resid_post"], found["blocks.2.hook_resid_pre"])
    wrapped = lm.LanguageModel(model)
    assert (wrapped.n_layers, wrapped.d_model, wrapped.n_heads) == (LAYERS, WIDTH, None)
    assert wrapped.sites == ("resid_pre", "resid_post")
