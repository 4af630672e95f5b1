"""What hooks cost: capture at one layer against the bare blocks up to it, generation with an SAE against without.

The two of a pair take turns, so that the machine's moods fall on both; ``ratio`` in the stored result is the median of
the turns' ratios. The model is the bundled one; trained ones in ``../shared/data`` are measured where they are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.base import create_attention_mask

import mlxsae
from mlxsae import lm

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MODELS = {"tiny": "tiny"} | {
    name: str(DATA / name) for name in ("babyllama105", "stories260K") if (DATA / name).is_dir()
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> mlxsae.InterpretableModel:
    return mlxsae.InterpretableModel(MODELS[request.param])


def in_turns(benchmark: Any, rounds: int, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    ratios = []

    def turn() -> None:
        times = []
        for function in (theirs, ours) if len(ratios) % 2 else (ours, theirs):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        mine, other = times if not len(ratios) % 2 else times[::-1]
        ratios.append(mine / other)

    benchmark.pedantic(turn, rounds=rounds, warmup_rounds=2)
    benchmark.extra_info["ratio"] = round(statistics.median(ratios[2:]), 4)


def bench_capture(benchmark: Any, model: mlxsae.InterpretableModel, request: pytest.FixtureRequest) -> None:
    net, layer = model.lm.model, model.lm.n_layers // 2
    t = min(256, model.lm.context_size or 256)
    tokens = mx.array(np.random.default_rng(0).integers(3, model.vocab_size, (16, t)).astype(np.int32))

    def bare() -> None:
        h = net.model.embed_tokens(tokens)
        mask = create_attention_mask(h, None)
        for block in net.layers[: layer + 1]:
            h = block(h, mask, cache=None)
        mx.eval(h)

    benchmark.group = f"{model.lm.name}: capture after block {layer}, over the bare blocks"
    in_turns(
        benchmark,
        request.config.getoption("rounds"),
        lambda: lm.capture(model.lm, tokens, (layer, "resid_post")),
        bare,
    )


@pytest.mark.parametrize("against", ["mlx-lm", "mlxsae"])
def bench_features_of_generated_tokens(
    benchmark: Any, model: mlxsae.InterpretableModel, against: str, request: pytest.FixtureRequest
) -> None:
    """One SAE of 16 times the width; `against` mlx-lm's own loop, and ours without the SAE."""
    d, n = model.lm.d_model, 48
    point = model.lm.hook_point("resid", layer=model.lm.n_layers // 2)
    model.saes[point] = mlxsae.SAE(d, 16 * d, k=32, seed=0)
    prompt = [
        step.token for step in model.stream([model.lm.bos_id or 3], max_tokens=4, temperature=1.0, seed=0)
    ]
    eos, model.lm.tokenizer.eos_token_ids = model.lm.tokenizer.eos_token_ids, set()  # n tokens, come what may

    def streamed(**options: Any) -> int:
        return sum(1 for _ in model.stream(prompt, max_tokens=n, **options))

    def plain() -> int:
        if against == "mlxsae":
            return streamed(features=[])
        return sum(1 for _ in generate_step(mx.array(prompt), model.lm.model, max_tokens=n))

    assert streamed() == plain() == n
    benchmark.group = f"{model.lm.name}: {n} tokens with features, over {against} without"
    try:
        in_turns(benchmark, 2 * request.config.getoption("rounds"), streamed, plain)
    finally:
        model.lm.tokenizer.eos_token_ids = eos
