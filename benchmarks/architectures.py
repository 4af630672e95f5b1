"""Every architecture on the bundled language model: the same activations, tokens, width and k; one table for the docs.

``python -m benchmarks.architectures`` trains them all on one stream (`mlxsae.train.fit_many`), evaluates each in the model on
held-out text and adds what it saw to ``benchmarks/results/architectures.json``; ``--write`` puts the table into
``docs/architectures.md``. Settings are the library's defaults, but for rows that are kept in use and for penalties, whose weight
a controller chooses for the L0 of the others. About half an hour on two cores; ``--only`` measures row by row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import machine
from mlxsae import lm as lm_room
from mlxsae.data import ModelActivations, ShuffleBuffer
from mlxsae.lm import TokenBatch, tiny
from mlxsae.lm.tiny import world
from mlxsae.lm.tiny.language import documents, token_rows
from mlxsae.metrics.in_model import evaluate_in_model
from mlxsae.train import Job, LossConfig, OptimizerConfig, SAEConfig, TrainConfig, fit_many

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
DOC = ROOT / "docs" / "architectures.md"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"
K, EXPANSION_FACTOR, BATCH, BUFFER, ROWS = 8, 32, 1024, 131_072, 64
MARKS = [world.TOKEN_ID[mark] for mark in world.SPECIALS]

NESTED = LossConfig(prefixes=(1 / 16, 1 / 4))
IN_USE = LossConfig(auxk="weakest", k_aux=32, dead_after=20_000)
"""With ``wake=0.001``: nearly every latent stays in use."""
RANDOM_START: dict[str, Any] = {"decoder_init": "keep", "optimizer": OptimizerConfig(decay=0.2)}
"""With it a BatchTopK stays in use too: started from data, 8 % die (nested 3 %)."""
AT_K = LossConfig(target_l0=K)
ARCHITECTURES: dict[str, SAEConfig] = {
    "TopK": SAEConfig(architecture="topk"),
    "BatchTopK": SAEConfig(architecture="batchtopk"),
    "GroupMax": SAEConfig(architecture="groupmax"),
    "Matryoshka TopK (1/16, 1/4)": SAEConfig(architecture="topk", train=TrainConfig(loss=NESTED)),
    "Matryoshka BatchTopK (1/16, 1/4)": SAEConfig(architecture="batchtopk", train=TrainConfig(loss=NESTED)),
    "BatchTopK, kept in use": SAEConfig(
        architecture="batchtopk", train=TrainConfig(loss=IN_USE, wake=0.001, **RANDOM_START)
    ),
    "Matryoshka TopK, kept in use": SAEConfig(
        architecture="topk", train=TrainConfig(loss=replace(IN_USE, prefixes=NESTED.prefixes), wake=0.003)
    ),
    "Matryoshka BatchTopK, kept in use": SAEConfig(
        architecture="batchtopk",
        train=TrainConfig(loss=replace(IN_USE, prefixes=NESTED.prefixes), wake=0.001, **RANDOM_START),
    ),
    "JumpReLU": SAEConfig(architecture="jumprelu", rule={"k": K}),
    "ReLU, L1": SAEConfig(architecture="relu", train=TrainConfig(loss=AT_K)),
    "Gated": SAEConfig(architecture="gated", train=TrainConfig(loss=AT_K)),
    "sigmoid-gated": SAEConfig(architecture="sigmoid_gated", train=TrainConfig(loss=AT_K)),
    "TopK-JumpReLU": SAEConfig(architecture="topk_jumprelu"),
    "Hierarchical TopK (2 of 1/8, 6 of the rest)": SAEConfig(architecture="hierarchical"),
    "tied TopK": SAEConfig(architecture="topk", tied=True),
}


def training_text(seed: int) -> Iterator[TokenBatch]:
    text = documents(sys.maxsize, seed)
    while True:
        yield _batch(token_rows(list(itertools.islice(text, ROWS))))


def _batch(tokens: np.ndarray) -> TokenBatch:
    return TokenBatch(mx.array(tokens), mx.array(np.isin(tokens, MARKS, invert=True)))


def measure(names: list[str], tokens: int, heldout_tokens: int, seed: int) -> dict:
    lm = lm_room.load("tiny")
    point = lm.hook_point("resid", layer=(lm.n_layers - 1) // 2)
    jobs = []
    for name in names:
        config = ARCHITECTURES[name]
        train = replace(config.train, total_tokens=tokens, batch_size=BATCH, seed=seed, log_every=50)
        sae = replace(config, k=K, expansion_factor=EXPANSION_FACTOR, train=train).build(lm.d_model)
        jobs.append(Job(sae, train, name=name))
    stream = ModelActivations(lm, point, lambda: training_text(seed))
    start = time.perf_counter()
    results = fit_many(jobs, ShuffleBuffer(stream, batch_size=BATCH, capacity=BUFFER, seed=seed))
    seconds = time.perf_counter() - start
    heldout = tiny.labelled(heldout_tokens, seed + 1).tokens
    batches = [_batch(heldout[i : i + ROWS]) for i in range(0, len(heldout), ROWS)]
    rows = {
        name: evaluate_in_model(lm, result.sae, point, batches)
        for name, result in zip(names, results, strict=True)
    }
    return {
        "machine": machine.describe(machine.cores()),
        "hook_point": str(point),
        "tokens": tokens,
        "heldout_tokens": heldout_tokens,
        "k": K,
        "d_sae": EXPANSION_FACTOR * lm.d_model,
        "seed": seed,
        "seconds": round(seconds),
        "rows": rows,
    }


def table(results: dict) -> str:
    lines = ["| architecture | FVU | L0 | dead | loss recovered |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {name} | {row['fvu']:.4f} | {row['l0']:.1f} | {row['dead_fraction']:.1%} | {row['loss_recovered_mean']:.4f} |"
        for name, row in results["rows"].items()
    ]
    return "\n".join(
        [
            f"The bundled model, `{results['hook_point']}`, {results['d_sae']:,} latents, k {results['k']}, {results['tokens']:,} "
            f"training tokens, seed {results['seed']}; judged on {results['heldout_tokens']:,} held-out tokens; loss recovered against mean "
            "ablation. Penalties aim at the same L0; all else is default but where the row says otherwise.",
            "",
            *lines,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--heldout-tokens", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--write", action="store_true", help="put the stored table into the docs; trains nothing"
    )
    options = parser.parse_args()
    if not options.write:
        names = options.only or list(ARCHITECTURES)
        results = measure(names, options.tokens, options.heldout_tokens, options.seed)
        kept = json.loads(options.out.read_text()) if options.out.exists() else {}
        same = ("hook_point", "tokens", "heldout_tokens", "k", "d_sae", "seed")
        if all(kept.get(name) == results[name] for name in same):
            rows = kept["rows"] | results["rows"]
            results["rows"] = {name: rows[name] for name in ARCHITECTURES if name in rows}
            results["seconds"] += kept["seconds"]
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(table(results))
        return
    text = DOC.read_text()
    before, after = text.split(BEGIN, 1)[0], text.split(END, 1)[1]
    DOC.write_text(f"{before}{BEGIN}\n{table(json.loads(options.out.read_text()))}\n{END}{after}")


if __name__ == "__main__":
    main()
