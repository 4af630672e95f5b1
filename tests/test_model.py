"""The facade: tracing, interventions, generation, features at run time, training, loading."""

from __future__ import annotations

import contextlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxsae
from lm_toys import LAYERS, WIDTH, make, write_folder
from mlxsae import InterpretableModel, io, lm
from mlxsae import interventions as iv
from mlxsae.lm import HookPoint, hooks
from mlxsae.train import SAEConfig, TrainConfig

POINT = "blocks.1.hook_resid_post"
TEXTS = ["The big old dog", "a cat", "ran far away"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture
def model(folder: Path) -> InterpretableModel:
    return InterpretableModel(folder)


def an_sae(seed: int = 0, d_in: int = WIDTH, k: int = 6) -> mlxsae.SAE:
    return mlxsae.SAE(d_in, 4 * WIDTH, k=k, seed=seed)


@pytest.fixture(autouse=True)
def _nothing_stays_hooked():
    yield
    assert hooks._frames.get() == ()
    assert not hooks._wearers


# ---- tracing


def test_a_trace_is_the_models_own_pass(model: InterpretableModel) -> None:
    trace = model.trace(TEXTS[0])
    plain = model.lm(trace.tokens)
    assert mx.array_equal(trace.output, plain)
    whole = lm.capture(model.lm, trace.tokens, model.hook_points)
    assert list(trace.activations) == model.hook_points == list(whole)
    for point in model.hook_points:
        assert mx.array_equal(trace.activations[point], whole[point])
    for key in ("model.model.layers.1.mlp", "model.layers.1.mlp", "layers.1.mlp", "blocks.1.hook_mlp_out"):
        assert trace.activations[key] is trace.activations[HookPoint(1, "mlp_out")]
    assert mx.array_equal(trace.activations["layers.2.output"], trace.activations["layers.2.residual"])


@pytest.mark.parametrize(
    "inputs",
    ["The big", ["The big"], [1, 5, 6, 7], [[1, 5, 6, 7]], mx.array([1, 5, 6, 7]), mx.array([[1, 5, 6, 7]])],
)
def test_inputs(model: InterpretableModel, inputs: object) -> None:
    trace = model.trace(inputs)  # type: ignore[arg-type]
    ids = model.lm.encode("The big") if "The big" in inputs else [1, 5, 6, 7]  # type: ignore[operator]
    assert trace.tokens.tolist() == [ids]
    assert trace.valid.tolist() == [[i not in model.lm.special_ids for i in ids]]
    assert mx.array_equal(model(inputs), trace.output)  # type: ignore[arg-type]


def test_rows_are_padded_on_the_right_and_marked(model: InterpretableModel) -> None:
    trace = model.trace(TEXTS)
    for i, text in enumerate(TEXTS):
        alone = model.trace(text)
        t = alone.tokens.shape[1]
        assert trace.valid[i].tolist() == [False] + [True] * (t - 1) + [False] * (16 - t)
        assert mx.allclose(trace.output[i, :t], alone.output[0], atol=1e-5)
        assert mx.allclose(trace.activations[POINT][i, :t], alone.activations[POINT][0], atol=1e-5)


def test_interventions_as_the_seeds_write_them(model: InterpretableModel) -> None:
    with model.trace(TEXTS[0]) as trace:
        before = model.output.save()
        steered = 2 * trace.activations["model.model.layers.1.mlp"]
    with model.trace(TEXTS[0], interventions={"layers.1.mlp": lambda x: steered}) as trace:
        output = model.output.save()
    assert mx.array_equal(trace.activations["layers.1.mlp"], steered)
    assert mx.abs(output - before).max() > 1e-3
    with model.trace(TEXTS[0], interventions={"layers.1.mlp": iv.replace_with(steered)}):
        assert mx.array_equal(model.output.save(), output)
    with model.trace(TEXTS[0], interventions={"layers.1.mlp": iv.scale(2.0)}):
        assert mx.array_equal(model.output.save(), output)
    with model.trace(TEXTS[0], interventions={"layers.1.mlp": lambda x: x}):
        assert mx.array_equal(model.output.save(), before)


def test_traces_nest_and_the_output_is_the_inner_ones(model: InterpretableModel) -> None:
    with model.trace(TEXTS[0]) as outer:
        with model.trace(TEXTS[1]) as inner:
            assert model.output.value is inner.output
        assert model.output.value is outer.output
    with pytest.raises(ValueError, match="there must be a trace around"):
        _ = model.output


def test_interventions_count_tokens_from_each_rows_own_end(model: InterpretableModel) -> None:
    clean = model.trace(TEXTS).activations[POINT]
    found = model.trace(TEXTS, interventions={POINT: iv.zero}, positions=[0, -1]).activations[POINT]
    for i, text in enumerate(TEXTS):
        last = len(model.lm.encode(text)) - 1
        for t in range(16):
            expected = mx.zeros(WIDTH) if t in (0, last) else clean[i, t]
            assert mx.array_equal(found[i, t], expected)
    per_edit = model.trace(TEXTS, interventions={POINT: iv.at(iv.zero, [-1, 0])}, positions=[3])
    assert mx.array_equal(per_edit.activations[POINT], found)


def test_a_trace_computes_no_more_than_is_asked(model: InterpretableModel) -> None:
    """An edit's value is never computed where nothing asks for what comes after it."""
    tokens = mx.random.randint(3, 60, (16, 64))
    trace = model.trace(tokens)
    mx.eval(trace.activations["layers.0.mlp"])
    mx.synchronize()
    early = mx.get_active_memory()
    mx.eval(trace.output)
    assert mx.get_active_memory() > early + 4 * LAYERS * trace.activations["layers.0.mlp"].nbytes


def test_save_lets_go_of_the_rest(model: InterpretableModel) -> None:
    trace = model.trace(mx.random.randint(3, 60, (16, 64)))
    mx.eval(trace.output, list(trace.activations.values()))
    before = mx.get_active_memory()
    assert trace.save("layers.1.mlp") is trace
    assert list(trace.activations) == [HookPoint(1, "mlp_out")]
    assert before - mx.get_active_memory() > 20 * trace.activations["mlp"].nbytes
    with pytest.raises(KeyError, match=r"there is blocks.1.hook_mlp_out"):
        trace.activations[POINT]
    fewer = model.trace("a cat", hook_points=["layers.1.mlp", "layers.0.mlp.gate_proj"])
    assert [*map(str, fewer.activations)] == ["blocks.1.hook_mlp_out", "model.layers.0.mlp.gate_proj.output"]


def test_memory_does_not_grow_over_repeated_traces(model: InterpretableModel) -> None:
    sae = an_sae()
    model.saes[POINT] = sae
    tokens, sizes, held = mx.random.randint(3, 60, (4, 32)), [], None
    for i in range(14):
        with (
            model.interpretation_enabled(),
            model.trace(tokens, interventions={POINT: iv.scale(1.1)}) as trace,
        ):
            model.output.save()
            held = trace.activations["layers.3.attn"]
            mx.eval(held)
        model.get_active_features()
        del trace
        if i >= 4:  # reference counts alone free a pass: no gc.collect here
            sizes.append(mx.get_active_memory())
    assert held is not None
    assert max(sizes) - min(sizes) <= held.nbytes


def test_batch_get_activations(model: InterpretableModel) -> None:
    points = [POINT, "layers.2.mlp", (0, "attn_pattern")]
    found = model.batch_get_activations(TEXTS, points, batch_size=2)
    for i, text in enumerate(TEXTS):
        alone = lm.capture(model.lm, mx.array([model.lm.encode(text)]), points)
        for point, x in alone.items():
            assert found[point][i].shape == x.shape[1:]
            assert mx.allclose(found[point][i], x[0], atol=1e-5)


def test_mean_activation(model: InterpretableModel) -> None:
    rows = model.batch_get_activations(TEXTS, POINT)[POINT]
    expected = np.concatenate([np.array(row)[1:] for row in rows]).mean(0)  # without BOS
    mean = model.mean_activation(TEXTS, POINT, batch_size=2)
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
    ablated = model.trace("a cat", interventions={POINT: iv.replace_with(mean)}).activations[POINT]
    assert mx.allclose(ablated, mx.broadcast_to(mean, ablated.shape))


def test_token_predictions_of_logits_and_of_residual_streams(model: InterpretableModel) -> None:
    trace = model.trace(TEXTS[:2])
    best = model.get_token_predictions(trace.output[0, -1], top_k=5)
    assert best == np.argsort(-np.array(trace.output[0, -1]), kind="stable")[:5].tolist()
    assert all(isinstance(model.token_to_str(token), str) for token in best)
    last = trace.activations[(LAYERS - 1, "resid_post")]
    assert mx.allclose(model.lm.unembed(last), trace.output, atol=1e-4)
    assert model.get_token_predictions(last, top_k=3) == model.get_token_predictions(trace.output, top_k=3)
    with pytest.raises(ValueError, match=r"h must be \[..., 61\] or \[..., 32\]"):
        model.get_token_predictions(mx.zeros(7))
    with pytest.raises(ValueError, match=r"top_k must be in \(0, 61\]"):
        model.get_token_predictions(last, top_k=62)


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "cohere", "nanochat", "mamba", "olmo2"])
def test_unembedding_is_the_families_own(name: str) -> None:
    wrapped = lm.LanguageModel(make(name))
    tokens = mx.array([[5, 6, 7]])
    logits, found = lm.run_with_capture(wrapped, tokens, (LAYERS - 1, "resid_post"))
    assert mx.allclose(wrapped.unembed(next(iter(found.values()))), logits, atol=1e-5)
    with pytest.raises(ValueError, match=r"resid must be \[..., 32\]"):
        wrapped.unembed(mx.zeros((2, 3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.trace([]), "at least one prompt"),
        (lambda m: m.trace([[]]), "at least one prompt"),
        (lambda m: m.trace(mx.zeros((0, 3), mx.int32)), "at least one prompt"),
        (lambda m: m.trace(mx.zeros((1, 0), mx.int32)), "at least one prompt"),
        # MLX reads the embedding past its end.
        (lambda m: m.trace([1, 10**7]), r"token ids must be in \[0, \d+\) but got 10000000"),
        (lambda m: m.trace(mx.array([[1, m.vocab_size]])), r"token ids must be in"),
        (lambda m: m.trace([-1]), r"token ids must be in \[0, \d+\) but got -1"),
        (lambda m: m.trace(mx.zeros((1, 2))), "tokens must be integers"),
        (
            lambda m: m.trace("a", interventions={"layers.1.mpl": iv.zero}),
            "component must be one of resid_pre",
        ),
        (lambda m: m.trace("a", interventions={"layers.1.mlp": 3}), "must be callable"),
        (lambda m: m.trace("a", positions=[-3]), "ints >= -2"),
        (lambda m: m.trace("a", hook_points="layers.9"), r"layer must be in \[0, 3\]"),
        (lambda m: m.mean_activation([[1]], POINT), "at least one valid token"),
        (lambda m: m.steer("a", 3, 1.0), r"a feature must be \(hook point, index\)"),
        (lambda m: m.train_sae(1, "attn_pattern", TEXTS), "as many as keys"),
        (lambda m: m.train_sae(1), "dataset must be given"),
        (lambda m: m.train_sae(7, dataset=TEXTS), r"layer must be in \[0, 3\]"),
        (lambda m: m.interpretation_enabled().__enter__(), "must have SAEs"),
    ],
)
def test_refused(model: InterpretableModel, call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model)  # type: ignore[operator]


