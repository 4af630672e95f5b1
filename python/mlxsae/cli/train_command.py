"""Train a sparse autoencoder on the activations of a language model.

  mlxsae train --model PATH_OR_NAME --layer 2 --component resid --dataset stories.json --out DIR

Activations stream from the model through a shuffling buffer into the trainer; nothing is stored on disk. DIR gets
run.json at once, checkpoints meanwhile, and cfg.json, sae_weights.safetensors and metadata.json at the end. Ctrl-C
leaves a checkpoint; the same command with --resume goes on from it, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from mlxsae import lm as lm_room
from mlxsae.cli import options as kinds
from mlxsae.cli import terminal
from mlxsae.cli.run_file import RunFile, fingerprint, finite, read
from mlxsae.cli.text_source import Texts, TextSource, default_context
from mlxsae.data import ShuffleBuffer
from mlxsae.data.model_activations import ModelActivations
from mlxsae.io import native
from mlxsae.metrics.in_model import diagnose, evaluate_in_model
from mlxsae.train import LossConfig, OptimizerConfig, SAEConfig, TrainConfig, fit
from mlxsae.train.checkpoint import checkpoints
from mlxsae.train.config import default_learning_rate

_BUFFER_TOKENS, _BUFFER_BYTES = 131_072, 2**30
CHECKPOINTS = "checkpoints"


def configure(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("what to train on")
    where.add_argument("--model", required=True, help="mlx-lm model folder, hub name, or 'tiny'")
    where.add_argument("--layer", required=True, type=kinds.whole(0), help="number of the block, from 0")
    where.add_argument(
        "--component",
        type=kinds.component,
        default="resid",
        help="mlp, attn, resid (the residual stream after the block), or a site such as resid_mid (%(default)s)",
    )
    where.add_argument(
        "--dataset", required=True, help=".json, .jsonl or .txt file, a folder of them, or a hub dataset"
    )
    where.add_argument("--text-field", help="where an object of the dataset keeps its text (text)")
    where.add_argument(
        "--context-size", type=kinds.whole(2), help="tokens per row (the model's context, at most 256)"
    )
    where.add_argument(
        "--heldout-fraction",
        type=kinds.number(above=0, below=1),
        default=0.1,
        help="share of the documents kept for evaluation, chosen by a hash of their text (%(default)s)",
    )
    where.add_argument(
        "--heldout-tokens", type=kinds.whole(), default=50_000, help="tokens to evaluate on (%(default)s)"
    )

    sae = parser.add_argument_group("the SAE")
    sae.add_argument("--k", type=kinds.whole(), default=32, help="latents kept per token (%(default)s)")
    sae.add_argument("--expansion-factor", type=kinds.whole(), default=16, help="d_sae / d_in (%(default)s)")
    sae.add_argument("--rule", type=kinds.rule, default="topk", help="how latents are chosen (%(default)s)")

    how = parser.add_argument_group("training")
    how.add_argument("--max-tokens", type=kinds.whole(), default=2_000_000, help="(%(default)s)")
    how.add_argument("--batch-size", type=kinds.whole(), default=1024, help="tokens per step (%(default)s)")
    how.add_argument(
        "--learning-rate", type=kinds.number(above=0), help="Adam's, at its peak (by the number of latents)"
    )
    how.add_argument(
        "--aux",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="revive dead latents by the AuxK loss (on)",
    )
    how.add_argument(
        "--precision", type=kinds.precision, default="float32", help="of the encoder's product (%(default)s)"
    )
    how.add_argument("--seed", type=kinds.whole(0), default=0, help="(%(default)s)")
    how.add_argument(
        "--lm-batch-size", type=kinds.whole(), default=16, help="rows per model pass (%(default)s)"
    )
    how.add_argument(
        "--buffer-tokens",
        type=kinds.whole(),
        help=f"activations held for shuffling ({_BUFFER_TOKENS}, or what fits in 1 GiB)",
    )
    how.add_argument(
        "--checkpoint-every", type=kinds.whole(), default=1000, help="steps between checkpoints (%(default)s)"
    )
    how.add_argument(
        "--keep-checkpoints", action="store_true", help="keep the last checkpoints when training is complete"
    )
    begin = how.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    begin.add_argument(
        "--restart", action="store_true", help="drop the checkpoints of an unfinished run in --out"
    )

    out = parser.add_argument_group("output")
    out.add_argument("--out", required=True, type=Path, help="folder to write")
    out.add_argument("--quiet", action="store_true", help="no progress on stderr")
    out.add_argument("--json", action="store_true", help="the metrics as one JSON line instead of a table")


def run(options: argparse.Namespace) -> int:
    out: Path = options.out
    with _writable(out):
        _claim(out, options.resume, options.restart)
        record = RunFile(
            out,
            "train",
            options.argv,
            seed=options.seed,
            options={
                k: v
                for k, v in vars(options).items()
                if k not in ("run", "argv", "out", "command", "version")
            },
            model=fingerprint(options.model),
            dataset=fingerprint(options.dataset),
            resumed=options.resume,
        )
    try:
        metrics = _train(options, record)
    except KeyboardInterrupt:
        saved = checkpoints(out / CHECKPOINTS)
        with contextlib.suppress(OSError):
            record.finish("interrupted", checkpoint=str(saved[-1]) if saved else None)
        raise KeyboardInterrupt(
            f"The checkpoint is {saved[-1]}; the same command with --resume goes on from it."
            if saved
            else "Training had not begun; there is no checkpoint."
        ) from None
    except BaseException as e:
        with contextlib.suppress(OSError):
            record.finish("failed", error=f"{type(e).__name__}: {e}")
        raise
    record.finish("done", results=metrics)
    if options.json:
        print(json.dumps(finite(metrics)))
    else:
        print(terminal.metrics_table(metrics))
        for advice in diagnose(metrics):
            print(f"\n! {advice}")
        print(f"\nSaved in {out}")
    return 0


def _train(options: argparse.Namespace, record: RunFile) -> dict[str, Any]:
    out: Path = options.out
    say = _Say(options.quiet)
    say(f"loading {options.model}")
    lm = lm_room.load(options.model)
    hook_point = lm.hook_point(options.component, layer=options.layer)
    config = _config(options)
    sae = config.build(lm.d_model)
    fits = max(_BUFFER_BYTES // (4 * lm.d_model), options.batch_size)
    buffer_tokens = max(options.buffer_tokens or min(_BUFFER_TOKENS, fits), options.batch_size)
    text = TextSource(
        lm,
        Texts(options.dataset, options.text_field),
        options.context_size or default_context(lm),
        options.lm_batch_size,
        options.heldout_fraction,
    )
    resolved = {
        "sae": config.to_dict() | {"d_in": sae.d_in, "d_sae": sae.d_sae},
        "learning_rate": options.learning_rate or default_learning_rate(sae.d_sae),
        "dead_after": config.train.dead_after,
        "hook_name": str(hook_point),
        "context_size": text.context_size,
        "buffer_tokens": buffer_tokens,
    }
    record.update(config=resolved)
    text.heldout(1)  # no document in the split, no such file: found before the long part and not after

    say(
        f"reading activations of {hook_point}: d_in {sae.d_in}, d_sae {sae.d_sae}, {config.train.total_steps} steps"
    )
    stream = ModelActivations(lm, hook_point, lambda: text.train(options.max_tokens, options.seed))
    source = ShuffleBuffer(stream, batch_size=options.batch_size, capacity=buffer_tokens, seed=options.seed)
    start = time.perf_counter()
    result = fit(
        sae,
        source,
        config.train,
        checkpoint_dir=out / CHECKPOINTS,
        resume=options.resume,
        progress=not options.quiet,
    )
    seconds = time.perf_counter() - start
    say("evaluating on held-out text")
    metrics: dict[str, Any] = evaluate_in_model(lm, sae, hook_point, text.heldout(options.heldout_tokens))
    metrics |= {
        "train_tokens": result.state.tokens,
        "train_seconds": round(seconds, 3),
        "tokens_per_s": options.max_tokens / seconds,
    }
    known = {
        "model_name": options.model,
        "hook_name": str(hook_point),
        "dataset_path": options.dataset,
        "context_size": text.context_size,
        "prepend_bos": lm.bos_id is not None,
        "exclude_special_tokens": True,
        "evaluation": finite(metrics),
    }
    native.save(sae, out, metadata=known)
    if not options.keep_checkpoints:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    return metrics


def _config(options: argparse.Namespace) -> SAEConfig:
    return SAEConfig(
        expansion_factor=options.expansion_factor,
        architecture=options.rule,
        k=options.k,
        train=TrainConfig(
            total_tokens=options.max_tokens,
            batch_size=options.batch_size,
            seed=options.seed,
            precision=options.precision,
            checkpoint_every=options.checkpoint_every,
            log_every=max(1, min(100, -(-options.max_tokens // (20 * options.batch_size)))),
            optimizer=OptimizerConfig(learning_rate=options.learning_rate),
            loss=LossConfig(auxk=LossConfig.auxk if options.aux else None),
        ),
    )


def _claim(out: Path, resume: bool, restart: bool) -> None:
    """Settle what happens with what ``out`` holds."""
    saved = checkpoints(out / CHECKPOINTS)
    if resume and not saved:
        raise ValueError(f"[train] --resume needs a checkpoint but there is none in {out / CHECKPOINTS}.")
    if not saved or resume:
        return
    if not restart and read(out).get("status") != "done":
        raise ValueError(
            f"[train] {out} holds an unfinished run (checkpoint {saved[-1].name}): add --resume to go on with it, "
            "--restart to drop it, or choose another --out."
        )
    shutil.rmtree(out / CHECKPOINTS)


@contextlib.contextmanager
def _writable(out: Path):  # type: ignore[no-untyped-def]
    try:
        yield
    except OSError as e:
        raise OSError(
            f"[train] --out must be a folder that can be written but {out} gives: {e.strerror or e}."
        ) from e


class _Say:
    """Progress in words, on stderr."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    def __call__(self, words: str) -> None:
        if not self._quiet:
            print(terminal.clean(words), file=sys.stderr, flush=True)
