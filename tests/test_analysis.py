"""Examples, detection, effects and steering, against what they are defined to be."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxsae import SAE, lm
from mlxsae.analysis import Candidate, Survey, detection_table, direct_effects, find_steering, steer, survey
from mlxsae.lm import HookPoint, TokenBatch
from mlxsae.metrics.in_model import evaluate_in_model
from mlxsae.sae import Activation, BatchTopK, Crosscoder, JumpReLU, Rule


@pytest.fixture
def sae() -> SAE:
    return SAE(8, 32, k=4, seed=3)


@pytest.fixture
def x() -> mx.array:
    return mx.random.normal((2, 5, 8), key=mx.random.key(1))


def dense(sae: SAE, x: mx.array) -> np.ndarray:
    return np.array(sae.to_dense(sae.encode(x)))


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        ("scale", lambda f, s: f * s),
        ("add", lambda f, s: f + s),
        ("set", lambda f, s: np.full_like(f, s)),
    ],
)
def test_steering_adds_exactly_the_difference(sae: SAE, x: mx.array, mode: str, change) -> None:
    strengths = {2: 2.5, 17: -1.0, 30: 0.0}
    latents = dense(sae, x)
    steered = latents.copy()
    for feature, strength in strengths.items():
        steered[..., feature] = change(latents[..., feature], np.float32(strength))
    want = np.array(x) + (steered - latents) @ np.array(sae.W_dec)
    got = np.array(steer(sae, strengths, mode=mode)(x))
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_steering_that_changes_no_latent_changes_no_bit(sae: SAE, x: mx.array) -> None:
    silent = int(np.flatnonzero((dense(sae, x) == 0).all(axis=(0, 1)))[0])
    assert mx.array_equal(steer(sae, {silent: 0.0})(x), x)
    assert mx.array_equal(steer(sae, {1: 1.0})(x), x)


def test_steering_keeps_the_dtype(sae: SAE, x: mx.array) -> None:
    assert steer(sae, {1: 3.0}, mode="add")(x.astype(mx.bfloat16)).dtype == mx.bfloat16


@pytest.mark.parametrize(
    ("strengths", "mode", "said"),
    [
        ({1: 1.0}, "multiply", "mode"),
        ({}, "scale", "at least one"),
        ({32: 1.0}, "scale", r"\[0, 32\)"),
        ({-1: 1.0}, "scale", r"\[0, 32\)"),
        ({1: float("nan")}, "scale", "finite"),
    ],
)
def test_steering_refuses(sae: SAE, strengths, mode: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        steer(sae, strengths, mode=mode)


def test_steering_refuses_a_transcoder() -> None:
    with pytest.raises(ValueError, match="target"):
        steer(SAE(8, 32, k=4, d_out=6), {1: 1.0})


@pytest.mark.parametrize("mode", ["scale", "add", "set"])
@pytest.mark.parametrize("strengths", [{5: 0.5}, {2: 2.5, 17: -1.0}, {2: 2.5, 17: -1.0, 30: 0.0}])
def test_steering_a_crosscoder(mode: str, strengths: dict[int, float]) -> None:
    """Side by side or apart; as many features as sources must not be taken for them."""
    coder = Crosscoder(4, 2, 32, k=8, seed=3)
    x = mx.random.normal((3, 5, 8), key=mx.random.key(1))
    latents = dense(coder, x)
    assert (latents[..., list(strengths)] > 0).any()
    steered = latents.copy()
    for i, s in strengths.items():
        steered[..., i] = {"scale": latents[..., i] * s, "add": latents[..., i] + s, "set": s}[mode]
    want = np.array(x).reshape(3, 5, 2, 4) + np.einsum("btj,jsd->btsd", steered - latents, coder.W_dec)
    edit = steer(coder, strengths, mode=mode)
    np.testing.assert_allclose(np.array(edit(x)).reshape(3, 5, 2, 4), want, atol=2e-6)
    np.testing.assert_allclose(np.array(edit(x.reshape(3, 5, 2, 4))), want, atol=2e-6)
    with pytest.raises(ValueError, match=r"\[steer\] x must have shape \[..., 8\] but got \(3, 5, 4\)"):
        edit(x[..., :4])


def test_ablation_takes_away_latents_below_0(x: mx.array) -> None:
    sae = SAE(8, 32, rule=Activation(mx.tanh), seed=3)
    latents = np.tanh(np.array(x) @ np.array(sae.W_enc))
    assert (latents[..., 4] < -0.1).any()
    want = np.array(x) - latents[..., 4:5] * np.array(sae.W_dec)[4]
    np.testing.assert_allclose(np.array(steer(sae, {4: 0.0})(x)), want, atol=2e-6)
    np.testing.assert_allclose(np.array(steer(sae, {4: 0.0}, mode="set")(x)), want, atol=2e-6)
    assert steer(sae, {4: 0.0})(x[:0]).shape == (0, 5, 8)


def test_features_may_be_numpys(sae: SAE, x: mx.array) -> None:
    feature = np.argmax(dense(sae, x).max(axis=(0, 1)))
    assert not isinstance(feature, int)
    assert mx.array_equal(steer(sae, {feature: 0.0})(x), steer(sae, {int(feature): 0.0})(x))
    with pytest.raises(ValueError, match="feature"):
        steer(sae, {1.0: 0.0})  # type: ignore[dict-item]


def made_survey(rows: list[list[dict[int, float]]], d_sae: int = 6, k: int = 3) -> Survey:
    """A survey from {feature: value} for each token of each row; token ids count up."""
    values, indices, row = [], [], []
    for r, tokens in enumerate(rows):
        for fires in tokens:
            fill = [i for i in range(d_sae) if i not in fires][: k - len(fires)]
            slots = sorted(fires.items()) + [(i, 0.0) for i in fill]
            indices.append([i for i, _ in slots])
            values.append([v for _, v in slots])
            row.append(r)
    n = len(row)
    return Survey(
        d_sae,
        np.array(values, np.float32),
        np.array(indices, np.uint32),
        np.arange(n, dtype=np.int32),
        np.array(row),
    )


def test_statistics_and_top_examples() -> None:
    s = made_survey([[{0: 1.0}, {0: 3.0}, {}], [{0: 2.0, 5: 4.0}], [{}, {5: 1.0}]])
    found = s.statistics()
    np.testing.assert_allclose(found.fire_rate, np.array([3, 0, 0, 0, 0, 2]) / 6)
    np.testing.assert_allclose(found.mean, [2, 0, 0, 0, 0, 2.5])
    np.testing.assert_allclose(found.maximum, [3, 0, 0, 0, 0, 4])
    first, second = s.top_examples(0)
    assert first.tokens.tolist() == [0, 1, 2]
    assert first.activations.tolist() == [1, 3, 0]
    assert first.peak == 1
    assert second.tokens.tolist() == [3]
    assert s.top_examples(3) == []
    assert s.followers(0, 0.5) == {1: 0.5, 2: 0.5}  # token 3 ends its row
    again = Survey(s.d_sae, s.values, s.indices, np.array([4, 5, 4, 5, 6, 6], np.int32), s.row)
    assert sorted(again.contrasts(0, 9)) == [[4, 5, 4]]  # 4 and 5 are its words; here it is silent on one
    with pytest.raises(ValueError, match="feature"):
        s.activations(6)
    with pytest.raises(ValueError, match=r"feature must be an int in \[0, 6\) but got 2.5"):
        s.activations(2.5)  # type: ignore[arg-type]


def test_top_examples_prefer_distinct_words() -> None:
    s = made_survey([[{0: 3.0}], [{0: 2.0}], [{0: 1.0}]])
    same = Survey(s.d_sae, s.values, s.indices, np.array([7, 7, 8], np.int32), s.row)
    assert [e.tokens.tolist() for e in same.top_examples(0, 2)] == [[7], [8]]
    assert len(same.top_examples(0, 3)) == 3
    assert [e.tokens.tolist() for e in same.top_examples(0, 2, distinct=False)] == [[7], [7]]


def test_top_examples_are_strongest_first_with_repeated_ones_too() -> None:
    s = made_survey([[{0: 3.0}], [{0: 2.0}], [{0: 1.0}], [{0: 2.0}]])
    same = Survey(s.d_sae, s.values, s.indices, np.array([7, 7, 8, 7], np.int32), s.row)
    assert [e.activations.tolist() for e in same.top_examples(0, 4)] == [[3], [2], [2], [1]]
    assert [e.activations.tolist() for e in same.top_examples(0, 3)] == [[3], [2], [1]]


def brute_force(s: Survey, labels: np.ndarray, concept: int) -> tuple[float, float]:
    """Best F1 on the even rows over every feature and observed value, and the F1 of that choice on the odd rows."""
    even = s.row % 2 == 0
    best = (-1.0, 0, 0.0)
    for feature in range(s.d_sae):
        a = s.activations(feature)
        for threshold in np.unique(a[even & (a > 0)]):
            says, is_ = (a >= threshold)[even], labels[even, concept]
            f1 = 2 * (says & is_).sum() / (says.sum() + is_.sum())
            best = max(best, (f1, -feature, float(threshold)))
    says, is_ = (s.activations(-best[1]) >= best[2])[~even], labels[~even, concept]
    return best[0], 2 * (says & is_).sum() / (says.sum() + is_.sum())


def test_detection_is_the_best_feature_and_threshold() -> None:
    rng = np.random.default_rng(0)
    n, d_sae, k = 400, 7, 3
    indices = np.stack([np.sort(rng.permutation(d_sae)[:k]) for _ in range(n)]).astype(np.uint32)
    values = np.maximum(rng.normal(size=(n, k)), 0).round(1).astype(np.float32)  # rounded: many ties
    s = Survey(d_sae, values, indices, np.zeros(n, np.int32), np.sort(rng.integers(0, 40, n)))
    labels = rng.random((n, 4)) < 0.2
    labels[:, 1] = s.activations(3) >= 0.8
    labels[:, 3] = False
    labels[:3, 3] = True
    table = detection_table(s, labels)
    for concept in range(3):
        chosen, judged = brute_force(s, labels, concept)
        says = (s.activations(table[concept].feature) >= np.float32(table[concept].threshold))[s.row % 2 == 0]
        is_ = labels[s.row % 2 == 0, concept]
        assert 2 * (says & is_).sum() / (says.sum() + is_.sum()) == pytest.approx(chosen)
        if concept == 1:
            assert table[1].f1 == pytest.approx(judged) == 1.0
            assert table[1].feature == 3
            assert table[1].precision == table[1].recall == 1.0
    rate = labels[s.row % 2 == 1, 1].mean()
    entropy = -(rate * np.log2(rate) + (1 - rate) * np.log2(1 - rate))
    assert table[1].information == pytest.approx(entropy)  # a perfect detector tells everything
    assert table[3].feature is None
    assert table[3].f1 == 0


def test_detection_is_judged_on_rows_that_had_no_part_in_the_choice() -> None:
    rows = [[{0: 1.0}] * 20, [{1: 1.0}] * 20]
    s = made_survey(rows)
    labels = np.ones((40, 1), bool)
    (found,) = detection_table(s, labels)
    assert found.feature == 0  # right on every even row, never on an odd one
    assert found.f1 == 0
    assert detection_table(s, mx.array(labels)) == detection_table(s, labels.tolist()) == [found]
    with pytest.raises(ValueError, match="labels"):
        detection_table(s, labels[:5])
    with pytest.raises(ValueError, match="labels"):
        detection_table(s, labels.astype(np.int32))


@pytest.mark.filterwarnings("error")
def test_detection_without_a_row_to_judge_by() -> None:
    s = made_survey([[{0: 1.0}, {1: 1.0}]])
    (found,) = detection_table(s, np.array([[True], [False]]), min_positives=0)
    assert (found.feature, found.f1, found.positives, found.information) == (0, 0.0, 0, 0.0)


@pytest.fixture(scope="module")
def model(shared):
    return lm.load(shared / "data" / "babyllama105")


@pytest.fixture(scope="module")
def batch(model) -> TokenBatch:
    return lm.tokenize(
        model, ["Once upon a time there was a little girl.", "The dog ran to the park and saw a cat."]
    )


def test_survey_holds_the_codes_of_the_valid_tokens(model, batch: TokenBatch) -> None:
    point = HookPoint(2, "resid_post")
    sae = SAE(model.d_model, 256, k=8, seed=0)
    found = survey(model, sae, point, [batch, batch])
    valid = np.array(batch.valid)
    assert found.n_tokens == 2 * valid.sum()
    x = lm.valid_rows(lm.capture(model, batch.tokens, point)[point], batch.valid)
    np.testing.assert_array_equal(found.indices[: valid.sum()], np.array(sae.encode(x).indices))
    np.testing.assert_array_equal(found.tokens[: valid.sum()], np.array(batch.tokens)[valid])
    assert found.row.tolist() == sorted(found.row.tolist())
    assert set(found.row) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="valid"):
        survey(model, sae, point, [TokenBatch(batch.tokens, mx.zeros_like(batch.valid))])


def test_survey_cuts_rows_between_documents(model) -> None:
    """What comes after a token is the next one of its own document; examples hold no text of two."""
    documents = ["The dog ran.", "A cat sat on it.", "Once upon a time."]
    batches = list(lm.token_batches(model, documents, context_size=24, batch_size=2))
    found = survey(model, SAE(model.d_model, 64, k=64, seed=0), HookPoint(2, "resid_post"), batches)
    pieces, pairs = [], set()
    for batch in batches:
        for tokens, valid in zip(np.array(batch.tokens), np.array(batch.valid), strict=True):
            runs = "".join(" x"[int(v)] for v in valid).split(" ")
            at = 0
            for run in runs:
                if run:
                    pieces.append(tokens[at : at + len(run)].tolist())
                    pairs |= set(zip(pieces[-1][:-1], pieces[-1][1:], strict=True))
                at += len(run) + 1
    assert len(pieces) > sum(len(np.array(batch.tokens)) for batch in batches)  # documents meet within rows
    got = [found.tokens[found.row == r].tolist() for r in range(len(pieces))]
    assert got == pieces
    assert found.row.tolist() == sorted(found.row.tolist())
    for feature in range(64):
        on = found.activations(feature) > 0
        for follower in found.followers(feature, 1e-6, min_share=0):
            assert any((token, follower) in pairs for token in found.tokens[on])
        for example in found.top_examples(feature, 2):
            assert example.tokens.tolist() in pieces


@pytest.mark.parametrize("rule", [BatchTopK(8), JumpReLU(), Activation(mx.tanh)])
def test_survey_shows_the_sae_nothing_but_valid_tokens(model, batch: TokenBatch, rule: Rule) -> None:
    """A BatchTopK without a threshold gives latents to what it is shown, padding and BOS included."""
    point = HookPoint(2, "resid_post")
    sae = SAE(model.d_model, 256, rule=rule, seed=0)
    nothing = TokenBatch(batch.tokens, mx.zeros_like(batch.valid))
    found = survey(model, sae, point, [nothing, batch])
    x = lm.valid_rows(lm.capture(model, batch.tokens, point)[point], batch.valid)
    latents = np.maximum(np.array(sae.to_dense(sae.encode(x))), 0)
    for feature in range(256):
        np.testing.assert_array_equal(found.activations(feature), latents[:, feature])
    assert found.values.shape[1] == (latents > 0).sum(axis=1).max()
    assert set(found.row) == {0, 1}


def test_an_exact_sae_costs_the_model_nothing(model, batch: TokenBatch) -> None:
    d = model.d_model
    eye = mx.eye(d)
    exact = SAE.from_weights(mx.concatenate([eye, -eye], axis=1), mx.concatenate([eye, -eye]), k=2 * d)
    metrics = evaluate_in_model(model, exact, HookPoint(2, "resid_post"), [batch, batch])
    assert metrics["fvu"] < 1e-10
    assert metrics["ce_sae"] == pytest.approx(metrics["ce_clean"], abs=1e-5)
    assert metrics["loss_recovered_zero"] == pytest.approx(1, abs=1e-5)
    assert metrics["loss_recovered_mean"] == pytest.approx(1, abs=1e-5)
    clean = float(lm.loss(model, batch.tokens, batch.valid))
    assert metrics["ce_clean"] == pytest.approx(clean, rel=1e-5)
    assert metrics["n_tokens"] == 2 * int(batch.valid.sum())
    nothing = SAE.from_weights(mx.zeros((d, 4)), mx.zeros((4, d)), k=1)
    empty = evaluate_in_model(model, nothing, HookPoint(2, "resid_post"), [batch])
    assert empty["ce_sae"] == pytest.approx(empty["ce_zero"], rel=1e-6)
    assert empty["loss_recovered_zero"] == pytest.approx(0, abs=1e-6)
    assert empty["dead_fraction"] == 1
    with pytest.raises(ValueError, match="width"):
        evaluate_in_model(model, SAE(8, 16, k=2), HookPoint(2, "resid_post"), [batch])
    with pytest.raises(ValueError, match="valid"):
        evaluate_in_model(model, exact, HookPoint(2, "resid_post"), [])


def test_an_sae_is_judged_in_the_model_by_the_codes_of_valid_tokens(model, batch: TokenBatch) -> None:
    """Padding and BOS take no latents from them, where the k n largest of all that is shown are kept."""
    point = HookPoint(2, "resid_post")
    sae = SAE(model.d_model, 256, rule=BatchTopK(8), seed=0)
    assert not bool(batch.valid.all())
    metrics = evaluate_in_model(model, sae, point, [batch])
    x = lm.capture(model, batch.tokens, point)[point]
    whole = np.array(x)
    whole[np.array(batch.valid)] = np.array(sae(lm.valid_rows(x, batch.valid)))
    losses = np.array(lm.token_losses(model, batch.tokens, edits={point: lambda _: mx.array(whole)}))
    predicted = np.array(batch.valid)[:, 1:]
    assert metrics["ce_sae"] == pytest.approx(losses[predicted].mean(), rel=1e-5)


def test_effects_are_the_change_that_ablation_makes(model, batch: TokenBatch) -> None:
    point = HookPoint(1, "resid_post")  # what comes after reads other tokens too
    sae = SAE(model.d_model, 512, k=16, seed=0)
    found = survey(model, sae, point, [batch])
    feature = int(found.statistics().maximum.argmax())
    examples = found.top_examples(feature, 2)
    effects = direct_effects(model, sae, point, feature, examples, n=3, min_probability=0.0)
    assert effects
    changes = []
    for example in examples:
        tokens = mx.array([[model.bos_id, *example.tokens[: example.peak + 1].tolist()]])
        peak = mx.array([[False] * (example.peak + 1) + [True]])  # after BOS; nowhere else
        with lm.splice(model, {point: lm.only_at(steer(sae, {feature: 0.0}), peak)}):
            without = model(tokens)[0, -1]
        with_feature = model(tokens)[0, -1]
        changes.append(np.array(mx.log(mx.softmax(with_feature)) - mx.log(mx.softmax(without))))
    mean = np.mean(changes, axis=0)
    assert effects[0].token == int(mean.argmax())
    assert effects[0].change == pytest.approx(float(mean.max()), abs=1e-3)
    assert direct_effects(model, sae, point, feature, []) == []


def test_find_steering_finds_a_direction_that_says_a_letter(model) -> None:
    """A feature whose direction is the unembedding of one letter makes the model say that letter."""
    point = HookPoint(model.n_layers - 1, "resid_post")
    inner = model.model.model
    rows, scale = inner.embed_tokens.weight, inner.norm.weight  # tied to the unembedding
    directions = (rows - rows.mean(axis=0)) * scale
    directions = directions / mx.linalg.norm(directions, axis=1, keepdims=True)
    logits = np.array((rows * scale) @ directions.T)  # [token, direction]
    margin = np.diag(logits) - np.where(np.eye(len(logits), dtype=bool), -np.inf, logits).max(axis=0)
    letter = int(margin.argmax())
    assert margin[letter] > 0.05
    direction, written = directions[letter], model.token_to_str(letter)
    sae = SAE.from_weights(mx.zeros((model.d_model, 4)), mx.broadcast_to(direction, (4, model.d_model)), k=1)
    prompts = [model.encode("Once upon a time"), model.encode("The dog")]
    found = find_steering(model, sae, point, {1: Candidate(50.0, [letter], prompts)}, max_tokens=4)
    assert found is not None
    assert found.feature == 1
    assert found.after.startswith(written)
    assert not found.before.startswith(written)
    assert found.prompt in ("Once upon a time", "The dog")
    assert find_steering(model, sae, point, {1: Candidate(1e-9, [letter], prompts)}) is None
    assert find_steering(model, sae, point, {}) is None
    # A token that is named again gains no more: of shares of one token none is over 1.
    often = {1: Candidate(50.0, [letter] * 9, prompts)}
    assert find_steering(model, sae, point, often, max_tokens=4) == found
    assert find_steering(model, sae, point, often, max_tokens=4, min_gain=1.01) is None