def test_a_bare_model_takes_token_ids() -> None:
    model = InterpretableModel(make("qwen2"))
    trace = model.trace([[5, 6, 7], [8, 9]])
    assert trace.tokens.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert trace.valid.tolist() == [[True] * 3, [True, True, False]]
    with pytest.raises(ValueError, match="must have a tokenizer"):
        model.trace("a")
    with pytest.raises(TypeError, match="a tokenizer goes into tokenizer="):
        InterpretableModel(make("qwen2"), object())  # type: ignore[arg-type]


# ---- generation


def test_generation_under_interventions_equals_the_pass_without_a_cache(model: InterpretableModel) -> None:
    model.saes[POINT] = an_sae()
    edits = model.steering({(POINT, 3): 2.0, ("layers.1", 5): 0.0}) | {
        "layers.2.attn": iv.at(iv.scale(0.5), "generated"),
        "layers.0.attn_pattern": iv.at(lambda p: 0.5 * p, "prompt"),
    }
    prompt = model.lm.encode(TEXTS[0])
    steps = list(
        model.stream(TEXTS[0], max_tokens=8, interventions=edits, positions=[-2, 17], temperature=1.0, seed=3)
    )
    ids = prompt + [step.token for step in steps]
    n = len(prompt)
    where = {
        POINT: [n - 2, 17],
        "layers.2.attn": list(range(n, len(ids))),
        "layers.0.attn_pattern": list(range(n)),
    }
    again = model.steering({(POINT, 3): 2.0, (POINT, 5): 0.0}) | {
        "layers.2.attn": iv.scale(0.5),
        "layers.0.attn_pattern": lambda p: 0.5 * p,
    }
    whole = model.trace(
        ids,
        interventions={
            spec: iv.at(edit, where[POINT if isinstance(spec, HookPoint) else spec])
            for spec, edit in again.items()
        },
    )
    logprobs = whole.output[0] - mx.logsumexp(whole.output[0], axis=-1, keepdims=True)
    assert len(steps) >= 4
    for i, step in enumerate(steps):
        assert mx.allclose(step.logprobs, logprobs[n - 1 + i], rtol=0, atol=1e-4)
    assert model.generate(
        TEXTS[0], max_tokens=8, interventions=edits, positions=[-2, 17], temperature=1.0, seed=3
    ) == "".join(step.text for step in steps)


