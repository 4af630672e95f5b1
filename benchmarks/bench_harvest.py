"""Harvesting at one layer against the bare forward pass up to that layer, in turns.

  python -m benchmarks.bench_harvest --model PATH --dataset PATH --layer 2 --max-tokens 60000

``bare`` runs embedding and blocks on batches that are already tokenised and keeps nothing; ``harvest`` reads, tokenises
and packs the text, runs the model, selects valid rows, and writes checksummed shards to disk, synced. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask

from benchmarks import machine
from mlxsae import lm, ops
from mlxsae.data.harvest import harvest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=60_000)
    parser.add_argument("--context-size", type=int, default=256)
    parser.add_argument("--lm-batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = lm.load(options.model)
    texts = list(lm.read_texts(options.dataset))

    def batches() -> list[lm.TokenBatch]:
        return lm.token_batches(  # type: ignore[return-value]
            model,
            texts,
            context_size=options.context_size,
            batch_size=options.lm_batch_size,
            max_tokens=options.max_tokens,
        )

    ready = list(batches())
    network = model.model.model  # a llama's

    def bare() -> None:
        for tokens, _ in ready:
            h = network.embed_tokens(tokens)  # type: ignore[union-attr]
            mask = create_attention_mask(h, None)
            for block in network.layers[: options.layer + 1]:  # type: ignore[union-attr]
                h = block(h, mask, None)
            mx.eval(h)

    folder = Path(tempfile.mkdtemp(prefix="mlxsae-bench-"))

    def stored() -> None:
        out = folder / "set"
        harvest(model, [("resid_post", options.layer)], batches, out, dtype=options.dtype)
        shutil.rmtree(out)

    def timed(function) -> float:  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    try:
        bare(), stored()
        seconds = [(timed(bare), timed(stored)) for _ in range(options.rounds)]
        print(
            json.dumps(
                {
                    "tokens": options.max_tokens,
                    "layer": options.layer,
                    "d": model.d_model,
                    "bare_s": round(statistics.median(b for b, _ in seconds), 3),
                    "harvest_s": round(statistics.median(h for _, h in seconds), 3),
                    "harvest_over_bare": round(statistics.median(h / b for b, h in seconds), 3),
                    "ratios": [round(h / b, 3) for b, h in seconds],
                    "machine": machine.describe(ops.num_threads()),
                }
            )
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
