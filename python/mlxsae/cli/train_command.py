"""Train sparse autoencoders on the activations of a language model.

  mlxsae train --model PATH_OR_NAME --layer 2 --component resid --dataset stories.json --out DIR
  mlxsae train --model PATH_OR_NAME --layer 1 2 3 --component resid mlp --dataset stories.json --out DIR
  mlxsae train --activations STORED --layer 2 --out DIR
  mlxsae train --resume DIR

Activations stream from the model through a shuffling buffer into the trainer, and nothing is stored on disk; or they
come from what `mlxsae harvest` has stored, which also knows the model, the text and what of it is held out. DIR gets
run.json at once, checkpoints meanwhile, and cfg.json, sae_weights.safetensors and metadata.json at the end. Several
layers or components share every forward pass; each gets its SAE, the one that it would get alone, in a folder of DIR
that is called by its hook point. Ctrl-C leaves a checkpoint. --resume goes on after that, or after a crash at any
moment, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxsae import lm as lm_room
from mlxsae.cli import options as kinds
from mlxsae.cli import terminal
from mlxsae.cli.run_file import RunFile, alone, fingerprint, finite, place, read, unchanged, writable
from mlxsae.cli.text_source import TextSource, default_context
from mlxsae.data import ActivationDataset, ContextActivations, ShuffleBuffer
from mlxsae.data.dataset import hook_points_of
from mlxsae.data.model_activations import ModelActivations
from mlxsae.io import native
from mlxsae.lm import Documents, HookPoint
from mlxsae.loss import AUXK_PRESETS
from mlxsae.metrics.in_model import diagnose, evaluate_in_model
from mlxsae.sae import RULES
from mlxsae.train import OPTIMIZERS, Job, SAEConfig, TrainConfig, fit_many
from mlxsae.train.checkpoint import checkpoints
from mlxsae.train.config import MOMENTS, PRECISIONS, VARIANTS, default_learning_rate, merged, wanting_l0
from mlxsae.train.doors import contexts_per_step, end_to_end_loss, fitting_context, tracking_callbacks
from mlxsae.train.flat_names import FLAT_NAMES, nested

_BUFFER_TOKENS, _BUFFER_BYTES = 131_072, 2**30
CHECKPOINTS = "checkpoints"


def configure(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("what to train on")
    where.add_argument(
        "--activations",
        type=lambda text: str(kinds.path(text)),
        metavar="STORED",
        help="folder that `mlxsae harvest` wrote: train on it, and take from it what else is not given here",
    )
    where.add_argument("--model", help="mlx-lm model folder, hub name, or 'tiny'")
    where.add_argument(
        "--layer",
        action=kinds.Several,
        type=kinds.whole(0),
        metavar="N",
        help="number of the block, from 0, or several",
    )
    where.add_argument(
        "--component",
        action=kinds.Several,
        type=kinds.component,
        metavar="NAME",
        help="of each layer: mlp, attn, resid (the residual stream after the block), or sites such as resid_mid (resid)",
    )
    where.add_argument("--dataset", help=".json, .jsonl or .txt file, a folder of them, or a hub dataset")
    where.add_argument("--text-field", help="where an object of the dataset keeps its text (text)")
    where.add_argument(
        "--context-size", type=kinds.whole(2), help="tokens per row (the model's context, at most 256)"
    )
    where.add_argument(
        "--heldout-fraction",
        type=kinds.number(above=0, below=1),
        help="share of the documents kept for evaluation, chosen by a hash of their text (0.1)",
    )
    where.add_argument("--heldout-tokens", type=kinds.whole(), help="tokens to evaluate on (50000)")

    sae = parser.add_argument_group("the SAE")
    sae.add_argument(
        "--k",
        type=kinds.whole(),
        help=f"latents kept per token ({SAEConfig.k}); for relu, gated and sigmoid_gated as --target-l0",
    )
    sae.add_argument(
        "--target-l0",
        type=kinds.number(above=0),
        help="latents that shall fire per token where a penalty decides that (relu, gated, sigmoid_gated): its weight is found",
    )
    sae.add_argument(
        "--expansion-factor", type=kinds.whole(), help=f"d_sae / d_in ({SAEConfig.expansion_factor})"
    )
    sae.add_argument(
        "--rule",
        type=kinds.rule,
        help=f"how latents are chosen: {', '.join(sorted(RULES))} ({SAEConfig.architecture})",
    )

    how = parser.add_argument_group("training")
    how.add_argument(
        "--config",
        type=kinds.path,
        metavar="FILE",
        help="JSON of an SAEConfig, as far as it differs from the defaults; other options overrule it",
    )
    how.add_argument("--max-tokens", type=kinds.whole(), help=f"({TrainConfig.total_tokens})")
    how.add_argument("--batch-size", type=kinds.whole(), help=f"tokens per step ({TrainConfig.batch_size})")
    how.add_argument(
        "--learning-rate", type=kinds.number(above=0), help="at its peak (by the number of latents)"
    )
    how.add_argument("--optimizer", type=kinds.optimizer, help=f"{', '.join(sorted(OPTIMIZERS))} (adam)")
    how.add_argument(
        "--aux",
        nargs="?",
        const="dictionary_learning",
        choices=sorted(AUXK_PRESETS),
        metavar="PRESET",
        help=f"revive dead latents by AuxK: {', '.join(sorted(AUXK_PRESETS))} (dictionary_learning for rules that keep "
        "the largest)",
    )
    how.add_argument("--no-aux", dest="aux", action="store_const", const="none", help="leave the dead dead")
    how.add_argument(
        "--end-to-end",
        type=kinds.end_to_end,
        metavar="LOSS",
        help="learn what the model predicts from the reconstruction, in place of the reconstruction: kl (as from the "
        "activation) or ce (the next token)",
    )
    how.add_argument(
        "--precision",
        type=kinds.precision,
        help=f"of the encoder's product: {', '.join(PRECISIONS)} (float32)",
    )
    how.add_argument("--moments", choices=MOMENTS, help="type in which Adam's moments are kept (float32)")
    how.add_argument(
        "--adam",
        choices=VARIANTS,
        help="what it does to latents that a batch does not use (dense: their momentum moves them)",
    )
    how.add_argument("--seed", type=kinds.seed, help="(0)")
    how.add_argument("--lm-batch-size", type=kinds.whole(), help="rows per model pass (16)")
    how.add_argument(
        "--buffer-tokens",
        type=kinds.whole(),
        help=f"activations held for shuffling ({_BUFFER_TOKENS}, or what fits in 1 GiB)",
    )
    how.add_argument(
        "--checkpoint-every",
        type=kinds.whole(),
        help=f"steps between checkpoints ({TrainConfig.checkpoint_every})",
    )
    how.add_argument(
        "--keep-checkpoints",
        action="store_true",
        default=None,
        help="keep the last checkpoints when training is complete",
    )
    begin = how.add_mutually_exclusive_group()
    begin.add_argument(
        "--resume", type=kinds.path, metavar="DIR", help="go on with the run in DIR, whose options all hold"
    )
    begin.add_argument(
        "--restart", action="store_true", help="drop the checkpoints of an unfinished run in --out"
    )

    out = parser.add_argument_group("output")
    out.add_argument("--out", type=kinds.path, metavar="DIR", help="folder to write")
    out.add_argument("--quiet", action="store_true", help="no progress on stderr")
    out.add_argument("--json", action="store_true", help="the metrics as one JSON line instead of a table")
    parser.set_defaults(parser=parser)


_ORIGINS = ("model", "dataset", "activations")
_DEFAULTS: dict[str, Any] = {
    "component": ["resid"],
    "keep_checkpoints": False,
}
# Which option overrules what of the configuration.
_CONFIGURED = {
    "k": "k",
    "expansion_factor": "expansion_factor",
    "rule": "architecture",
    "max_tokens": "train.total_tokens",
    "batch_size": "train.batch_size",
    "seed": "train.seed",
    "precision": "train.precision",
    "checkpoint_every": "train.checkpoint_every",
    "learning_rate": "train.optimizer.learning_rate",
    "optimizer": "train.optimizer.name",
    "moments": "train.optimizer.moments",
    "adam": "train.optimizer.variant",
    "aux": "train.loss.auxk",
    "end_to_end": "train.loss.end_to_end",
    "target_l0": "train.loss.target_l0",
    "context_size": "data.context_size",
    "lm_batch_size": "data.lm_batch_size",
    "buffer_tokens": "data.buffer_tokens",
    "heldout_fraction": "data.validation_split",
    "heldout_tokens": "data.validation_tokens",
}


def run(options: argparse.Namespace) -> int:
    with contextlib.ExitStack() as held:
        return _run(options, held)


def _run(options: argparse.Namespace, held: contextlib.ExitStack) -> int:
    parser = options.parser
    given = {
        name: value
        for name, value in vars(options).items()
        if name not in ("run", "argv", "command", "version", "parser", "quiet", "json") and value is not None
    }
    given = {name: value for name, value in given.items() if value is not False}
    if options.resume is not None:
        if others := sorted(given.keys() - {"resume"}):
            parser.error(f"--resume takes its options from the run but got --{others[0].replace('_', '-')}")
        out, old = options.resume, read(options.resume)
        if old.get("command") != "train":
            raise ValueError(f"[train] --resume needs the folder of a training run but {out} holds none.")
        if old["status"] == "done":
            _show(options, old["results"], out)
            return 0
        held.enter_context(alone("train", out))
        chosen = old["options"]
        unchanged(old, "model", "dataset")
        origin = {name: old[name] for name in _ORIGINS if name in old}
    else:
        if "activations" in given:
            given = _stored(given)
        needed = ["model", *(() if "hook_points" in given else ("layer",)), "dataset", "out"]
        if missing := [n for n in needed if n not in given]:
            parser.error(f"the following arguments are required: {', '.join('--' + n for n in missing)}")
        out = given.pop("out")
        restart = given.pop("restart", False)
        if "config" in given:
            given["config"] = _read_config(given["config"])
        chosen = _DEFAULTS | given
        config = _config(chosen)  # a fault in it is found before anything is written
        wanted, k = config.train.loss.target_l0, given.get("k")
        if k is not None and wanted not in (None, k) and "k" not in RULES[config.architecture].PARAMETERS:
            parser.error(
                f"--k is the L0 to reach for {config.architecture} and must agree with target_l0 but got {k} and {wanted:g}"
            )
        held.enter_context(alone("train", out))
        with writable("train", out):
            _claim(out, restart)
        origin = {name: fingerprint(chosen[name]) for name in _ORIGINS if name in chosen}
    with writable("train", out):
        record = RunFile(
            out,
            "train",
            options.argv,
            options=chosen,
            **origin,
            resumed=options.resume is not None,
        )
    try:
        metrics = _train(chosen, record, out, quiet=options.quiet)
    except KeyboardInterrupt:
        saved = checkpoints(out / CHECKPOINTS)
        with contextlib.suppress(OSError):
            record.finish("interrupted", checkpoint=str(saved[-1]) if saved else None)
        raise KeyboardInterrupt(
            f"The checkpoint is {saved[-1]}; mlxsae train --resume {out} goes on from it."
            if saved
            else "Training had not begun; there is no checkpoint."
        ) from None
    except BaseException as e:
        with contextlib.suppress(OSError):
            record.finish("failed", error=f"{type(e).__name__}: {e}")
        raise
    record.finish("done", results=metrics)
    # Only now: a run that is killed before this line goes on from its last checkpoint.
    if not chosen["keep_checkpoints"]:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    _show(options, metrics, out)
    return 0


def _show(options: argparse.Namespace, metrics: dict[str, Any], out: Path) -> None:
    if options.json:
        print(json.dumps(finite(metrics)))
        return
    if "fvu" in metrics:  # of the only hook point, otherwise by their names
        _show_one(metrics, out)
        return
    for name, found in metrics.items():
        print(f"{name}\n")
        _show_one(found, out / name)
        print()


def _show_one(metrics: dict[str, Any], out: Path) -> None:
    print(terminal.metrics_table(metrics))
    for advice in diagnose(metrics):
        print(f"\n! {advice}")
    print(f"\nSaved in {out}")


def _train(chosen: dict[str, Any], record: RunFile, out: Path, *, quiet: bool) -> dict[str, Any]:
    """The metrics; where there are several hook points, by their names."""
    options = argparse.Namespace(**chosen)
    say = _Say(quiet)
    say(f"loading {options.model}")
    # Relative paths were meant from where the run began.
    lm = lm_room.load(record.place("model"))
    named = chosen.get("hook_points") or hook_points_of(options.layer, options.component, None)
    points = tuple(lm.hook_point(point) for point in named)
    if any(point.site == "attn_pattern" for point in points):
        raise ValueError("[train] --component must have one width but attn_pattern has as many as keys.")
    several = len(points) > 1
    config = _config(chosen)
    train, data = config.train, config.data
    saes = {point: config.build(lm.shape_at(point)[-1]) for point in points}
    fits = max(_BUFFER_BYTES // (4 * sum(sae.d_in for sae in saes.values())), train.batch_size)
    buffer_tokens = max(data.buffer_tokens or min(_BUFFER_TOKENS, fits), train.batch_size)
    text = TextSource(
        lm,
        Documents(record.place("dataset"), chosen.get("text_field")),
        fitting_context(lm, data.context_size) or default_context(lm),
        data.lm_batch_size,
        data.validation_split,
    )
    widths = {str(point): {"d_in": sae.d_in, "d_sae": sae.d_sae} for point, sae in saes.items()}
    rates = {
        name: train.optimizer.learning_rate or default_learning_rate(width["d_sae"])
        for name, width in widths.items()
    }
    only = str(points[0])
    resolved = {
        "sae": config.to_dict() | ({} if several else widths[only]),
        "learning_rate": rates if several else rates[only],
        "dead_after": train.dead_after,
        **({"hook_points": widths} if several else {"hook_name": only}),
        "context_size": text.context_size,
        "buffer_tokens": buffer_tokens,
    }
    record.update(config=resolved)
    next(text.heldout(1))  # no document in the split, no such file: found before the long part and not after

    for point, sae in saes.items():
        sae.metadata = sae.metadata | {  # now: trackers tell of it
            "model_name": options.model,
            "hook_name": str(point),
            "dataset_path": options.dataset,
            "context_size": text.context_size,
            "prepend_bos": lm.bos_id is not None,
            "exclude_special_tokens": True,
        }
        say(f"reading activations of {point}: d_in {sae.d_in}, d_sae {sae.d_sae}, {train.total_steps} steps")
    if several:
        say(f"progress is that of {only}")
    if train.loss.end_to_end is not None:
        text = replace(text, batch_size=contexts_per_step(train, text.context_size))
        source: Any = ContextActivations(lm, points, lambda: text.train(train.total_tokens, train.seed))
    elif "activations" in chosen:
        stored = ActivationDataset.open(record.place("activations"))
        source = stored.source(train.batch_size, hook_points=points, seed=train.seed)
    else:
        stream = ModelActivations(lm, points, lambda: text.train(train.total_tokens, train.seed))
        source = ShuffleBuffer(stream, batch_size=train.batch_size, capacity=buffer_tokens, seed=train.seed)
    start = time.perf_counter()
    jobs = [
        Job(
            sae,
            train,
            (i,),
            loss=end_to_end_loss(train, sae, lm, point),
            callbacks=tracking_callbacks(config.tracking, str(point) if several else ""),
            name=str(point) if several else "",
        )
        for i, (point, sae) in enumerate(saes.items())
    ]
    results = fit_many(
        jobs,
        source,
        checkpoint_dir=out / CHECKPOINTS,
        resume=record.content["resumed"],
        progress=not quiet,
    )
    seconds = time.perf_counter() - start
    say("evaluating on held-out text")
    metrics: dict[str, Any] = {}
    for (point, sae), result in zip(saes.items(), results, strict=True):
        found: dict[str, Any] = evaluate_in_model(lm, sae, point, text.heldout(data.validation_tokens))
        found |= {
            "train_tokens": result.state.tokens,
            "train_seconds": round(seconds, 3),
            "tokens_per_s": train.total_tokens / seconds,
        }
        known = {"evaluation": finite(found)}
        native.save(sae, out / str(point) if several else out, metadata=known)
        metrics[str(point)] = found
    return metrics if several else metrics[only]


def _config(chosen: dict[str, Any]) -> SAEConfig:
    tree: dict[str, Any] = json.loads(json.dumps(chosen.get("config", {})))
    if isinstance(data := tree.get("data", {}), dict):  # anything else is refused below
        tree["data"] = {"validation_split": 0.1, "validation_tokens": 50_000} | data
    for option, path in _CONFIGURED.items():
        if option in chosen:
            *parents, last = path.split(".")
            level = tree
            for name in parents:
                level = level.setdefault(name, {})
                if not isinstance(level, dict):
                    raise ValueError(f"[config] {name} must be an object but got {level!r}.")
            level[last] = None if option == "aux" and chosen[option] == "none" else chosen[option]
    config = SAEConfig.from_dict(tree, partial=True)
    if config.data.hook_point is not None:
        raise ValueError(
            f"[train] data.hook_point must not be in --config but is {config.data.hook_point!r}: --layer and --component say it."
        )
    if config.train.epochs is not None:
        raise ValueError(
            "[train] a text has no known length here: give train.total_tokens instead of train.epochs."
        )
    if config.train.loss.end_to_end is not None and "activations" in chosen:
        raise ValueError(
            "[train] --end-to-end asks the model at each step: give --dataset, not --activations."
        )
    if "k" in chosen:
        config = wanting_l0(config, chosen["k"])
    if not config.data.validation_split:
        raise ValueError(
            "[train] --heldout-fraction must be above 0: the final metrics are taken on that text."
        )
    if "log_every" not in tree.get("train", {}):
        # A short run, too, has twenty lines of progress.
        every = max(1, min(TrainConfig.log_every, -(-config.train.total_steps // 20)))
        config = replace(config, train=replace(config.train, log_every=every))
    return config


def _stored(given: dict[str, Any]) -> dict[str, Any]:
    """What is given, completed by what the folder of activations says of itself."""
    stored = ActivationDataset.open(given["activations"])
    there = [HookPoint.parse(name) for name in stored.hook_points]
    if not {"layer", "component"} & given.keys() and len(there) > 1:
        raise ValueError(
            f"[train] --layer and --component must say which, for {given['activations']} holds "
            f"{', '.join(stored.hook_points)}."
        )
    sites = {HookPoint.parse(c, layer=0).site for c in given.get("component", ())}
    layers = given.get("layer") or sorted({p.layer for p in there if not sites or p.site in sites})
    wanted = []
    if sites:
        wanted = hook_points_of(layers, given["component"], None)
    else:  # the residual stream, as without --activations, or the only one that is stored of a layer
        of_layer = [[point for point in there if point.layer == n] for n in layers]
        resid = [[point for point in points if point.site == "resid_post"] for points in of_layer]
        chosen = [r or points for r, points in zip(resid, of_layer, strict=True)]
        if all(len(points) == 1 for points in chosen):
            wanted = [point for (point,) in chosen]
    if not wanted or not set(wanted) <= set(there):
        raise ValueError(
            f"[train] --layer and --component must name hook points of {given['activations']}, which holds "
            f"{', '.join(stored.hook_points)}."
        )
    recipe, origin = stored.metadata["recipe"], stored.metadata["origin"]
    known = {name: place(origin.get(name)) for name in ("model", "dataset")}
    batching = recipe.get("batching", {})
    known |= {name: batching.get(name) for name in ("context_size", "heldout_fraction")}
    known["text_field"] = recipe.get("text", {}).get("text_field")
    known = {name: value for name, value in known.items() if value is not None}
    return known | given | {"hook_points": [str(point) for point in wanted]}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"[train] --config must be JSON but {path} is not: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"[train] --config must be a JSON object but {path} holds {type(found).__name__}.")
    names = {f.name for f in dataclasses.fields(SAEConfig)}
    flat = nested({name: value for name, value in found.items() if name in set(FLAT_NAMES) - names})
    found = merged(
        flat, {name: value for name, value in found.items() if name not in FLAT_NAMES or name in names}
    )
    tracking = found.get("tracking")
    for name in ("local", "tensorboard"):  # meant from where the run begins, whence ever it is resumed
        if isinstance(tracking, dict) and isinstance(tracking.get(name), str):
            tracking[name] = str(Path(tracking[name]).absolute())
    return found


def _claim(out: Path, restart: bool) -> None:
    """Settle what happens with what ``out`` holds."""
    saved = checkpoints(out / CHECKPOINTS)
    if not saved:
        return
    if not restart and read(out).get("status") != "done":
        raise ValueError(
            f"[train] {out} holds an unfinished run (checkpoint {saved[-1].name}): go on with it by "
            f"mlxsae train --resume {out}, drop it by --restart, or choose another --out."
        )
    shutil.rmtree(out / CHECKPOINTS)


class _Say:
    """Progress in words, on stderr."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    def __call__(self, words: str) -> None:
        if not self._quiet:
            print(terminal.clean(words), file=sys.stderr, flush=True)