def test_streamed_features_are_those_of_each_token(model: InterpretableModel) -> None:
    first, second = an_sae(0), an_sae(1)
    model.saes[POINT], model.saes["layers.2.mlp"] = first, second
    steps = list(model.stream(TEXTS[0], max_tokens=6, temperature=1.0, seed=3))
    prompt = model.lm.encode(TEXTS[0])
    trace = model.trace(prompt + [step.token for step in steps])
    for spec, sae in ((POINT, first), ("layers.2.mlp", second)):
        values, indices = sae.encode(trace.activations[spec][0])
        for i, step in enumerate(steps, start=len(prompt)):
            code = step.features[spec]
            assert isinstance(code, mlxsae.SparseCode)
            assert mx.array_equal(code.indices, indices[i : i + 1])
            assert mx.allclose(code.values, values[i : i + 1], rtol=0, atol=1e-4)
    only = next(model.stream("a", max_tokens=2, features="layers.2.mlp"))
    assert [*map(str, only.features)] == ["blocks.2.hook_mlp_out"]
    with pytest.raises(KeyError, match="there must be an SAE at"):
        model.stream("a", max_tokens=2, features="layers.3.mlp")


@pytest.mark.parametrize("rule", ["batchtopk", "jumprelu"])
def test_codes_of_varying_length_stream_too(model: InterpretableModel, rule: str) -> None:
    made = (
        mlxsae.sae.BatchTopK(6, threshold=0.4)
        if rule == "batchtopk"
        else mlxsae.sae.JumpReLU(initial_threshold=0.4)
    )
    sae = mlxsae.SAE(WIDTH, 4 * WIDTH, rule=made, seed=0)
    model.saes[POINT] = sae
    edits = model.steering({(POINT, 3): 2.0})
    plain = [s.token for s in lm.stream_generate(model.lm, TEXTS[0], max_tokens=5, edits=edits)]
    steps = list(model.stream(TEXTS[0], max_tokens=5, interventions=edits))
    assert [s.token for s in steps] == plain
    prompt = model.lm.encode(TEXTS[0])
    trace = model.trace(prompt + plain, interventions=edits)
    dense = sae.to_dense(sae.encode(trace.activations[POINT][0]))
    assert 0 < (dense > 0).sum() < dense.size
    for i, step in enumerate(steps, start=len(prompt)):
        assert mx.allclose(sae.to_dense(step.features[POINT])[0], dense[i], rtol=0, atol=1e-4)
    with model.interpretation_enabled():
        model(prompt)
    found = sae.to_dense(model.get_active_features()[POINT])
    expected = sae.to_dense(sae.encode(model.trace(prompt).activations[POINT]))
    assert mx.array_equal(found, expected)


