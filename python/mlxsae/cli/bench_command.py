"""Time what the package does on this machine.

mlxsae bench step --n 1024 --d-in 1024 --d-sae 16384 --k 32 --json
"""

from __future__ import annotations

import argparse
import json

from mlxsae.bench import time_step
from mlxsae.cli import options as kinds
from mlxsae.cli import terminal
from mlxsae.cli.run_file import device, versions
from mlxsae.sae import RULES
from mlxsae.train.config import PRECISIONS


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", metavar="what", required=True)
    step = what.add_parser(
        "step",
        help="one training step through the public trainer",
        description="Time steps of the trainer on random activations.",
    )
    step.add_argument("--n", type=kinds.whole(), default=1024, help="tokens per batch (%(default)s)")
    step.add_argument("--d-in", type=kinds.whole(), default=1024, help="(%(default)s)")
    step.add_argument("--d-sae", type=kinds.whole(), default=16_384, help="(%(default)s)")
    step.add_argument("--k", type=kinds.whole(), default=32, help="(%(default)s)")
    step.add_argument(
        "--rule", type=kinds.rule, default="topk", help=f"{', '.join(sorted(RULES))} (%(default)s)"
    )
    step.add_argument(
        "--precision",
        type=kinds.precision,
        default="float32",
        help=f"of the encoder's product: {', '.join(PRECISIONS)} (%(default)s)",
    )
    step.add_argument(
        "--aux",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="with AuxK over dead latents (off)",
    )
    step.add_argument("--steps", type=kinds.whole(), default=10, help="steps to time (%(default)s)")
    step.add_argument("--seed", type=kinds.seed, default=0, help="(%(default)s)")
    step.add_argument("--json", action="store_true", help="one JSON line instead of a table")


def run(options: argparse.Namespace) -> int:
    chosen = {
        name: getattr(options, name)
        for name in ("n", "d_in", "d_sae", "k", "rule", "precision", "aux", "steps", "seed")
    }
    measured = time_step(**chosen)
    facts = measured | {
        "options": chosen,
        "versions": versions(),
        "device": device(),
    }
    if options.json:
        print(json.dumps(facts))
        return 0
    shape = f"n {options.n}, d_in {options.d_in}, d_sae {options.d_sae}, k {options.k}"
    print(f"one {options.rule} step, {options.precision}, {shape}{', AuxK' if options.aux else ''}\n")
    print(
        terminal.table(
            [
                ("median", f"{1e3 * measured['median_s']:.1f} ms"),
                ("fastest", f"{1e3 * measured['min_s']:.1f} ms"),
                ("tokens per second", f"{measured['tokens_per_s']:,.0f}"),
                ("peak resident memory", f"{measured['peak_rss_bytes'] / 2**20:,.0f} MiB"),
                ("engine", measured["engine"]),
                ("steps timed", measured["steps"]),
            ],
            right=(1,),
        )
    )
    return 0
