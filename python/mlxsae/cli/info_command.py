"""Show versions, the device MLX uses, what runs each op, and the matrix library beneath MLX; or what a saved SAE is.

mlxsae info
mlxsae info DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

import mlxsae
from mlxsae.cli import options as kinds
from mlxsae.cli import terminal
from mlxsae.cli.run_file import device, finite, versions
from mlxsae.io import native


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", nargs="?", type=kinds.path, metavar="DIR", help="folder of a saved SAE")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of tables")


def run(options: argparse.Namespace) -> int:
    if options.directory is not None:
        found = _of_sae(options.directory)
        shown = terminal.table((name.replace("_", " "), _words(value)) for name, value in found.items())
        print(json.dumps(finite(found)) if options.json else shown)
        return 0
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


def _of_sae(directory: Path) -> dict[str, Any]:
    """What a folder holds; it is read whole, so a damaged one is found out."""
    try:
        sae = native.load(directory)
    except FileNotFoundError:
        below = [] if (directory / native.CONFIG).exists() else sorted(directory.glob(f"*/{native.CONFIG}"))
        if not below:
            raise
        folders = ", ".join(str(path.parent) for path in below)
        raise ValueError(
            f"[info] {directory} must be the folder of one SAE but holds those in {folders}."
        ) from None
    config = json.loads(path.read_text("utf-8")) if (path := directory / native.CONFIG).exists() else {}
    weights: list[tuple[str, mx.array]] = tree_flatten(sae.parameters())  # type: ignore[assignment]
    found: dict[str, Any] = {
        "kind": type(sae).__name__
        if type(sae) is not mlxsae.SAE
        else "transcoder"
        if sae.transcoder
        else "SAE",
        "architecture": config.get("architecture", "circuit-tracer's"),
        "rule": str(getattr(sae.rule, "layers", [sae.rule])[0]),
        "d_in": sae.d_in,
        "d_out": sae.d_out,
        "d_sae": sae.d_sae,
        "parameters": sum(a.size for _, a in weights),
        "dtype": str(sae.dtype).removeprefix("mlx.core."),
    }
    found |= {name: getattr(sae, name) for name in ("n_layers", "n_sources") if hasattr(sae, name)}
    about = sae.metadata
    where = ("model_name", "hook_name", "hook_name_out", "inputs", "targets", "sources", "dataset_path")
    found |= {name: about[name] for name in where if name in about}
    training, measured = (
        value if isinstance(value := about.get(name), dict) else {} for name in ("training", "evaluation")
    )
    found |= {f"training_{name}": training[name] for name in ("steps", "tokens") if name in training}
    return found | {name: measured[name] for name in ("fvu", "l0", "dead_fraction") if name in measured}


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return terminal.clean(
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )
