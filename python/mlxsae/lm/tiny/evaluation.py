"""How well a language model has learnt the tiny language, on prompts whose combinations training never showed.

``python -m mlxsae.lm.tiny.evaluation [FOLDER]`` prints the numbers of a model folder, by default the bundled one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn
from mlx.nn import losses

from . import world as w
from .concepts import CONCEPTS, labelled
from .language import FORCED, TASKS, Split, documents, prompts, token_rows


def cross_entropy(model: nn.Module, tokens: mx.array) -> mx.array:
    """Mean next-token cross-entropy in nats over all targets that are not padding; tokens [b, t]."""
    targets = tokens[:, 1:]
    counted = targets != w.TOKEN_ID[w.PAD]
    each = losses.cross_entropy(model(tokens[:, :-1]).astype(mx.float32), targets)
    return (each * counted).sum() / counted.sum()


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
    right = np.array([w.TOKEN_ID[prompt.answer] for prompt in asked])
    wrong = np.array([w.TOKEN_ID[prompt.wrong] for prompt in asked])
    if task in FORCED:
        return float(np.mean(logits.argmax(-1) == right))
    return float(np.mean(logits[each, right] > logits[each, wrong]))


class Held(NamedTuple):
    """How a model holds a concept in its residual stream, told without any sparse autoencoder."""

    probe_f1: float
    """F1 of a logistic regression, fitted on some documents and judged on others: can it be read off at all?"""
    direction_f1: float
    """The same of ``<x, m> >= t``, m the mean activation of the concept's tokens less that of all, t the best threshold on
    the documents that m is from: can one direction tell it, as a single feature does?"""
    common: float
    """``|m|^2 / (|m|^2 + v)``: of what sets the concept's tokens apart from the average token, the share that they have
    in common, v their mean squared distance from their own mean. Where it is small they differ more than they agree."""


def how_held(
    model: Any, layer: int, n_tokens: int = 30_000, seed: int = 1, steps: int = 150
) -> dict[str, Held]:
    """`Held` for each concept, from the residual stream after block `layer` on `n_tokens` words, twice."""
    (x, y), (x_test, y_test) = (_residual(model, layer, n_tokens, s) for s in (seed, seed + 1))
    mean, scale = x.mean(0), x.std(0)
    common, direction = {}, {}
    for i, concept in enumerate(CONCEPTS):
        own = x[y[:, i]]
        m = own.mean(0) - mean
        common[concept.name] = float(m @ m / (m @ m + np.square(own - own.mean(0)).sum(1).mean()))
        direction[concept.name] = _f1(x_test @ m >= _best_cut(x @ m, y[:, i]), y_test[:, i])

    inputs, inputs_test = (
        mx.array(np.c_[(part - mean) / scale, np.ones(len(part), np.float32)]) for part in (x, x_test)
    )
    labels = mx.array(y.astype(np.float32))

    def loss(weight: mx.array) -> mx.array:
        fit = losses.binary_cross_entropy(inputs @ weight, labels, with_logits=True, reduction="none")
        return fit.mean(0).sum() + 1e-6 * weight.square().sum()

    weights = {"w": mx.zeros((inputs.shape[1], labels.shape[1]))}
    gradient, optimizer = mx.grad(loss), optim.Adam(optim.cosine_decay(0.3, steps))
    for _ in range(steps):
        weights = optimizer.apply_gradients({"w": gradient(weights["w"])}, weights)
        mx.eval(weights, optimizer.state)
    scores, scores_test = (np.asarray(part @ weights["w"]) for part in (inputs, inputs_test))
    held = {}
    for i, concept in enumerate(CONCEPTS):
        cut = max(np.linspace(-3, 3, 25), key=lambda cut: _f1(scores[:, i] > cut, y[:, i]))
        probe = _f1(scores_test[:, i] > cut, y_test[:, i])
        held[concept.name] = Held(probe, direction[concept.name], common[concept.name])
    return held


def _best_cut(scores: np.ndarray, carries: np.ndarray) -> float:
    """The score from which on saying yes has the best F1."""
    order = np.argsort(-scores)
    hits = np.cumsum(carries[order])
    return float(scores[order][np.argmax(hits / (np.arange(1, len(order) + 1) + hits[-1]))])


def _residual(model: Any, layer: int, n_tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations [n, d_model] after a block and their labels [n, concepts]."""
    text = labelled(n_tokens, seed)
    parts = []
    for start in range(0, len(text.tokens), 64):
        hidden = model.model.embed_tokens(mx.array(text.tokens[start : start + 64]))
        for block in model.layers[: layer + 1]:
            hidden = block(hidden, "causal")
        parts.append(np.asarray(hidden.astype(mx.float32)))
    return np.concatenate(parts)[text.valid], text.labels[text.valid]


def _f1(says: np.ndarray, carries: np.ndarray) -> float:
    return float(2 * (says & carries).sum() / max(says.sum() + carries.sum(), 1))


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