# ---- features at run time


def test_features_at_run_time(model: InterpretableModel) -> None:
    sae = an_sae()
    model = InterpretableModel(model.lm, {"layers.1.output": sae})
    ids = mx.array([model.lm.encode(TEXTS[0])])
    plain = model(ids)
    with model.interpretation_enabled():
        assert mx.array_equal(model(ids), plain)
        during = model.get_active_features()
    features = model.get_active_features()[POINT]  # good after the block too
    assert during[POINT] is features
    expected = sae.encode(lm.capture(model.lm, ids, POINT)[POINT])
    assert all(map(mx.array_equal, features, expected))
    dense = sae.to_dense(features)
    assert (dense != 0).sum().item() == (features.values > 0).sum().item()
    with model.interpretation_enabled():
        model(ids[:, :3])
        model(ids[:, :2])
    assert model.get_active_features()[POINT].values.shape == (1, 2, 6)  # of the last pass
    model(ids)
    assert model.get_active_features()[POINT].values.shape == (1, 2, 6)  # not enabled


def test_steering_adds_the_difference_and_nothing_else(model: InterpretableModel) -> None:
    sae = an_sae()
    model.saes[POINT] = sae
    clean = model.trace(TEXTS)
    x = clean.activations[POINT]
    dense = sae.to_dense(sae.encode(x))
    feature = int(mx.argmax((dense > 0).sum((0, 1))).item())
    f = dense[..., feature]
    assert 0 < (f > 0).sum() < f.size
    for mode, change in (("scale", 1.5 * f), ("set", 2.5 - f), ("add", mx.full(f.shape, 2.5))):
        edits = model.steering({(POINT, feature): 2.5}, mode=mode)
        trace = model.trace(TEXTS, interventions=edits)
        expected = x + change[..., None] * sae.W_dec[feature]
        assert mx.allclose(trace.activations[POINT], expected, atol=1e-5)
        output = model.steer(TEXTS, feature_id=("layers.1", feature), strength=2.5, mode=mode)
        assert mx.array_equal(output, trace.output)
        with model.steering_enabled({(POINT, feature): 2.5}, mode=mode):
            assert mx.array_equal(model(TEXTS), trace.output)
    assert mx.abs(model.steer(TEXTS, (POINT, feature), 0.0) - clean.output).max() > 1e-4
    assert mx.array_equal(model.steer(TEXTS, (POINT, feature), 1.0), clean.output)
    silent = int(mx.argmin(dense.sum((0, 1))).item())
    assert mx.array_equal(model.steer(TEXTS, (POINT, silent), 9.0), clean.output)


