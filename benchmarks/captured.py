"""The step on a language model's own activations and along a real training run, beside Gaussian ones.

``python -m benchmarks.captured --model ../shared/data/babyllama105 --dataset ../shared/data/text/tinystories_val.json``

Eight sites of the model side by side make inputs as wide as S1's, correlated and with unequal spread, as real ones are;
batches are shuffled tokens. At each stage float32 and certified encode and step take turns in one process. Candidates
are counted apart from the kernels, from the definition of their bound: those whose interval reaches the k-th largest
lower end after the screen in 16 bits, and those left by float32 sums in any order, which are computed a last time; with
a shadow of bytes also those whose byte interval reaches the k-th largest in the end, the least that 16 bits could decide.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import machine
from benchmarks.shapes import SHAPES, Shape, Weights, batch, weights
from benchmarks.steps import OurStep
from mlxsae import lm, ops
from mlxsae.code import SparseCode

RESULTS = Path(__file__).parent / "results"
SITES = (
    *((layer, "resid_post") for layer in range(5)),
    *((layer, "mlp_out") for layer in (1, 2, 3)),
)
UNIT = 2.0**-24


def captured(model: str, dataset: str, tokens: int) -> np.ndarray:
    """``[tokens, 8 d_model]``, each site scaled to a mean square of 1, tokens shuffled."""
    loaded = lm.load(model)
    points = [loaded.hook_point(site, layer=layer) for layer, site in SITES]
    rows, found = [], 0
    for tokens_batch in lm.token_batches(
        loaded, lm.read_texts(dataset), context_size=256, batch_size=16, max_tokens=tokens
    ):
        sites = lm.capture(loaded, tokens_batch.tokens, points)
        rows.append([np.array(lm.valid_rows(sites[point], tokens_batch.valid)) for point in points])
        found += len(rows[-1][0])
    joined = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
    x = np.concatenate([a / np.sqrt(np.square(a).mean()) for a in joined], axis=1)
    return np.random.default_rng(0).permutation(x)


def candidates(x: np.ndarray, step: OurStep) -> dict[str, float]:
    """Mean numbers of features of a token in each stage of the certified encode."""
    shadow, k = step.shadow, step.shape.k
    assert shadow is not None
    n, d = x.shape
    x = x - np.array(step.params.b_dec)
    column, bias = np.array(shadow.columns), np.array(step.params.b_enc)
    w8 = None
    norm = lambda a: np.linalg.norm(a.astype(np.float64), axis=1).astype(np.float32)[:, None]  # noqa: E731
    if shadow.w16.dtype in (mx.int16, mx.int8):
        w16, scale = np.array(shadow.w16).astype(np.float32), column[0] / 2**15
        if shadow.w16.dtype == mx.int8:
            scale = scale * (1 + 2**-6)
            coarse = column[3][:, None] * w16[:, :d]
            w16 = coarse + w16[:, d:]
            w8 = coarse * scale[:, None]
        w16 = w16 * scale[:, None]
        low = np.round(x * (2**15 / norm(x))) * (norm(x) / 2**15)
    else:
        w16 = np.array(shadow.w16.astype(mx.float32))
        low = np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32))
    gamma = 2 * (d + 16) * UNIT
    error = (norm(x - low) + gamma * norm(x)) * column[0] + norm(low) * column[1] + column[2]

    def reached(z: np.ndarray, error: np.ndarray) -> np.ndarray:
        lower = z - error
        return z + error >= -np.partition(-lower, k - 1, axis=1)[:, k - 1 : k]

    screened = reached(low @ w16.T + bias, error + 4 * UNIT * np.abs(bias))
    z = x @ np.array(step.params.w_enc).T + bias
    exact = reached(z, gamma * norm(x) * column[0] + column[2] + 4 * UNIT * np.abs(bias)) & screened
    counts = {"screened": float(screened.sum() / n), "rescored": float(exact.sum() / n), "k": k}
    if w8 is not None:
        unit = np.abs(x).max(axis=1, keepdims=True) / 127
        low8 = np.round(x / unit) * unit
        error8 = (norm(x - low8) + gamma * norm(x)) * column[0] + norm(low8) * column[4] + column[2]
        least = np.partition(z, -k, axis=1)[:, -k][:, None]
        counts["passed by bytes"] = float((low8 @ w8.T + bias + error8 >= least).sum() / n)
    return counts


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def stage(float32: OurStep, certified: OurStep, batches: list[np.ndarray], rounds: int) -> dict[str, Any]:
    """Times in turns; the two steps train on."""
    samples: dict[str, list[float]] = {}
    inputs = [mx.array(x) for x in batches]
    mx.eval(inputs)
    counts = candidates(batches[0], certified)

    def code(step: OurStep, x: mx.array) -> SparseCode:
        return step.encode(x)

    for i in range(rounds + 1):
        x = inputs[i % len(inputs)]
        for name, step in (("float32", float32), ("certified", certified)):
            for what, call in (("encode", code), ("step", OurStep.step)):
                t = seconds(lambda call=call, step=step, x=x: call(step, x))
                if i:  # the first round warms up
                    samples.setdefault(f"{name}: {what}", []).append(t)
    return {"candidates": counts, "samples": samples}


def stages(
    shape: Shape, x: np.ndarray, marks: list[int], rounds: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    def both(start: Weights) -> tuple[OurStep, OurStep]:
        return OurStep(shape, start), OurStep(shape, start, certified=True)

    yield "Gaussian", stage(*both(weights(shape)), [batch(shape, i) for i in range(8)], rounds)
    blocks = [x[i : i + shape.n] for i in range(0, len(x) - shape.n + 1, shape.n)]
    start = weights(shape)
    pair = both(start._replace(b_dec=x.mean(axis=0)))
    done = 0
    for mark in marks:
        for step in pair:
            for i in range(done, mark):
                step.step(mx.array(blocks[i % len(blocks)]))
        done = mark
        here = [blocks[(done + i) % len(blocks)] for i in range(8)]
        found = stage(*pair, here, rounds)
        done += rounds + 1
        residual = here[0] - np.array(
            ops.sparse_decode(pair[1].encode(mx.array(here[0])), pair[1].params.w_dec, pair[1].params.b_dec)
        )
        found["fvu"] = float(np.square(residual).sum() / np.square(here[0] - here[0].mean(axis=0)).sum())
        yield f"captured, step {mark}", found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--shape", default="S1", choices=["S1", "S1x4"])
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--marks", default="0,50,400", help="steps of training at which to measure")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"captured-cpu-{machine.slug(machine.cpu_name())}.json"
    )
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    x = captured(options.model, options.dataset, options.tokens)
    if x.shape[1] != shape.d_in:
        parser.error(f"eight sites must be {shape.d_in} wide but are {x.shape[1]}")
    found: dict[str, Any] = {
        "machine": machine.describe(ops.num_threads()),
        "shape": shape._asdict(),
        "stages": {},
    }
    for name, result in stages(shape, x, [int(m) for m in options.marks.split(",")], options.rounds):
        found["stages"][name] = result
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        times = {key: round(statistics.median(v) * 1e3, 1) for key, v in result["samples"].items()}
        print(name, result["candidates"], times, result.get("fvu", ""))


if __name__ == "__main__":
    main()
