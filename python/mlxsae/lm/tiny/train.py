"""Train the bundled language model from nothing: ``python -m mlxsae.lm.tiny.train --out DIR``.

Writes an mlx-lm model folder (config, 16-bit weights, tokenizer) with its model card. The text is generated while
training, from documents that no evaluation prompt can be read off (`world.held_out`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import load

from . import world as w
from .concepts import CORE
from .evaluation import cross_entropy, evaluate, how_held
from .language import CONTEXT, documents, token_rows
from .tokenizer import write_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on, beside the versions of the libraries."""

    seed: int = 0
    steps: int = 6000
    batch: int = 32
    learning_rate: float = 2e-3
    warm_up: int = 100
    weight_decay: float = 0.4
    embedding_scale: float = 0.02
    d_model: int = 128
    layers: int = 4
    heads: int = 4
    d_mlp: int = 384

    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.d_model,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.d_mlp,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": CONTEXT,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "vocab_size": len(w.VOCABULARY),
            "bos_token_id": w.TOKEN_ID[w.BOS],
            "eos_token_id": w.TOKEN_ID[w.EOS],
            "pad_token_id": w.TOKEN_ID[w.PAD],
            "torch_dtype": "float16",
        }


def batches(recipe: Recipe) -> Iterator[mx.array]:
    """Endless training rows [batch, CONTEXT]; every batch from a seed of its own, so none repeats."""
    for step in itertools.count():
        seed = recipe.seed * 10_000_000 + step
        yield mx.array(token_rows(list(documents(recipe.batch, seed, "train"))))


def train(recipe: Recipe, progress: Callable[[int, float], None] | None = None) -> Model:
    """Train in float32 with AdamW and a cosine schedule; `progress` is told (step, loss in nats) after each step.

    Embeddings start small (standard deviation ``embedding_scale`` instead of MLX's ``d_model ** -0.5``) and weights are
    held small, so that what words have in common is learnt rather than drawn.
    """
    mx.random.seed(recipe.seed)
    model = Model(ModelArgs.from_dict(recipe.config()))
    embedding = model.model.embed_tokens
    embedding.weight = embedding.weight * (recipe.embedding_scale * recipe.d_model**0.5)
    cosine = optim.cosine_decay(recipe.learning_rate, max(recipe.steps - recipe.warm_up, 1))
    schedule = optim.join_schedules(
        [optim.linear_schedule(0.0, recipe.learning_rate, recipe.warm_up), cosine], [recipe.warm_up]
    )
    # norms are not decayed: towards zero they would only fight the loss
    optimizer = optim.MultiOptimizer(
        [
            optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=recipe.weight_decay, bias_correction=True),
            optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.0, bias_correction=True),
        ],
        [lambda _, parameter: parameter.ndim > 1],
    )
    step_loss = value_and_grad(model, cross_entropy)
    for step, tokens in enumerate(itertools.islice(batches(recipe), recipe.steps)):
        loss, gradients = step_loss(model, tokens)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        if progress is not None:
            progress(step, loss.item())
    return model


