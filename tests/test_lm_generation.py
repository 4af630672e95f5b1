"""Generation with edits: the loop with its KV cache against whole forward passes without one."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from lm_toys import WIDTH, write_folder
from mlxsae import lm
from mlxsae.lm import HookPoint

PROMPT = "The big old dog"
POINT = HookPoint(1, "resid_post")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> lm.LanguageModel:
    return lm.load(write_folder(tmp_path_factory.mktemp("models") / "toy"))


def steer(x: mx.array) -> mx.array:
    direction = mx.random.normal((WIDTH,), key=mx.random.key(7))
    return x + 0.7 * direction + 0.1 * mx.tanh(x)


def check_against_no_cache(
    model: lm.LanguageModel, edit: lm.Edit, positions: object, n_prompt: int, steps: list[lm.GeneratedToken]
) -> None:
    ids = model.encode(PROMPT) + [step.token for step in steps]
    t = len(ids)
    match positions:
        case "all":
            where = [True] * t
        case "prompt":
            where = [i < n_prompt for i in range(t)]
        case "generated":
            where = [i >= n_prompt for i in range(t)]
        case _:
            where = [i in positions or (i < n_prompt and i - n_prompt in positions) for i in range(t)]  # type: ignore[operator]
    with lm.splice(model, {POINT: lm.only_at(edit, mx.array([where]))}):
        logits = model(mx.array([ids]))[0]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for i, step in enumerate(steps):
        assert mx.allclose(step.logprobs, logprobs[n_prompt - 1 + i], rtol=0, atol=1e-4)


@pytest.mark.parametrize("prefill_step_size", [2048, 5])
@pytest.mark.parametrize("positions", ["all", "prompt", "generated", [0, 4, -1, 17]])
def test_edits_under_the_cache_equal_edits_without(
    toy: lm.LanguageModel, positions: str | list[int], prefill_step_size: int
) -> None:
    n_prompt = len(toy.encode(PROMPT))
    assert n_prompt == 16
    steps = list(
        lm.stream_generate(
            toy,
            PROMPT,
            max_tokens=8,
            edits={POINT: steer},
            positions=positions,
            temperature=1.0,
            seed=3,
            prefill_step_size=prefill_step_size,
        )
    )
    assert len(steps) >= 4
    check_against_no_cache(toy, steer, positions, n_prompt, steps)


def test_positions_differ(toy: lm.LanguageModel) -> None:
    def run(positions: str) -> list[float]:
        steps = lm.stream_generate(toy, PROMPT, max_tokens=3, edits={POINT: steer}, positions=positions)
        return [step.logprobs[5].item() for step in steps]

    plain = [step.logprobs[5].item() for step in lm.stream_generate(toy, PROMPT, max_tokens=3)]
    assert run("generated")[0] == plain[0]  # the first new token is chosen from the prompt
    assert run("prompt")[0] == pytest.approx(run("all")[0], abs=1e-5)
    assert abs(run("prompt")[0] - plain[0]) > 1e-3


def test_the_text_is_the_tokens(toy: lm.LanguageModel) -> None:
    steps = list(lm.stream_generate(toy, PROMPT, max_tokens=12, temperature=1.0, seed=1))
    text = lm.generate(toy, PROMPT, max_tokens=12, temperature=1.0, seed=1)
    assert text == "".join(step.text for step in steps) == toy.decode([step.token for step in steps])
    assert not {step.token for step in steps} & toy.eos_ids


def test_greedy_is_the_argmax(toy: lm.LanguageModel) -> None:
    ids = toy.encode(PROMPT)
    for step in lm.stream_generate(toy, mx.array(ids), max_tokens=5):
        assert mx.argmax(toy(mx.array([ids]))[0, -1]).item() == step.token
        ids.append(step.token)


def test_a_seed_repeats_and_leaves_the_global_state(toy: lm.LanguageModel) -> None:
    mx.random.seed(11)
    expected = mx.random.uniform().item()
    mx.random.seed(11)
    first = lm.generate(toy, PROMPT, max_tokens=12, temperature=2.0, seed=5)
    assert mx.random.uniform().item() == expected
    assert lm.generate(toy, PROMPT, max_tokens=12, temperature=2.0, seed=5) == first
    others = {lm.generate(toy, PROMPT, max_tokens=12, temperature=2.0, seed=seed) for seed in range(6, 10)}
    assert others != {first}


def test_the_model_is_unedited_between_tokens(toy: lm.LanguageModel) -> None:
    tokens = mx.array([toy.encode("dog")])
    plain = toy(tokens)
    stream = lm.stream_generate(
        toy, PROMPT, max_tokens=6, edits={POINT: mx.zeros_like}, temperature=1.0, seed=0
    )
    for _ in stream:
        assert mx.array_equal(toy(tokens), plain)
    stream = lm.stream_generate(
        toy, PROMPT, max_tokens=6, edits={POINT: mx.zeros_like}, temperature=1.0, seed=0
    )
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert mx.array_equal(toy(tokens), plain)


def test_it_stops_at_an_end_of_text_token(toy: lm.LanguageModel) -> None:
    steps = list(lm.stream_generate(toy, PROMPT, max_tokens=40, temperature=1.0, seed=2))
    last = steps[3].token
    toy.tokenizer.eos_token_ids.add(last)
    try:
        shorter = list(lm.stream_generate(toy, PROMPT, max_tokens=40, temperature=1.0, seed=2))
    finally:
        toy.tokenizer.eos_token_ids.remove(last)
    assert [s.token for s in shorter] == [s.token for s in steps][: [s.token for s in steps].index(last)]


def test_mlx_lms_own_generate_runs_under_splice(toy: lm.LanguageModel) -> None:
    import mlx_lm

    with lm.splice(toy, {POINT: steer}):
        theirs = mlx_lm.generate(toy.model, toy.tokenizer, PROMPT, max_tokens=8)
    assert theirs == lm.generate(toy, PROMPT, max_tokens=8, edits={POINT: steer})
    assert theirs != mlx_lm.generate(toy.model, toy.tokenizer, PROMPT, max_tokens=8)


def test_an_exception_in_an_edit_ends_generation_cleanly(toy: lm.LanguageModel) -> None:
    calls = 0

    def breaks(x: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise RuntimeError("enough")
        return x

    plain = lm.generate(toy, PROMPT, max_tokens=5)
    with pytest.raises(RuntimeError, match="enough"):
        lm.generate(toy, PROMPT, max_tokens=20, edits={POINT: breaks}, temperature=1.0, seed=0)
    assert lm.generate(toy, PROMPT, max_tokens=5) == plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "prompt must hold at least one token"),
        ({"prompt": mx.array([[1, 2]])}, "prompt must hold"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"prefill_step_size": 0}, "prefill_step_size must be at least 1 but got 0"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"temperature": float("nan")}, "temperature must be >= 0"),
        ({"positions": "some"}, r"\[positions\] must be 'all', 'prompt', 'generated'"),
        ({"positions": [-99]}, r"\[positions\] must be ints >= -16"),
        ({"positions": [1.5]}, r"\[positions\] must be ints but got"),
        ({"positions": -1}, "list of int but got int"),
        ({"positions": (i for i in [0])}, "list of int but got generator"),
        ({"edits": {"layers.9.mlp": steer}}, r"layer must be in \[0, 3\]"),
        ({"edits": {"layers.1.mpl": steer}}, "component must be one of"),
        ({"edits": {"layers.1": steer, POINT: steer}}, "given once"),
    ],
)
def test_bad_arguments(toy: lm.LanguageModel, change: dict, message: str) -> None:
    arguments = {"prompt": PROMPT, "max_tokens": 3} | change
    with pytest.raises(ValueError, match=message):
        lm.stream_generate(toy, **arguments)


def test_prompts_of_numpy_and_models_without_text(toy: lm.LanguageModel) -> None:
    ids = toy.encode(PROMPT)
    plain = lm.generate(toy, ids, max_tokens=4)
    assert lm.generate(toy, np.array(ids), max_tokens=4) == plain  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have a tokenizer"):
        lm.stream_generate(lm.LanguageModel(toy.model), ids, max_tokens=4)


def test_a_trained_model_tells_the_known_story_and_can_be_stopped(shared: Path) -> None:
    model = lm.load(shared / "data" / "stories260K")
    assert lm.generate(model, "Once upon a time", max_tokens=20).startswith(
        ", there was a little girl named Lily."
    )
    zeroed = lm.generate(model, "Once upon a time", max_tokens=20, edits={(2, "resid"): mx.zeros_like})
    assert "Lily" not in zeroed


def test_an_edit_that_names_its_tokens_goes_before_the_callers_positions(toy: lm.LanguageModel) -> None:
    def run(edit: lm.Edit, positions: str | list[int]) -> list[lm.GeneratedToken]:
        return list(lm.stream_generate(toy, PROMPT, max_tokens=4, edits={POINT: edit}, positions=positions))

    for a, b in zip(run(lm.interventions.at(steer, [2, -1]), "generated"), run(steer, [2, -1]), strict=True):
        assert a.token == b.token
        assert mx.array_equal(a.logprobs, b.logprobs)


@pytest.mark.parametrize("max_tokens", [1, 6])
@pytest.mark.parametrize("prompt", [PROMPT, "d"])
def test_what_is_recorded_is_the_new_tokens_own_activation(
    toy: lm.LanguageModel, prompt: str, max_tokens: int
) -> None:
    record = {"layers.2.mlp": lambda x: {"twice": 2 * x[0, 0]}, POINT: lambda x: x[0, 0]}
    steps = list(
        lm.stream_generate(
            toy, prompt, max_tokens=max_tokens, edits={POINT: steer}, record=record, temperature=1.0, seed=3
        )
    )
    plain = lm.stream_generate(
        toy, prompt, max_tokens=max_tokens, edits={POINT: steer}, temperature=1.0, seed=3
    )
    assert [s.token for s in plain] == [s.token for s in steps]  # recording changes nothing
    ids = toy.encode(prompt)
    n = len(ids)
    with lm.splice(toy, {POINT: steer}):
        whole = lm.capture(toy, mx.array([ids + [s.token for s in steps]]), [POINT, "layers.2.mlp"])
    for i, step in enumerate(steps):
        assert mx.allclose(step.recorded["layers.1"], whole[POINT][0, n + i], rtol=0, atol=1e-4)
        twice = step.recorded["layers.2.mlp"]["twice"]
        assert mx.allclose(twice, 2 * whole["layers.2.mlp"][0, n + i], rtol=0, atol=1e-4)
