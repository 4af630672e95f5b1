"""Judge a saved SAE inside its language model.

  mlxsae eval DIR

DIR is what `mlxsae train` wrote, or any SAE in SAELens' layout. Model, hook point and held-out text are those of the
training unless they are given; with another --dataset all of its text is used, as none of it was trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from mlxsae import lm as lm_room
from mlxsae.cli import options as kinds
from mlxsae.cli import terminal
from mlxsae.cli.run_file import finite, place, read, same
from mlxsae.cli.text_source import TextSource, default_context
from mlxsae.io import native
from mlxsae.lm import Documents, HookPoint
from mlxsae.metrics.in_model import diagnose, evaluate_in_model
from mlxsae.train.doors import fitting_context


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=kinds.path, metavar="DIR", help="folder of the SAE")
    parser.add_argument("--model", help="mlx-lm model folder or hub name (that of the training)")
    parser.add_argument("--layer", type=kinds.whole(0), help="number of the block (that of the training)")
    parser.add_argument(
        "--component", type=kinds.component, help="mlp, attn, resid, ... (that of the training)"
    )
    parser.add_argument("--dataset", help="text to evaluate on (what the training held out)")
    parser.add_argument("--text-field", help="where an object of the dataset keeps its text")
    parser.add_argument("--context-size", type=kinds.whole(2), help="tokens per row (that of the training)")
    parser.add_argument("--heldout-tokens", type=kinds.whole(), help="(that of the training, else 50000)")
    parser.add_argument(
        "--lm-batch-size", type=kinds.whole(), default=16, help="rows per model pass (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line instead of a table")


def run(options: argparse.Namespace) -> int:
    several = sorted(str(cfg.parent) for cfg in options.directory.glob("*/cfg.json"))
    if several and not (options.directory / "cfg.json").is_file():
        raise ValueError(f"[eval] {options.directory} holds several SAEs: give one, of {', '.join(several)}.")
    sae = native.load(options.directory)
    trained = read(options.directory) or read(options.directory.resolve().parent)  # one of several of a run
    made: dict[str, Any] = trained.get("options", {})
    kinds_of = {"model_name": str, "dataset_path": str, "hook_name": str, "context_size": int}
    about = {
        n: v for n, kind in kinds_of.items() if isinstance(v := sae.metadata.get(n), kind)
    }  # written by anybody
    model = options.model or place(trained.get("model")) or about.get("model_name")
    dataset = options.dataset or place(trained.get("dataset")) or about.get("dataset_path")
    if not model or not dataset:
        missing = "--dataset" if model else "--model"
        raise ValueError(f"[eval] {missing} must be given: {options.directory} does not say which was used.")
    lm = lm_room.load(model)
    data = trained.get("config", {}).get("sae", {}).get("data", {})
    text = TextSource(
        lm,
        Documents(dataset, options.text_field or (None if options.dataset else made.get("text_field"))),
        fitting_context(lm, options.context_size or about.get("context_size")) or default_context(lm),
        options.lm_batch_size,
        data.get("validation_split", 0.1),
    )
    hook_point = _hook_point(options, about.get("hook_name"))
    # The same file under another name is still the text that was trained on; only a --dataset of its own is not.
    own = options.dataset and not ("dataset" in trained and same(trained["dataset"], options.dataset))
    split = None if own else "heldout"
    if split and "validation_split" not in data:
        print(
            f"! {options.directory} does not say what was held out of {terminal.clean(str(dataset))}: a tenth of it is "
            "taken, which may have been trained on.",
            file=sys.stderr,
        )
    tokens = options.heldout_tokens or data.get("validation_tokens", 50_000)
    metrics = evaluate_in_model(lm, sae, hook_point, text.heldout(tokens, split=split))
    if options.json:
        print(json.dumps(finite(metrics)))
        return 0
    print(
        f"{options.directory}: {hook_point} of {terminal.clean(str(model))}, d_sae {sae.d_sae}, {sae.rule}\n"
    )
    print(terminal.metrics_table(metrics))
    for advice in diagnose(metrics):
        print(f"\n! {advice}")
    return 0


def _hook_point(options: argparse.Namespace, trained: str | None) -> HookPoint:
    known = HookPoint.parse(trained) if trained else None
    layer = options.layer if options.layer is not None else known and known.layer
    component = options.component or (known and known.site)
    if layer is None or component is None:
        raise ValueError(
            "[eval] --layer and --component must be given: the SAE does not say where it belongs."
        )
    return HookPoint.parse(component, layer=layer)
