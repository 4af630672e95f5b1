"""The hooking mechanism: nesting, exceptions, threads, memory, quantised weights, gradients, bad input."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from lm_toys import LAYERS, VOCAB, WIDTH, make, tokens_of
from mlxsae import lm
from mlxsae.lm import HookPoint, hooks

POST1, POST2 = HookPoint(1, "resid_post"), HookPoint(2, "resid_post")


@pytest.fixture
def model() -> nn.Module:
    return make("llama")


@pytest.fixture(autouse=True)
def _nothing_stays_hooked():
    yield
    assert hooks._frames.get() == ()
    assert not hooks._wearers


def test_language_model_and_model_are_the_same_to_hooks(model: nn.Module) -> None:
    tokens, wrapped = tokens_of(2, 5), lm.LanguageModel(model)
    assert (wrapped.n_layers, wrapped.d_model) == (LAYERS, WIDTH)
    assert mx.array_equal(lm.capture(wrapped, tokens, POST1)[POST1], lm.capture(model, tokens, POST1)[POST1])
    with lm.splice(wrapped, {POST1: mx.zeros_like}):
        assert mx.array_equal(wrapped(tokens), model(tokens))


def test_capture_keeps_the_order_asked_for(model: nn.Module) -> None:
    found = lm.capture(model, tokens_of(1, 3), ["layers.3.mlp", ("resid_pre", 0), "blocks.2.hook_attn_out"])
    assert list(found) == [HookPoint(3, "mlp_out"), HookPoint(0, "resid_pre"), HookPoint(2, "attn_out")]


def test_batches_side_by_side_are_those_one_by_one(model: nn.Module) -> None:
    """Bit for bit, of different shapes, in any thread."""
    batches = [tokens_of(b, t) for b, t in ((1, 5), (3, 8), (2, 3))]
    points = [HookPoint(1, "resid_post"), HookPoint(0, "mlp_out")]
    mx.eval(batches, model.parameters())
    same: list[bool] = []

    def compare() -> None:
        for tokens, found in zip(batches, lm.capture_each(model, batches, points), strict=True):
            alone = lm.capture(model, tokens, points)
            same.append(list(found) == list(alone) == points)
            same.extend(bool(mx.array_equal(found[point], alone[point])) for point in points)

    compare()
    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    compare()
    assert same == [True] * 27
    assert lm.capture_each(model, [], points) == []


def test_splices_nest_outer_first_and_capture_sees_the_edited(model: nn.Module) -> None:
    tokens = tokens_of(1, 5)
    clean = lm.capture(model, tokens, POST1)[POST1]
    with lm.splice(model, {POST1: lambda x: x + 1}):
        with lm.splice(model, {"layers.1": lambda x: x * 2}):
            inner = lm.capture(model, tokens, POST1)[POST1]
        outer = lm.capture(model, tokens, POST1)[POST1]
    assert mx.array_equal(inner, (clean + 1) * 2)
    assert mx.array_equal(outer, clean + 1)
    assert mx.array_equal(lm.capture(model, tokens, POST1)[POST1], clean)


def test_two_edits_of_resid_mid_compose(model: nn.Module) -> None:
    tokens, mid = tokens_of(1, 5), HookPoint(1, "resid_mid")
    clean = lm.capture(model, tokens, mid)[mid]
    with (
        lm.splice(model, {mid: lambda x: x + 1, "layers.1.attn": lambda x: x + 4}),
        lm.splice(model, {mid: lambda x: x * 2}),
    ):
        both = lm.capture(model, tokens, mid)[mid]
    assert mx.allclose(both, (clean + 4 + 1) * 2, atol=1e-5)


def test_an_exception_in_an_edit_restores_everything(model: nn.Module) -> None:
    tokens = tokens_of(1, 5)
    plain, types = model(tokens), [type(module) for _, module in model.named_modules()]

    def broken(x: mx.array) -> mx.array:
        raise KeyError("broken edit")

    with (
        pytest.raises(KeyError, match="broken edit"),
        lm.splice(model, {POST1: broken, "layers.1.resid_mid": broken}),
    ):
        model(tokens)
    assert [type(module) for _, module in model.named_modules()] == types
    assert mx.array_equal(model(tokens), plain)


def test_an_edit_may_call_the_model_itself(model: nn.Module) -> None:
    tokens, other = tokens_of(1, 5), tokens_of(1, 5, seed=9)
    clean = lm.capture(model, other, POST1)[POST1]

    def resample(x: mx.array) -> mx.array:
        return lm.capture(model, other, POST1)[POST1]  # would recurse for ever if hooks were on here

    with lm.splice(model, {POST1: resample}):
        assert mx.array_equal(lm.capture(model, tokens, POST1)[POST1], clean)


def test_edits_act_in_their_own_thread_only(model: nn.Module) -> None:
    tokens = tokens_of(1, 5)
    plain = model(tokens)
    mx.eval(plain)
    inside, done = threading.Event(), threading.Event()
    edited = []

    def editor() -> None:
        with lm.splice(model, {POST1: mx.zeros_like}):
            edited.append(mx.array_equal(model(tokens), plain).item())
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=editor)
    thread.start()
    assert inside.wait(10)
    try:
        assert type(model.layers[1]) is not type(model.layers[0])  # hooked, by the other thread
        assert mx.array_equal(model(tokens), plain)
        with lm.splice(model, {POST1: lambda x: x}):  # shares the hooked module
            assert mx.array_equal(model(tokens), plain)
        assert mx.array_equal(
            lm.capture(model, tokens, POST1)[POST1], lm.capture(model, tokens, POST1)[POST1]
        )
    finally:
        done.set()
        thread.join()
    assert edited == [False]


def test_leaving_out_of_order(model: nn.Module) -> None:
    """Generators may end in any order; each takes away its own edits only."""
    tokens = tokens_of(1, 5)
    clean = lm.capture(model, tokens, POST1)[POST1]
    first, second = lm.splice(model, {POST1: lambda x: x + 1}), lm.splice(model, {POST1: lambda x: x + 2})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert mx.array_equal(lm.capture(model, tokens, POST1)[POST1], clean + 2)
    second.__exit__(None, None, None)


def test_a_class_swapped_by_someone_else_is_left_alone(model: nn.Module) -> None:
    block, tokens = model.layers[1], tokens_of(1, 5)
    plain = model(tokens)
    with lm.splice(model, {POST1: lambda x: x}):
        theirs = type("Theirs", (type(block),), {})
        object.__setattr__(block, "__class__", theirs)
    assert type(block) is theirs
    assert mx.array_equal(model(tokens), plain)
    clean = lm.capture(model, tokens, POST1)[POST1]
    with lm.splice(model, {POST1: lambda x: x + 1}):  # once, although our old class lies beneath
        assert mx.array_equal(lm.capture(model, tokens, POST1)[POST1], clean + 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models(model: nn.Module, bits: int) -> None:
    nn.quantize(model, group_size=32, bits=bits)
    tokens = tokens_of(2, 6)
    plain = model(tokens)
    logits, found = lm.run_with_capture(model, tokens, [HookPoint(2, site) for site in lm.SITES])
    assert mx.array_equal(logits, plain)
    assert mx.array_equal(
        found[HookPoint(2, "resid_mid")] + found[HookPoint(2, "mlp_out")], found[HookPoint(2, "resid_post")]
    )
    assert isinstance(model.layers[2].mlp.down_proj, nn.QuantizedLinear)


def test_a_pattern_cannot_be_read_from_a_quantised_cache() -> None:
    from mlx_lm.models import llama
    from mlx_lm.models.cache import QuantizedKVCache

    args = llama.ModelArgs("llama", 64, 1, 64, 2, 1e-5, VOCAB, num_key_value_heads=1)
    wide = llama.Model(args)  # heads of 32, the least that a cache quantises
    tokens, pattern = tokens_of(1, 4), HookPoint(0, "attn_pattern")
    plain = wide(tokens, cache=[QuantizedKVCache(group_size=32, bits=8)])
    cache = [QuantizedKVCache(group_size=32, bits=8)]
    logits, _ = lm.run_with_capture(wide, tokens, "layers.0.z", cache=cache)
    assert mx.array_equal(logits, plain)
    with pytest.raises(ValueError, match="the KV cache must not be quantised where attn_pattern"):
        lm.capture(wide, tokens, pattern, cache=[QuantizedKVCache(group_size=32, bits=8)])


def test_edits_are_cast_to_the_models_dtype(model: nn.Module) -> None:
    model.set_dtype(mx.bfloat16)
    with lm.splice(model, {POST1: lambda x: x.astype(mx.float32) + 1e-3}):
        logits, found = lm.run_with_capture(model, tokens_of(1, 4), POST2)
    assert logits.dtype == found[POST2].dtype == mx.bfloat16


def test_an_identity_at_resid_mid_loses_no_bit_in_low_precision(model: nn.Module) -> None:
    """Taking the sum apart again, (x + a) - x, would."""
    model.set_dtype(mx.bfloat16)
    tokens = tokens_of(8, 12)
    plain = model(tokens)
    with lm.splice(model, {HookPoint(layer, "resid_mid"): lambda x: x for layer in range(LAYERS)}):
        assert mx.array_equal(model(tokens), plain)


def test_gradients_flow_through_a_splice(model: nn.Module) -> None:
    """d loss / d steering vector, against central differences."""
    tokens = tokens_of(2, 6)

    def f(v: mx.array) -> mx.array:
        with lm.splice(model, {POST1: lambda x: x + v}):
            return lm.loss(model, tokens)

    v = 0.1 * mx.random.normal((WIDTH,), key=mx.random.key(3))
    u = mx.random.normal((WIDTH,), key=mx.random.key(4))
    h = 1e-2
    numeric = (f(v + h * u) - f(v - h * u)).item() / (2 * h)
    assert (mx.grad(f)(v) * u).sum().item() == pytest.approx(numeric, rel=2e-2)


def test_capture_with_a_cache_fills_every_layer(model: nn.Module) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    tokens = tokens_of(1, 8)
    whole = lm.capture(model, tokens, POST1)[POST1]
    cache = make_prompt_cache(model)
    first = lm.capture(model, tokens[:, :5], POST1, cache=cache)[POST1]
    assert [layer.offset for layer in cache] == [5] * LAYERS
    rest = lm.capture(model, tokens[:, 5:], POST1, cache=cache)[POST1]
    assert mx.allclose(mx.concatenate([first, rest], axis=1), whole, atol=1e-5)


def test_padding_on_the_right_changes_nothing_to_its_left(model: nn.Module) -> None:
    tokens = tokens_of(1, 6)
    padded = mx.concatenate([tokens, mx.zeros((1, 4), tokens.dtype)], axis=1)
    a, b = lm.capture(model, tokens, POST2)[POST2], lm.capture(model, padded, POST2)[POST2]
    assert mx.allclose(a, b[:, :6], atol=1e-6)


def test_memory_does_not_grow_over_repeated_captures(model: nn.Module) -> None:
    tokens = tokens_of(4, 32)
    kept = []
    sizes = []
    for i in range(12):
        x = lm.capture(model, tokens, [POST1, POST2])[POST1]
        kept = [x]
        if i >= 2:  # reference counts alone free a pass: no gc.collect here
            sizes.append(mx.get_active_memory())
    assert max(sizes) - min(sizes) <= kept[0].nbytes


def test_a_captured_array_holds_on_to_nothing(model: nn.Module) -> None:
    tokens = tokens_of(8, 64)
    lm.capture(model, tokens, POST2)
    gc.collect()
    before = mx.get_active_memory()
    found = lm.capture(model, tokens, POST2)
    gc.collect()
    size = found[POST2].nbytes
    assert size <= mx.get_active_memory() - before <= 2 * size  # computed already, and nothing beside it


def test_only_at(model: nn.Module) -> None:
    tokens = tokens_of(2, 5)
    where = mx.array([[False, True, True, False, True], [True, False, False, False, True]])
    clean = lm.capture(model, tokens, POST1)[POST1]
    with lm.splice(model, {POST1: lm.only_at(lambda x: x + 1, where)}):
        found = lm.capture(model, tokens, POST1)[POST1]
    assert mx.array_equal(found, mx.where(where[..., None], clean + 1, clean))


def test_loss_is_cross_entropy_over_valid_targets(model: nn.Module) -> None:
    import numpy as np

    tokens = tokens_of(2, 6)
    valid = mx.array([[False, True, True, False, True, True], [False, False, True, True, False, False]])
    logits = np.array(model(tokens), np.float64)
    t, v = np.array(tokens), np.array(valid)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = -np.take_along_axis(logp[:, :-1], t[:, 1:, None], -1)[..., 0]
    assert np.allclose(np.array(lm.token_losses(model, tokens)), each, atol=1e-5)
    assert lm.loss(model, tokens).item() == pytest.approx(each.mean(), abs=1e-5)
    assert lm.loss(model, tokens, valid).item() == pytest.approx(each[v[:, 1:]].mean(), abs=1e-5)
    # An identity leaves it, ablation of the whole stream makes every position predict alike.
    assert (
        lm.loss(model, tokens, valid, edits={POST1: lambda x: x}).item()
        == lm.loss(model, tokens, valid).item()
    )
    zeroed = lm.token_losses(model, tokens, edits={HookPoint(LAYERS - 1, "resid_post"): mx.zeros_like})
    assert mx.allclose(zeroed, mx.full(zeroed.shape, float(np.log(VOCAB))), atol=1e-4)


def test_loss_refuses_nothing_to_predict(model: nn.Module) -> None:
    tokens = tokens_of(1, 4)
    with pytest.raises(ValueError, match="mark at least one target"):
        lm.loss(model, tokens, mx.array([[True, False, False, False]]))
    with pytest.raises(ValueError, match="t >= 2"):
        lm.loss(model, tokens[:, :1])
    with pytest.raises(ValueError, match="valid must be bool"):
        lm.loss(model, tokens, mx.ones((1, 3)))


@pytest.mark.parametrize(
    ("tokens", "points", "message"),
    [
        (mx.array([1, 2, 3]), "layers.1.mlp", "tokens must be integers of shape"),
        (mx.zeros((1, 3)), "layers.1.mlp", "tokens must be integers of shape"),
        ([[1, 2]], "layers.1.mlp", "tokens must be integers of shape"),
        (mx.array([[1, 2]]), [], "at least one hook point"),
        (mx.array([[1, 2]]), "layers.4.mlp", r"layer must be in \[0, 3\] for this model but got 4"),
        (mx.array([[1, 2]]), "mlp", "layer must be given"),
    ],
)
def test_bad_input(model: nn.Module, tokens: mx.array, points: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lm.capture(model, tokens, points)


def test_bad_edits(model: nn.Module) -> None:
    tokens = tokens_of(1, 4)
    message = r"must return shape \(1, 4, 32\) but gave shape \(1, 4\)"
    with pytest.raises(ValueError, match=message), lm.splice(model, {POST1: lambda x: x[..., 0]}):
        model(tokens)
    with pytest.raises(ValueError, match="but gave NoneType"), lm.splice(model, {POST1: lambda x: None}):  # type: ignore[dict-item, return-value]
        model(tokens)
    with pytest.raises(ValueError, match="callable"), lm.splice(model, {POST1: 3}):  # type: ignore[dict-item]
        pass
    with pytest.raises(ValueError, match="twice"), lm.splice(model, {POST1: abs, "layers.1": abs}):
        pass


def test_a_module_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be an mlx-lm model with a list `.layers`"):
        lm.capture(nn.Linear(3, 3), tokens_of(1, 4), POST1)


def test_blocks_that_do_not_carry_one_residual_stream_are_refused() -> None:
    class Block(nn.Module):
        def __call__(self, x: mx.array) -> mx.array:
            return x[None]

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [Block(), Block(), Block()]

        def __call__(self, tokens: mx.array) -> mx.array:
            x = mx.zeros((*tokens.shape, 8))
            for block in self.layers:
                x = block(x)
            return x

    with pytest.raises(ValueError, match=r"must return \[b, t, d\] but gave shape \(1, 1, 4, 8\)"):
        lm.capture(Odd(), tokens_of(1, 4), POST1.parse("layers.0"))
    with pytest.raises(ValueError, match=r"must get its activation \[b, t, d\] first but got shape"):
        lm.capture(Odd(), tokens_of(1, 4), "layers.1.resid_pre")


def test_a_block_that_runs_twice_is_refused(model: nn.Module) -> None:
    model.model.layers = [model.layers[0], model.layers[1], model.layers[1], model.layers[3]]
    with pytest.raises(RuntimeError, match="computed twice"):
        lm.capture(model, tokens_of(1, 4), [POST1, HookPoint(3, "resid_post")])


@pytest.mark.parametrize("name", ["babyllama105", "stories260K"])
def test_laws_on_trained_models(shared: Path, name: str) -> None:
    wrapped = lm.load(shared / "data" / name)
    tokens, _ = lm.tokenize(wrapped, ["Once upon a time there was a big dog.", "The cat"])
    plain = wrapped(tokens)
    points = [HookPoint(layer, site) for layer in range(wrapped.n_layers) for site in lm.SITES]
    logits, found = lm.run_with_capture(wrapped, tokens, points)
    assert mx.array_equal(logits, plain)
    for layer in range(wrapped.n_layers):
        at = {site: found[HookPoint(layer, site)] for site in lm.SITES}
        assert mx.array_equal(at["resid_pre"] + at["attn_out"], at["resid_mid"])
        assert mx.array_equal(at["resid_mid"] + at["mlp_out"], at["resid_post"])


def test_codes_instead_of_activations(model: nn.Module) -> None:
    import mlxsae

    tokens = tokens_of(2, 6)
    valid = mx.array([[False, True, True, True, False, True], [False, True, False, False, False, False]])
    sae = mlxsae.SAE(WIDTH, 4 * WIDTH, k=5, seed=0)
    x = lm.capture(model, tokens, POST1)[POST1]
    whole = lm.capture_codes(model, tokens, {"layers.1": sae.encode})[POST1]
    assert whole.values.shape == (2, 6, 5)
    assert all(map(mx.array_equal, whole, sae.encode(x)))
    rows = lm.capture_codes(model, tokens, {POST1: sae.encode, "layers.2.mlp": mx.abs}, valid=valid)
    assert all(map(mx.array_equal, rows[POST1], sae.encode(lm.valid_rows(x, valid))))
    assert rows["layers.2.mlp"].shape == (5, WIDTH)


def test_a_nan_hides_no_outlier() -> None:
    x = mx.ones((1, 6, 4)).at[0, 0].multiply(1000).at[0, 3, 0].multiply(mx.nan)
    found = lm.without_outliers(x, mx.array([[True] * 5 + [False]]))
    assert found.tolist() == [[False, True, True, True, True, False]]


def test_outliers_are_told_by_the_median_of_valid_tokens() -> None:
    x = mx.ones((2, 6, 4)).at[0, 2].multiply(10.5).at[1, 0].multiply(1e6).at[1, 5].multiply(9.5)
    valid = mx.ones((2, 6), mx.bool_).at[1, 0].add(False)
    valid[1, :3] = False
    kept = lm.without_outliers(x, valid)
    assert kept.tolist() == [[True, True, False, True, True, True], [False, False, False, True, True, True]]
    assert lm.without_outliers(x, valid, times_median=11).tolist() == valid.tolist()
    assert not lm.without_outliers(x, mx.zeros((2, 6), mx.bool_)).any()
    with pytest.raises(ValueError, match="times_median must be over 1"):
        lm.without_outliers(x, valid, times_median=1)