# ---- SAEs: training, saving, loading


def test_train_sae_in_one_line(folder: Path, tmp_path: Path) -> None:
    model = InterpretableModel("tiny")
    texts = lm.tiny.texts(50, seed=0)
    sae = model.train_sae(
        layer=2, component="residual", dataset=texts, save_path=tmp_path / "sae", progress=False
    )
    assert (sae.d_in, sae.d_sae) == (128, 4096)
    assert model.saes["layers.2"] is sae
    assert sae.metadata["hook_name"] == "blocks.2.hook_resid_post"
    assert sae.metadata["model_name"] == "tiny"
    metrics = model.evaluate_sae(sae, lm.tiny.texts(40, seed=9, split="held_out"))
    assert metrics["fvu"] < 0.5
    assert metrics["loss_recovered_mean"] > 0.5
    assert metrics == model.evaluate_sae("layers.2", lm.tiny.texts(40, seed=9, split="held_out"))
    # Ten walks through what there is.
    valid = sum(
        int(v.sum().item()) for _, v in lm.token_batches(model.lm, texts, context_size=64, batch_size=16)
    )
    assert sae.metadata["training"]["tokens"] == 10 * valid

    other = InterpretableModel("tiny")
    loaded = other.load_sae(tmp_path / "sae")
    assert other.saes[(2, "residual")] is loaded
    assert mx.array_equal(loaded.W_dec, sae.W_dec)
    with pytest.raises(ValueError, match="must have d_in=32, the model's width there, but has 128"):
        InterpretableModel(folder).load_sae(tmp_path / "sae")


