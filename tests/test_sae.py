"""The SAE module: definition, shapes, embedding in other modules, gradients, bad input."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxsae.code import DenseCode, SparseCode, to_slots
from mlxsae.sae import (
    SAE,
    BatchTopK,
    CrossLayerTranscoder,
    Gated,
    GroupMax,
    Hierarchical,
    HierarchicalSAE,
    JumpReLU,
    Rule,
    SigmoidGated,
    TopK,
    TopKJumpReLU,
    calibrate,
    of_rule,
    sae,
    transcoder,
)

D_IN, D_SAE, K = 12, 40, 5


def random_sae(d_out: int | None = None, dtype: mx.Dtype = mx.float32, seed: int = 0) -> SAE:
    """An SAE with biases that matter."""
    module = SAE(D_IN, D_SAE, k=K, d_out=d_out, dtype=dtype, seed=seed)
    rng = np.random.default_rng(seed)
    module.b_enc = mx.array(rng.normal(size=D_SAE) * 0.3, mx.float32).astype(dtype)
    module.b_dec = mx.array(rng.normal(size=module.d_out) * 0.3, mx.float32).astype(dtype)
    return module


def random_x(*shape: int, seed: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def oracle(module: SAE, x: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Dense latents and reconstruction in float64, from the equations."""
    w_enc, w_dec, b_enc, b_dec = (
        np.array(a.astype(mx.float32), np.float64)
        for a in (module.W_enc, module.W_dec, module.b_enc, module.b_dec)
    )
    x64 = np.array(x, np.float64)
    pre = (x64 - b_dec if module.apply_b_dec_to_input else x64) @ w_enc + b_enc
    order = np.argsort(-pre, axis=-1, kind="stable")[..., : module.rule.k]
    latents = np.zeros_like(pre)
    np.put_along_axis(latents, order, np.maximum(np.take_along_axis(pre, order, -1), 0), -1)
    return latents, latents @ w_dec + b_dec


@pytest.mark.parametrize("d_out", [None, 7])
@pytest.mark.parametrize("lead", [(9,), (2, 3), (2, 1, 4), (), (0,), (2, 0)])
def test_matches_the_equations(d_out: int | None, lead: tuple[int, ...]) -> None:
    module, x = random_sae(d_out), random_x(*lead, D_IN)
    code = module.encode(x)
    latents, x_hat = oracle(module, x)
    assert code.values.shape == code.indices.shape == (*lead, K)
    np.testing.assert_allclose(np.array(module.to_dense(code)), latents, atol=1e-5)
    assert module(x).shape == (*lead, module.d_out)
    np.testing.assert_allclose(np.array(module(x)), x_hat, atol=1e-5)
    np.testing.assert_array_equal(np.array(module(x)), np.array(module.decode(code)))


@pytest.mark.parametrize(("dtype", "atol"), [(mx.float16, 5e-3), (mx.bfloat16, 5e-2)])
def test_low_precision_weights(dtype: mx.Dtype, atol: float) -> None:
    module = random_sae(dtype=dtype)
    x = random_x(6, D_IN).astype(dtype).astype(mx.float32)
    out = module(x)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.array(out.astype(mx.float32)), oracle(module, x)[1], atol=atol * 4)


def test_three_dimensions_equal_two_bit_for_bit() -> None:
    module, x = random_sae(), random_x(3, 5, D_IN)
    flat, deep = module.encode(x.reshape(15, D_IN)), module.encode(x)
    for a, b in zip(flat, deep, strict=True):
        np.testing.assert_array_equal(np.array(a), np.array(b).reshape(15, K))
    np.testing.assert_array_equal(
        np.array(module(x)).reshape(15, D_IN), np.array(module(x.reshape(15, D_IN)))
    )


def test_pre_acts_are_dense_and_before_the_rule() -> None:
    module, x = random_sae(), random_x(2, 3, D_IN)
    pre = np.array(module.pre_acts(x), np.float64)
    expected = (np.array(x, np.float64) - np.array(module.b_dec)) @ np.array(module.W_enc) + np.array(
        module.b_enc
    )
    np.testing.assert_allclose(pre, expected, atol=1e-5)
    assert (pre < 0).any()


