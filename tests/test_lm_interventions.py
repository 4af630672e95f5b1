"""Edits by name: what each does, to which tokens, and what is refused."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from lm_toys import WIDTH, make, tokens_of
from mlxsae import lm
from mlxsae.lm import HookPoint
from mlxsae.lm import interventions as iv

POINT = HookPoint(1, "resid_post")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make("llama")


@pytest.fixture(scope="module")
def tokens() -> mx.array:
    return tokens_of(2, 5)


def edited(model: nn.Module, tokens: mx.array, edit: lm.Edit) -> np.ndarray:
    with lm.splice(model, {POINT: edit}):
        return np.array(lm.capture(model, tokens, POINT)[POINT])


def test_each_is_its_formula(model: nn.Module, tokens: mx.array) -> None:
    x = np.array(lm.capture(model, tokens, POINT)[POINT])
    v = np.random.default_rng(0).standard_normal((2, 5, WIDTH), np.float32)
    valid = np.array([[False, True, True, False, True]] * 2)
    for edit, expected in (
        (iv.zero, 0 * x),
        (iv.scale(-2.5), np.float32(-2.5) * x),
        (iv.add(mx.array(v[0, 0])), x + v[0, 0]),
        (iv.add(mx.array(v), strength=3.0), x + 3 * v),
        (iv.clamp(-0.1, 0.2), np.clip(x, np.float32(-0.1), np.float32(0.2))),
        (iv.clamp(high=0.0), np.minimum(x, 0)),
        (iv.replace_with(mx.array(v[1])), np.broadcast_to(v[1], x.shape)),
        (iv.replace_with(mx.array(v)), v),
        (iv.replace_with(2), np.full_like(x, 2)),
        (iv.mean(mx.array(v)), np.broadcast_to(v.mean((0, 1)), x.shape)),
        (iv.mean(mx.array(v), mx.array(valid)), np.broadcast_to(v[valid].mean(0), x.shape)),
    ):
        np.testing.assert_allclose(edited(model, tokens, edit), expected, rtol=1e-6, atol=1e-6)


def test_values_may_be_numpy_arrays(model: nn.Module, tokens: mx.array) -> None:
    v = np.random.default_rng(0).standard_normal((2, 5, WIDTH))
    for make_edit in (iv.add, iv.replace_with, iv.mean):
        expected = edited(model, tokens, make_edit(mx.array(v.astype(np.float32))))
        np.testing.assert_allclose(edited(model, tokens, make_edit(v)), expected, rtol=1e-6, atol=1e-6)  # type: ignore[arg-type]


def test_the_mean_of_many_rows_far_from_zero() -> None:
    rows = (100 + np.random.default_rng(0).standard_normal((300_000, 3))).astype(np.float32)
    found = np.array(iv.mean(mx.array(rows))(mx.zeros((1, 1, 3))))[0, 0]
    np.testing.assert_allclose(found, rows.mean(axis=0, dtype=np.float64), rtol=2e-7)
    rows[7, 1] = np.inf
    assert np.isposinf(np.array(iv.mean(mx.array(rows))(mx.zeros((1, 1, 3))))[0, 0, 1])


def test_resample_draws_rows_or_whole_sequences(model: nn.Module, tokens: mx.array) -> None:
    rows = mx.random.normal((50, WIDTH), key=mx.random.key(1))
    got = edited(model, tokens, iv.resample(rows, seed=4))
    drawn = [np.flatnonzero((np.array(rows) == token).all(-1)) for token in got.reshape(-1, WIDTH)]
    assert all(len(d) == 1 for d in drawn)
    assert len({int(d[0]) for d in drawn}) > 3
    sequences = mx.random.normal((9, 6, WIDTH), key=mx.random.key(1))
    got = edited(model, tokens, iv.resample(sequences, seed=4))
    for row in got:
        assert sum((np.array(sequences[:, :5]) == row).all((1, 2))) == 1
    edit, again = iv.resample(rows, seed=4), iv.resample(rows, seed=4)
    first, second = edited(model, tokens, edit), edited(model, tokens, edit)
    assert not np.array_equal(first, second)
    assert np.array_equal(edited(model, tokens, again), first)
    assert np.array_equal(edited(model, tokens, again), second)


@pytest.mark.parametrize(
    ("positions", "where"),
    [("all", [0, 1, 2, 3, 4]), ("prompt", [0, 1, 2, 3, 4]), ("generated", []), ([1, -1], [1, 4]), ([], [])],
)
def test_at(model: nn.Module, tokens: mx.array, positions: iv.Positions, where: list[int]) -> None:
    x = np.array(lm.capture(model, tokens, POINT)[POINT])
    expected = x.copy()
    expected[:, where] = 0
    assert np.array_equal(edited(model, tokens, iv.at(iv.zero, positions)), expected)


def test_chunks_are_counted_on_and_rows_have_their_own_ends() -> None:
    x = mx.ones((2, 7, 3))
    edit = iv.place(iv.at(iv.zero, [0, -2, 5]), [4, 6])
    got = mx.concatenate([edit(x[:, :3]), edit(x[:, 3:4]), edit(x[:, 4:])], axis=1)[..., 0]
    assert got.tolist() == [[0, 1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0, 1]]
    generated = iv.place(iv.zero, [2, 4], "generated")
    assert generated(x)[..., 0].tolist() == [[1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0]]


def test_at_of_a_pattern_chooses_queries(model: nn.Module, tokens: mx.array) -> None:
    point = HookPoint(2, "attn_pattern")
    clean = lm.capture(model, tokens, point)[point]
    with lm.splice(model, {point: iv.at(iv.zero, [3])}):
        found = lm.capture(model, tokens, point)[point]
    assert mx.all(found[:, :, 3] == 0)
    for query in (0, 1, 2, 4):
        assert mx.array_equal(found[:, :, query], clean[:, :, query])


def test_values_take_the_activations_dtype(model: nn.Module) -> None:
    x = mx.ones((1, 2, 3), mx.bfloat16)
    for edit in (iv.add(mx.ones(3)), iv.replace_with(mx.ones(3)), iv.mean(mx.ones((4, 3)))):
        assert edit(x).dtype == mx.bfloat16


@pytest.mark.parametrize(
    ("make_edit", "message"),
    [
        (lambda: iv.clamp(), "low or high must be given"),
        (lambda: iv.resample(mx.ones(3)), r"activations must be \[n, d\] or \[m, t, d\]"),
        (lambda: iv.mean(mx.ones((2, 3)), mx.array([False, False])), "at least one valid token"),
        (lambda: iv.at(iv.zero, "somewhere"), r"\[positions\] must be 'all'"),
        (lambda: iv.at(iv.zero, [True]), r"\[positions\] must be ints"),
    ],
)
def test_refused_when_made(make_edit: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_edit()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            iv.replace_with(mx.ones((4, WIDTH))),
            r"must broadcast to the activation's shape \(2, 5, 32\) but has",
        ),
        (iv.add(mx.ones(7)), r"\[add\] the value must broadcast"),
        (iv.resample(mx.ones((3, 4, WIDTH))), "at most 4 tokens"),
        (iv.at(iv.zero, [-6]), "must be ints >= -5"),
        (iv.scale, "must return shape"),  # not made yet: iv.scale(2)
    ],
)
def test_refused_when_used(model: nn.Module, tokens: mx.array, edit: lm.Edit, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edited(model, tokens, edit)