def small(total_tokens: int = 2048, **fields: object) -> SAEConfig:
    return SAEConfig(
        expansion_factor=2, k=4, train=TrainConfig(total_tokens=total_tokens, batch_size=128, sample_size=256), **fields  # type: ignore[arg-type]
    )  # fmt: skip


def test_epochs_are_walks_through_the_texts(model: InterpretableModel) -> None:
    config = SAEConfig(expansion_factor=2, k=4, train=TrainConfig(epochs=1.5, batch_size=16, sample_size=64))
    sae = model.train_sae(1, dataset=TEXTS * 20, config=config, progress=False)
    valid = 20 * sum(len(model.lm.encode(text, bos=False)) for text in TEXTS)
    assert sae.metadata["training"]["tokens"] == 1.5 * valid


@pytest.mark.parametrize("component", ["mlp", "attn", "z", "mlp_post", "resid_mid"])
def test_train_sae_at_every_width(model: InterpretableModel, component: str) -> None:
    sae = model.train_sae(1, component, TEXTS, config=small(), progress=False)
    assert sae.d_in == model.lm.shape_at((component, 1))[-1]
    assert sae.d_sae == 2 * sae.d_in


def test_train_sae_from_every_kind_of_dataset(model: InterpretableModel, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"story": "{text}"}}\n' for text in TEXTS * 40))
    rows = [{"story": text} for text in TEXTS * 40]
    x = mx.concatenate(model.batch_get_activations(TEXTS * 10, "layers.1.mlp")["layers.1.mlp"])
    trained = [
        model.train_sae(1, dataset=TEXTS * 40, config=small(), progress=False),
        model.train_sae(1, dataset=rows, text_field="story", config=small(), progress=False),
        model.train_sae(1, dataset=file, text_field="story", config=small(), progress=False),
        model.train_sae(1, dataset=iter(TEXTS * 40), config=small(1024), progress=False),
        model.train_sae(
            1, dataset=mlxsae.data.ArraySource(x, batch_size=128), config=small(), progress=False
        ),
    ]
    for same in trained[1:3]:
        assert mx.array_equal(same.W_dec, trained[0].W_dec)
    assert trained[2].metadata["dataset_path"] == str(file)
    assert [sae.metadata["training"]["tokens"] for sae in trained] == [2048, 2048, 2048, 1024, 2048]