def test_initial_weights() -> None:
    module = SAE(D_IN, D_SAE, k=K, seed=3)
    np.testing.assert_allclose(np.linalg.norm(np.array(module.W_dec), axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(np.array(module.W_enc), np.array(module.W_dec).T)
    np.testing.assert_array_equal(np.array(SAE(D_IN, D_SAE, k=K, seed=3).W_dec), np.array(module.W_dec))
    assert not mx.array_equal(SAE(D_IN, D_SAE, k=K, seed=4).W_dec, module.W_dec)
    assert not mx.array_equal(SAE(D_IN, D_SAE, k=K).W_dec, SAE(D_IN, D_SAE, k=K).W_dec)


def test_public_names_are_the_fields_shapes_and_can_be_assigned() -> None:
    module = random_sae(d_out=7)
    assert (module.d_in, module.d_sae, module.d_out) == (D_IN, D_SAE, 7)
    assert module.W_enc.shape == (D_IN, D_SAE)
    assert module.encoder.weight.shape == (D_SAE, D_IN)
    assert module.W_dec.shape == module.decoder.weight.shape == (D_SAE, 7)
    new = random_x(D_IN, D_SAE)
    module.W_enc = new
    np.testing.assert_array_equal(np.array(module.encoder.weight), np.array(new).T)
    module.b_dec = mx.ones(7)
    np.testing.assert_array_equal(np.array(module.decoder.bias), np.ones(7))
    names = [name for name, _ in tree_flatten(module.parameters())]
    assert names == ["encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"]
    with pytest.raises(ValueError, match=r"\[SAE\] b_dec must be .* of shape \(7,\) but got"):
        module.b_dec = mx.ones(8)


def test_from_weights_computes_what_the_weights_say() -> None:
    module = random_sae(d_out=7)
    again = SAE.from_weights(
        np.array(module.W_enc), module.W_dec, module.b_enc, module.b_dec, k=K, apply_b_dec_to_input=False
    )
    x = random_x(4, D_IN)
    np.testing.assert_array_equal(np.array(again(x)), np.array(module(x)))
    no_bias = SAE.from_weights(module.W_enc, module.W_dec, rule=TopK(K), apply_b_dec_to_input=False)
    assert not np.array(no_bias.b_enc).any()


def test_metadata_is_no_parameter_and_survives_copies() -> None:
    module = random_sae()
    module.metadata = {"hook_name": "blocks.2.hook_resid_post", "layers": [1, 2]}
    assert "hook_name" not in str(tree_flatten(module.parameters()))
    twin = copy.deepcopy(module)
    assert twin.metadata == module.metadata
    twin.metadata["hook_name"] = "other"
    assert module.metadata["hook_name"] == "blocks.2.hook_resid_post"


class Parent(nn.Module):
    """An SAE between ordinary layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(64, 64)
        self.sae = SAE(64, 128, k=8, seed=0)
        self.after = nn.Linear(64, 64)

    def __call__(self, x: mx.array) -> mx.array:
        return self.after(self.sae(self.before(x)))


def test_inside_a_module_next_to_quantised_layers() -> None:
    mx.random.seed(0)  # of the linear layers; a selection near a tie may flip with quantised weights
    parent, x = Parent(), random_x(2, 3, 64)
    before = np.array(parent(x))
    nn.quantize(parent, group_size=32, bits=8)
    assert isinstance(parent.before, nn.QuantizedLinear)
    assert isinstance(parent.sae, SAE)
    assert parent.sae.W_enc.dtype == mx.float32
    np.testing.assert_allclose(np.array(parent(x)), before, atol=0.05)


def test_compiled_equals_eager() -> None:
    module, x = random_sae(), random_x(4, D_IN)
    np.testing.assert_array_equal(np.array(mx.compile(lambda x: module(x))(x)), np.array(module(x)))
    code = mx.compile(lambda x: module.encode(x))(x)
    assert isinstance(code, SparseCode)
    parent = Parent()
    y = random_x(3, 64)
    np.testing.assert_allclose(np.array(mx.compile(parent)(y)), np.array(parent(y)), rtol=1e-6, atol=1e-6)


def test_freeze_keeps_parameters_out_of_the_gradient() -> None:
    parent, x = Parent(), random_x(3, 64)
    parent.sae.freeze()
    grads = nn.value_and_grad(parent, lambda m: mx.square(m(x)).sum())(parent)[1]
    assert not tree_flatten(grads.get("sae", {}))
    assert mx.abs(grads["before"]["weight"]).sum().item() > 0  # and it still lets gradients through
    parent.sae.decoder.unfreeze()
    assert {n for n, _ in tree_flatten(parent.sae.trainable_parameters())} == {
        "decoder.weight",
        "decoder.bias",
    }


@pytest.mark.parametrize("d_out", [None, 7])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_against_finite_differences(d_out: int | None, compiled: bool) -> None:
    """Central differences of the float64 oracle; steps small enough that no selection flips."""
    module, x, step = random_sae(d_out), random_x(6, D_IN), 1e-6
    target = np.random.default_rng(5).normal(size=(6, module.d_out))
    names = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    flat = {name: np.array(a, np.float64) for name, a in tree_flatten(module.parameters())}

    def loss64(values: dict[str, np.ndarray], x64: np.ndarray) -> float:
        w_e, b_e, w_d, b_d = (values[name] for name in names)
        pre = (x64 - b_d if module.apply_b_dec_to_input else x64) @ w_e.T + b_e
        order = np.argsort(-pre, axis=-1, kind="stable")[:, :K]
        acts = np.zeros_like(pre)
        np.put_along_axis(acts, order, np.maximum(np.take_along_axis(pre, order, -1), 0), -1)
        return float(((acts @ w_d + b_d - target) ** 2).sum())

    def loss(params: dict, x: mx.array) -> mx.array:
        module.update(params)
        return mx.square(module(x) - mx.array(target, mx.float32)).sum()

    own = module.parameters()
    gradient = mx.grad(loss, argnums=(0, 1))
    got, got_x = (mx.compile(gradient) if compiled else gradient)(own, x)
    module.update(own)
    got = dict(tree_flatten(got))
    rng = np.random.default_rng(0)
    x64 = np.array(x, np.float64)
    for name in names:
        for where in rng.integers(0, flat[name].size, 12):
            index = np.unravel_index(where, flat[name].shape)
            values = {n: v.copy() for n, v in flat.items()}
            values[name][index] += step
            up = loss64(values, x64)
            values[name][index] -= 2 * step
            numeric = (up - loss64(values, x64)) / (2 * step)
            assert np.array(got[name])[index] == pytest.approx(numeric, rel=1e-4, abs=1e-3), (name, index)
    for i in range(D_IN):
        shift = np.zeros_like(x64)
        shift[2, i] = step
        numeric = (loss64(flat, x64 + shift) - loss64(flat, x64 - shift)) / (2 * step)
        assert np.array(got_x)[2, i] == pytest.approx(numeric, rel=1e-4, abs=1e-3)


class Positive(Rule):
    """The ``k`` largest of every second latent: a rule without a fused op, as a user would write it."""

    def select(self, pre_acts: mx.array) -> SparseCode:
        even = pre_acts[:, ::2]
        top = mx.sort(mx.argpartition(-even, K - 1, axis=-1)[:, :K], axis=-1)
        return SparseCode(mx.maximum(mx.take_along_axis(even, top, -1), 0), (2 * top).astype(mx.uint32))


def test_a_users_rule_needs_only_select() -> None:
    module = SAE(D_IN, D_SAE, rule=Positive(), seed=0)
    x = random_x(2, 3, D_IN)
    code = module.encode(x)
    assert code.values.shape == (2, 3, K)
    assert not (np.array(code.indices) % 2).any()
    assert module(x).shape == x.shape
    with pytest.raises(NotImplementedError, match=r"\[Rule\] a rule must define select or encode"):
        SAE(D_IN, D_SAE, rule=Rule()).encode(x)


def test_presets() -> None:
    assert sae(8, k=4, expansion_factor=4).d_sae == 32
    coder = transcoder(8, 6, k=4, expansion_factor=4, seed=0)
    assert (coder.d_in, coder.d_sae, coder.d_out, coder.apply_b_dec_to_input) == (8, 32, 6, False)
    same_width = transcoder(8, 8, k=4)
    assert not same_width.apply_b_dec_to_input


def test_drop_in_example(capsys: pytest.CaptureFixture[str]) -> None:
    """The example swaps our SAE for a dense one and gets the same numbers."""
    path = Path(__file__).parents[1] / "examples" / "drop_in.py"
    spec = importlib.util.spec_from_file_location("drop_in", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x = random_x(4, 6, 64)
    dense = module.DenseSAE(64, 512, k=16)
    ours = module.swap(dense)
    np.testing.assert_allclose(np.array(ours(x)), np.array(dense(x)), rtol=1e-5, atol=1e-5)
    a = nn.value_and_grad(dense, lambda m: mx.square(m(x) - x).sum())(dense)[1]
    b = nn.value_and_grad(ours, lambda m: mx.square(m(x) - x).sum())(ours)[1]
    np.testing.assert_allclose(np.array(b["encoder"]["weight"]).T, np.array(a["W_enc"]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(b["decoder"]["weight"]), np.array(a["W_dec"]), rtol=1e-4, atol=1e-4)
    module.main()
    assert "same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"d_sae": 32, "k": 64},
            ValueError,
            r"\[SAE\] k must be in \(0, d_sae\] but got k=64 with d_sae=32\.",
        ),
        ({"d_sae": 32, "k": 0}, ValueError, r"\[SAE\] k must be in \(0, d_sae\] but got k=0 with d_sae=32\."),
        ({"d_sae": 32, "k": -1}, ValueError, r"\[SAE\] k must be in \(0, d_sae\] but got k=-1"),
        ({"d_sae": 32, "rule": TopK(33)}, ValueError, r"\[SAE\] k must be in \(0, d_sae\] but got k=33"),
        ({"d_sae": 32, "k": 1.5}, TypeError, r"\[TopK\] k must be an int but got float"),
        ({"d_sae": 32, "k": True}, TypeError, r"\[TopK\] k must be an int but got bool"),
        ({"d_sae": 32}, ValueError, r"\[SAE\] give either k or rule"),
        ({"d_sae": 32, "k": 2, "rule": TopK(2)}, ValueError, r"\[SAE\] give either k or rule"),
        ({"d_sae": 0, "k": 2}, ValueError, r"\[SAE\] d_sae must be positive but got d_sae=0"),
        ({"d_sae": 32.0, "k": 2}, TypeError, r"\[SAE\] d_sae must be an int but got float"),
        ({"d_sae": 32, "k": 2, "d_out": -3}, ValueError, r"\[SAE\] d_out must be positive but got d_out=-3"),
        ({"d_sae": 32, "k": 2, "dtype": mx.int32}, ValueError, r"\[SAE\] dtype must be float32"),
        (
            {"d_sae": 32, "k": 2, "d_out": 5, "apply_b_dec_to_input": True},
            ValueError,
            r"\[SAE\] apply_b_dec_to_input must be False where the input is not the target",
        ),
    ],
)
def test_bad_sizes(kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SAE(8, **kwargs)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (mx.zeros((3, 11)), ValueError, r"\[SAE\] x must have shape \[\.\.\., 12\] but got \(3, 11\)"),
        (mx.array(1.0), ValueError, r"\[SAE\] x must have shape \[\.\.\., 12\] but got \(\)"),
        (
            mx.zeros((3, 12), mx.int32),
            TypeError,
            r"\[SAE\] x must be floating point but got mlx\.core\.int32",
        ),
        (np.zeros((3, 12)), TypeError, r"\[SAE\] x must be an mx\.array but got ndarray"),
    ],
)
def test_bad_input(x: mx.array, error: type[Exception], message: str) -> None:
    module = random_sae()
    for method in (module, module.encode, module.pre_acts):
        with pytest.raises(error, match=message):
            method(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_dec": mx.zeros((D_SAE + 1, D_IN))}, r"must agree in d_sae but got"),
        ({"W_enc": mx.zeros((D_IN, D_SAE, 1))}, r"\[SAE\] W_enc must have 2 dimensions"),
        (
            {"W_enc": mx.zeros((D_IN, D_SAE), mx.int32)},
            r"\[SAE\] W_enc must be float32, float16 or bfloat16 but got",
        ),
        ({"b_enc": mx.zeros(D_SAE + 1)}, r"\[SAE\] b_enc must have shape \(40,\) but got \(41,\)"),
        ({"b_dec": mx.zeros(3)}, r"\[SAE\] b_dec must have shape \(12,\) but got \(3,\)"),
        ({"b_dec": mx.zeros(D_IN, mx.float16)}, r"\[SAE\] weights must have one dtype"),
        ({"k": D_SAE + 1}, r"\[SAE\] k must be in \(0, d_sae\]"),
        ({"W_dec": mx.zeros((D_SAE, 5))}, r"\[SAE\] apply_b_dec_to_input must be False"),
    ],
)
def test_bad_weights(change: dict, message: str) -> None:
    good = {"W_enc": mx.zeros((D_IN, D_SAE)), "W_dec": mx.zeros((D_SAE, D_IN)), "k": K}
    with pytest.raises(ValueError, match=message):
        SAE.from_weights(**(good | change))


# ---- a rule is one SAE's -----------------------------------------------------------------------------------


def test_a_rule_given_to_two_saes_is_each_ones_own() -> None:
    """Thresholds that one finds are not the other's."""
    rule, x = BatchTopK(2), random_x(50, D_IN)
    one, two = (SAE(D_IN, D_SAE, rule=rule, seed=seed) for seed in (0, 1))
    calibrate(one, [x])
    assert one.rule is rule  # the first has the rule itself
    assert two.rule.threshold is None
    calibrate(two, [10 * x])
    pre = np.maximum(as64(x - one.b_dec) @ as64(one.W_enc), 0)
    assert one.rule.threshold == pytest.approx(np.sort(pre, axis=None)[-2 * 50], rel=1e-5)

    jump = JumpReLU(2)
    first, second = (SAE(D_IN, D_SAE, rule=jump, seed=0) for _ in range(2))
    second.rule.threshold = mx.full(D_SAE, 7.0)
    np.testing.assert_array_equal(first.rule.threshold, np.full(D_SAE, 0.01, np.float32))
    cut = SAE.from_weights(first.W_enc, first.W_dec, rule=first.rule)
    cut.rule.threshold = mx.zeros(D_SAE)
    assert np.array(first.rule.threshold).all()


def as64(a: mx.array) -> np.ndarray:
    return np.array(a, np.float64)


def test_a_hierarchical_rule_serves_saes_of_several_widths() -> None:
    rule = Hierarchical(8, d_coarse=1 / 8)
    assert [of_rule(16, d_sae, rule=rule).d_coarse for d_sae in (64, 256)] == [8, 32]
    assert rule.d_coarse == 1 / 8
    level = JumpReLU()
    sae = HierarchicalSAE(16, 20, 30, coarse=level, fine=level)
    assert [sae.levels[name].threshold.shape for name in ("coarse", "fine")] == [(20,), (30,)]


@pytest.mark.parametrize(
    ("rule", "name", "want", "got"),
    [
        (TopKJumpReLU(2), "threshold", (D_SAE,), (9,)),
        (JumpReLU(2), "threshold", (D_SAE,), (9,)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_parameters_of_a_rule_for_other_widths(rule: Rule, name: str, want: tuple, got: tuple) -> None:
    rule.prepare(D_IN, 9)  # more than 9 latents were thresholded by memory past its end
    message = rf"\[{type(rule).__name__}\] {name} must have shape {want} but got {got}"
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        SAE(D_IN, D_SAE, rule=rule)


@pytest.mark.parametrize("rule", [TopK, "topk", 8], ids=str)
def test_what_is_no_rule(rule: object) -> None:
    for build in (
        lambda: SAE(D_IN, D_SAE, rule=rule),
        lambda: CrossLayerTranscoder(4, 2, 12, rule=rule),
        lambda: HierarchicalSAE(D_IN, 4, 8, k_coarse=1, fine=rule),
    ):
        with pytest.raises(TypeError, match=r"(rule|fine) must be a rule, such as TopK\(8\), but got"):
            build()


def test_tied_weights_are_assigned_by_either_name() -> None:
    module, x = SAE(D_IN, D_SAE, k=K, tied=True, seed=0), random_x(6, D_IN)
    rows = random_x(D_SAE, D_IN, seed=3)
    module.W_dec = rows
    assert [name for name, _ in tree_flatten(module.parameters())] == [
        "encoder.weight",
        "encoder.bias",
        "decoder.bias",
    ]
    np.testing.assert_array_equal(module.W_enc, np.array(rows).T)
    np.testing.assert_allclose(module(x), oracle(module, x)[1], atol=1e-4)


# ---- no tokens, and 16 bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_groups_of_no_tokens(lead: tuple[int, ...]) -> None:
    module = SAE(D_IN, D_SAE, rule=GroupMax(K))
    x = mx.zeros((*lead, D_IN))
    code = module.encode(x)
    assert module.to_dense(code).shape == (*lead, module.d_sae)
    assert module(x).shape == module.decode(code).shape == (*lead, D_IN)


def test_dense_codes_of_no_tokens_have_slots() -> None:
    values, indices = to_slots(DenseCode(mx.zeros((0, D_SAE))))
    assert values.shape == indices.shape == (0, 1)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("rule", [Gated, SigmoidGated])
def test_gates_keep_the_type_of_the_weights(rule: type[Rule], dtype: mx.Dtype) -> None:
    module, x = SAE(D_IN, D_SAE, rule=rule(), dtype=dtype, seed=0), random_x(6, D_IN)
    assert module.encode(x).values.dtype == module(x).dtype == dtype
    assert module.learn(x, {}).code.values.dtype == dtype