def save(model: Model, recipe: Recipe, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` (float16) and the tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(recipe.config(), indent=1) + "\n", encoding="utf-8")
    weights = tree_map(lambda p: p.astype(mx.float16), model.parameters())
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(weights)), metadata={"format": "mlx"}
    )
    write_tokenizer(folder, CONTEXT)


def card(recipe: Recipe, folder: Path, seconds: float) -> dict[str, Any]:
    """The content of ``card.json``: how the folder was made, what its model can do and which concepts it holds."""
    model, tokenizer = load(str(folder))[:2]  # judged as written, rounded weights and all
    model.set_dtype(mx.float32)
    middle = recipe.layers // 2 - 1
    options = asdict(recipe)
    changed = [f" --{k.replace('_', '-')} {v}" for k, v in options.items() if v != getattr(Recipe, k)]
    return {
        "command": "python -m mlxsae.lm.tiny.train --out DIR" + "".join(changed),
        "recipe": options,
        "parameters": sum(weight.size for weight in dict(tree_flatten(model.parameters())).values()),
        "vocabulary": len(w.VOCABULARY),
        "context": CONTEXT,
        "training_tokens_with_padding": recipe.steps * recipe.batch * CONTEXT,
        "training_seconds": round(seconds),
        "mlx": version("mlx"),
        "held_out": {name: round(score, 4) for name, score in evaluate(model, tokenizer).items()},
        "hook_point": f"blocks.{middle}.hook_resid_post",
        "concepts": {
            name: {key: round(value, 3) for key, value in held._asdict().items()}
            for name, held in how_held(model, middle).items()
        },
    }


def card_text(facts: dict[str, Any]) -> str:
    """`card` as ``MODEL_CARD.md``."""
    scores = dict(facts["held_out"])
    loss = scores.pop("loss")
    recipe, concepts = facts["recipe"], facts["concepts"]
    table = "\n".join(f"| {task.replace('_', ' ')} | {100 * score:.1f} % |" for task, score in scores.items())
    readable = sum(concept["probe_f1"] > 0.9 for concept in concepts.values())
    core = sum(concept["direction_f1"] > CORE for concept in concepts.values())
    held = "\n".join(
        f"| {name} | {concept['probe_f1']:.2f} | {concept['direction_f1']:.2f} | {concept['common']:.2f} |"
        for name, concept in sorted(concepts.items(), key=lambda item: -item[1]["direction_f1"])
    )
    return f"""# The tiny language model of mlxsae

A llama-type transformer with {recipe["layers"]} layers, width {recipe["d_model"]}, {recipe["heads"]} heads and
{facts["parameters"]:,} parameters (float16), a vocabulary of {facts["vocabulary"]} words and a context of
{facts["context"]} tokens. It knows one thing: a generated language about {len(w.PEOPLE)} people,
{len(w.CAPITALS)} countries and what lies in their boxes. The language labels its own tokens, so what a sparse
autoencoder finds in here can be checked.

Made by `{facts["command"]}` ({facts["training_tokens_with_padding"] / 1e6:.1f} million tokens with padding,
{facts["training_seconds"] / 60:.0f} minutes on two CPU cores shared with other work, MLX {facts["mlx"]}).

## What it has learnt

Accuracy on prompts whose combination (two people and a place, phrasing and country, subject and the noun between, ...)
never occurs in training text. An answer counts only if it is the likeliest word of the whole vocabulary; for agreement,
where the choice of the verb is free, if the verb is likelier than the same verb in the other number.

| task | accuracy |
|---|---|
{table}

Cross-entropy on held-out documents: {loss:.3f} nats a token. Repeat the table with
`python -m mlxsae.lm.tiny.evaluation`.

## Which concepts it holds

The language labels {len(concepts)} concepts. Measured at `{facts["hook_point"]}`, without any sparse autoencoder:

- *probe*: F1 of a linear probe on other documents than it was fitted on. {readable} concepts are readable (over 0.9).
- *direction*: the same F1 of one direction, m, the mean of the concept's activations less the mean of all, with the best
  threshold on the documents that m is from. One direction and a threshold are all that a feature has, so the {core}
  concepts with more than {CORE} are those that a single feature can be asked for; these are the *core* concepts.
- *common*: of what sets the concept's tokens apart from the average token, the share that they have in common:
  |m|^2 / (|m|^2 + v), v their mean squared distance from their own mean.

| concept | probe | direction | common |
|---|---|---|---|
{held}

## Limits

It has never seen a word outside its vocabulary (they become `<unk>`), a text longer than its context, or a fact about
the real world beyond {len(w.CAPITALS)} capitals. It is an instrument for testing interpretability tools, not a language
model to use.
"""


def write_card(recipe: Recipe, folder: Path, seconds: float) -> dict[str, Any]:
    """Judge the model in `folder` and write ``card.json`` and ``MODEL_CARD.md`` beside it."""
    facts = card(recipe, folder, seconds)
    (folder / "card.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (folder / "MODEL_CARD.md").write_text(card_text(facts), encoding="utf-8")
    return facts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    for name, default in asdict(Recipe()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help="(%(default)s)"
        )
    options = vars(parser.parse_args(arguments))
    out: Path = options.pop("out")
    recipe = Recipe(**options)
    start = time.perf_counter()

    def progress(step: int, loss: float) -> None:
        if step % 50 == 0 or step == recipe.steps - 1:
            print(f"step {step:5d}  loss {loss:.4f}  {time.perf_counter() - start:6.0f} s", flush=True)

    model = train(recipe, progress)
    seconds = time.perf_counter() - start
    save(model, recipe, out)
    print(card_text(write_card(recipe, out, seconds)))


if __name__ == "__main__":
    main()