def test_no_padding_bos_or_special_token_reaches_the_trainer(model: InterpretableModel) -> None:
    """The embedding of a llama tells tokens apart, so what the trainer gets can be read back: property test."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    embedding = np.array(model.lm.model.model.embed_tokens.weight)  # type: ignore[attr-defined]
    special = model.lm.special_ids
    assert special == {0, 1, 2}

    def tokens_of(batch: mx.array) -> list[int]:
        distance = ((np.array(batch)[:, None] - embedding[None]) ** 2).sum(-1)
        assert distance.min(axis=1).max() < 1e-9
        return distance.argmin(axis=1).tolist()

    word = st.text("abc XYZ§€", min_size=1, max_size=25)  # § and € are unknown: <unk>, a special token

    @settings(max_examples=25, deadline=None, database=None)
    @given(
        texts=st.lists(word, min_size=1, max_size=12),
        context_size=st.integers(2, 20),
        rows=st.integers(1, 5),
        batch_size=st.integers(1, 40),
    )
    def check(texts: list[str], context_size: int, rows: int, batch_size: int) -> None:
        from mlxsae.data import ShuffleBuffer
        from mlxsae.data.model_activations import ModelActivations

        expected = sorted(
            i for text in texts if text.strip() for i in model.lm.encode(text, bos=False) if i not in special
        )
        if not expected:
            return
        stream = ModelActivations(
            model.lm,
            HookPoint(0, "resid_pre"),
            lambda: lm.token_batches(model.lm, texts, context_size=context_size, batch_size=rows),
        )
        source = ShuffleBuffer(stream, batch_size=batch_size, capacity=batch_size + 7)
        seen: list[int] = []
        while (batch := source.next_batch()) is not None:
            seen += tokens_of(batch[0])
        assert sorted(seen) == expected

    check()


def test_saes_are_read_when_they_are_used(model: InterpretableModel, tmp_path: Path) -> None:
    for layer in (0, 2):
        sae = an_sae(layer)
        io.save(sae, tmp_path / f"layer_{layer}", metadata={"hook_name": f"blocks.{layer}.hook_resid_post"})
    model = InterpretableModel(model.lm, mlxsae.load_saes(tmp_path))
    assert list(model.saes) == [HookPoint(0, "resid_post"), HookPoint(2, "resid_post")]
    assert model.saes.loaded() == []
    assert model.saes["layers.2"].d_sae == 4 * WIDTH
    assert model.saes.loaded() == [HookPoint(2, "resid_post")]
    assert model.saes["blocks.2.hook_resid_post"] is model.saes[(2, "residual")]
    del model.saes["layers.2"]
    assert len(model.saes) == 1
    assert "layers.2" not in model.saes
    assert len(model.load_saes(tmp_path)) == 2
    with model.interpretation_enabled("layers.0"):
        model("a cat")
    assert model.saes.loaded() == [HookPoint(0, "resid_post")]
    with pytest.raises(KeyError, match=r"there must be an SAE at layers.1 but there is blocks.0"):
        model.saes["layers.1"]


def test_a_folder_of_saes_must_be_in_order(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must hold SAEs"):
        mlxsae.load_saes(tmp_path)
    io.save(an_sae(), tmp_path / "a", metadata={"hook_name": POINT})
    io.save(an_sae(), tmp_path / "b", metadata={"hook_name": POINT})
    with pytest.raises(ValueError, match=r"must not both be for blocks\.1"):
        mlxsae.load_saes(tmp_path)
    io.save(an_sae(), tmp_path / "b")
    with pytest.raises(ValueError, match="must name its hook_name"):
        mlxsae.load_saes(tmp_path)


def test_load_sae_says_what_is_missing(model: InterpretableModel, tmp_path: Path, monkeypatch) -> None:
    io.save(an_sae(), tmp_path / "nameless")
    with pytest.raises(ValueError, match="must name its hook_name, or layer and component"):
        model.load_sae(tmp_path / "nameless")
    sae = model.load_sae(tmp_path / "nameless", layer=1, component="mlp")
    assert model.saes["layers.1.mlp"] is sae
    with pytest.raises(FileNotFoundError):
        model.load_sae(tmp_path / "absent")

    import huggingface_hub

    def hub(name: str) -> str:
        if name == "someone/sae":
            return str(tmp_path / "nameless")
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert model.load_sae("someone/sae", layer=1, component="attn").d_in == WIDTH
    with pytest.raises(OSError, match=r"'someone/other' must be a folder or an SAE on the hub.*no route"):
        model.load_sae("someone/other")


def test_an_exception_leaves_the_model_as_it_was(model: InterpretableModel) -> None:
    model.saes[POINT] = an_sae()
    plain = model("a cat")
    with contextlib.suppress(RuntimeError), model.interpretation_enabled(), model.trace("a cat"):
        raise RuntimeError
    assert model._traces == []
    assert mx.array_equal(model("a cat"), plain)


def test_load_saes_names_the_file_that_is_damaged(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match=r"a/cfg\.json must be JSON but is damaged"):
        mlxsae.load_saes(tmp_path)


def test_tokens_may_be_numpys(model: InterpretableModel) -> None:
    for ids in ([1, 2, 3], [[1, 2, 3], [3, 2, 1]]):
        want = np.array(model.trace(ids).output)
        np.testing.assert_array_equal(model.trace(np.array(ids)).output, want)
        np.testing.assert_array_equal(model(np.array(ids)), want)
