"""Store a language model's activations on disk.

  mlxsae harvest --model PATH_OR_NAME --layer 2 --component resid --dataset stories.json --max-tokens 10_000_000 --out DIR

One forward pass for every layer and component asked for. DIR fills with checksummed safetensors shards. Run again
after Ctrl-C, a crash or a full disk, the same command goes on and leaves the same bytes as if nothing had happened; with
a larger --max-tokens it adds to what is there. `mlxsae train --activations DIR` trains on it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from mlxsae import lm as lm_room
from mlxsae.cli import options as kinds
from mlxsae.cli import terminal
from mlxsae.cli.run_file import fingerprint, finite, writable
from mlxsae.cli.text_source import default_context
from mlxsae.data import ActivationDataset
from mlxsae.data.encoding import DTYPES
from mlxsae.data.shards import read_index
from mlxsae.lm import Documents
from mlxsae.train.doors import fitting_context


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to store")
    what.add_argument("--model", required=True, help="mlx-lm model folder, hub name, or 'tiny'")
    what.add_argument(
        "--layer",
        required=True,
        action=kinds.Several,
        type=kinds.whole(0),
        metavar="N",
        help="blocks, from 0",
    )
    what.add_argument(
        "--component",
        action=kinds.Several,
        type=kinds.component,
        metavar="NAME",
        help="of each layer: mlp, attn, resid (the residual stream after the block), or sites such as mlp_in (resid)",
    )
    what.add_argument(
        "--dataset", required=True, help=".json, .jsonl or .txt file, a folder of them, or a hub dataset"
    )
    what.add_argument("--text-field", help="where an object of the dataset keeps its text (text)")
    what.add_argument("--max-tokens", type=kinds.whole(), help="(as many as the dataset has)")
    what.add_argument(
        "--context-size", type=kinds.whole(2), help="tokens per row (the model's context, at most 256)"
    )
    what.add_argument(
        "--heldout-fraction",
        type=kinds.number(above=0, below=1),
        default=0.1,
        help="share of the documents left out, for evaluation, chosen by a hash of their text (%(default)s)",
    )
    what.add_argument(
        "--min-norm", type=kinds.number(above=0), default=0.0, help="leave out tokens of smaller norm"
    )
    what.add_argument(
        "--max-norm-ratio",
        type=kinds.number(above=1),
        help="leave out tokens whose norm is over so many medians of their batch, such as attention sinks",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    how.add_argument("--seed", type=kinds.whole(0), default=0, help="of the order (%(default)s)")
    how.add_argument(
        "--lm-batch-size", type=kinds.whole(), default=16, help="rows per model pass (%(default)s)"
    )
    how.add_argument(
        "--shard-mib", type=kinds.whole(), default=128, help="size of a shard; memory holds two (%(default)s)"
    )
    out = parser.add_argument_group("output")
    out.add_argument(
        "--out", required=True, type=kinds.path, metavar="DIR", help="folder to write, or to go on in"
    )
    out.add_argument("--verify", action="store_true", help="compare all checksums at the end")
    out.add_argument("--quiet", action="store_true", help="no progress on stderr")
    out.add_argument("--json", action="store_true", help="one JSON line instead of a table")


def run(options: argparse.Namespace) -> int:
    start, before = time.perf_counter(), _rows(options.out)
    lm = lm_room.load(options.model)
    with writable("harvest", options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    dataset = fingerprint(options.dataset)
    try:
        made = ActivationDataset.from_texts(
            lm,
            Documents(options.dataset, options.text_field),
            layer=options.layer,
            component=options.component or ["resid"],
            cache_dir=options.out,
            max_samples=options.max_tokens,
            seed=options.seed,
            context_size=fitting_context(lm, options.context_size) or default_context(lm),
            lm_batch_size=options.lm_batch_size,
            split="train",
            heldout_fraction=options.heldout_fraction,
            dtype=options.dtype,
            shard_bytes=options.shard_mib << 20,
            min_norm=options.min_norm,
            max_norm_ratio=options.max_norm_ratio,
            recipe={
                # A file is what it holds, wherever it lies; a folder or a hub's dataset is only known by name.
                "source": dataset.get("sha256", Path(options.dataset).name),
                "text_field": options.text_field,
            },
            origin={"model": fingerprint(options.model), "dataset": dataset},
            progress=not options.quiet,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{_rows(options.out):,} tokens are stored in {options.out}; the same command goes on."
        ) from None
    if options.verify:
        made.verify()
    _show(options, made, before, time.perf_counter() - start)
    return 0


def _rows(out: Path) -> int:
    """Tokens in complete shards."""
    index = read_index(out)
    return sum(shard["rows"] for shard in index["shards"]) if index else 0


def _show(options: argparse.Namespace, made: ActivationDataset, before: int, seconds: float) -> None:
    shards = made.metadata["shards"]
    streams = {name: made.statistics(name) for name in made.hook_points}
    found: dict[str, Any] = {
        "tokens": len(made),
        "new_tokens": len(made) - before,
        "seconds": round(seconds, 3),
        "bytes": sum(shard["bytes"] for shard in shards),
        "shards": len(shards),
        "exhausted": made.metadata["exhausted"],
        "verified": options.verify,
        "hook_points": {
            name: {"d": made.d(name), "dtype": options.dtype, "mean_norm": s.mean_norm}
            for name, s in streams.items()
        },
    }
    if options.json:
        print(json.dumps(finite(found)))
        return
    rows = [
        (name, made.d(name), options.dtype, f"{s.mean_norm:.4g}", f"{s.variance.sum() ** 0.5:.4g}")
        for name, s in streams.items()
    ]
    print(terminal.table(rows, head=("hook point", "d", "stored as", "mean norm", "spread"), right=(1, 3, 4)))
    print(f"\n{len(made):,} tokens in {len(shards)} shards, {found['bytes'] / 1e6:,.1f} MB, in {options.out}")
    if found["exhausted"] and options.max_tokens and len(made) < options.max_tokens:
        print("! The dataset has no more text: training walks through it as often as it needs.")
