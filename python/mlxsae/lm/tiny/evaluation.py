"""How well a language model has learnt the tiny language, on prompts whose combinations training never showed.

``python -m mlxsae.lm.tiny.evaluation [FOLDER]`` prints the numbers of a model folder, by default the bundled one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from . import world as w
from .language import FORCED, TASKS, Split, documents, prompts, token_rows


def cross_entropy(model: nn.Module, tokens: mx.array) -> mx.array:
    """Mean next-token cross-entropy in nats over all targets that are not padding; tokens [b, t]."""
    targets = tokens[:, 1:]
    counted = targets != w.TOKEN_ID[w.PAD]
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]).astype(mx.float32), targets)
    return (losses * counted).sum() / counted.sum()


def evaluate(
    model: Any, tokenizer: Any, n: int = 200, split: Split = "held_out", seed: int = 0
) -> dict[str, float]:
    """Accuracy per task on at most `n` prompts each, and ``loss``, the cross-entropy (nats) on 256 documents.

    A prompt is solved if, of the whole vocabulary, the answer is the likeliest next word; in tasks outside `FORCED`
    (agreement), if the answer is likelier than the same verb in the other number.
    """
    accuracy = {task: _accuracy(model, tokenizer, task, n, split, seed) for task in TASKS}
    held = mx.array(token_rows(list(documents(256, seed, split))))
    return accuracy | {"loss": float(cross_entropy(model, held))}


def _accuracy(model: Any, tokenizer: Any, task: str, n: int, split: Split, seed: int) -> float:
    asked = prompts(task, split, n, seed)
    encoded = [tokenizer.encode(prompt.text) for prompt in asked]
    # causal attention: padding on the right changes nothing before it
    padded = np.full((len(asked), max(map(len, encoded))), w.TOKEN_ID[w.PAD], np.int32)
    for row, ids in zip(padded, encoded, strict=True):
        row[: len(ids)] = ids
    logits = model(mx.array(padded))[mx.arange(len(asked)), mx.array([len(ids) - 1 for ids in encoded])]
    logits = np.asarray(logits.astype(mx.float32))
    each = np.arange(len(asked))
    right, wrong = (
        np.array([w.TOKEN_ID[word] for word in words]) for words in zip(*((p.answer, p.wrong) for p in asked))
    )
    if task in FORCED:
        return float(np.mean(logits.argmax(-1) == right))
    return float(np.mean(logits[each, right] > logits[each, wrong]))


def main(arguments: list[str] | None = None) -> None:
    from mlx_lm.utils import load

    from . import folder

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=folder(), help="an mlx-lm model folder")
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out")
    chosen = parser.parse_args(arguments)
    model, tokenizer = load(str(chosen.folder))[:2]
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)  # 16-bit products are slow on a CPU
    print(json.dumps(evaluate(model, tokenizer, split=chosen.split), indent=1))


if __name__ == "__main__":
    main()
