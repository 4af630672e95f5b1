"""Show versions, the device MLX uses, what runs each op, and the matrix library beneath MLX."""

from __future__ import annotations

import argparse
import json

import mlxsae
from mlxsae.cli import terminal
from mlxsae.cli.run_file import device, versions


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON line instead of tables")


def run(options: argparse.Namespace) -> int:
    where, ops, blas = device(), mlxsae.backends(), mlxsae.blas.status()
    sets = sorted(
        {how.partition("(")[2].rstrip(")") for by in ops.values() for how in by.values() if "(" in how}
    )
    if options.json:
        print(
            json.dumps(
                {
                    "versions": versions(),
                    "device": where,
                    "backends": ops,
                    "cpu_instruction_set": sets[0] if sets else None,
                    "blas": blas._asdict(),
                }
            )
        )
        return 0
    print(terminal.table(versions().items()), end="\n\n")
    print(
        terminal.table(
            [
                ("MLX device", where["mlx"]),
                ("processor", where["name"]),
                ("system", where["system"]),
                ("instruction set of our CPU kernels", ", ".join(sets) or "none"),
                ("threads of our CPU kernels", where["threads"]),
                ("real BLAS under MLX", "yes" if blas.active else "no"),
                ("BLAS library", blas.library or "unknown"),
                ("BLAS core and threads", f"{blas.core or 'unknown'}, {blas.threads or 'unknown'}"),
                ("BLAS, why", blas.reason),
            ]
        ),
        end="\n\n",
    )
    devices = sorted({name for by in ops.values() for name in by})
    print(
        terminal.table(
            [(op, *(by.get(d, "-") for d in devices)) for op, by in ops.items()], head=("op", *devices)
        )
    )
    return 0
