"""How good dictionaries become, ours and the peers': the same activations in the same order, one evaluator, three seeds.

``python -m benchmarks.peers.quality activations --data DIR --acts DIR`` stores the activations of the two language models in
``DIR`` (folders ``babyllama105`` and ``stories260K`` beside ``text/tinystories_val.json``); ``train --acts DIR`` trains what the
results lack, run by run, each stored when it is done; ``table --write`` renders ``docs/architectures.md``. Peers want the
environment of ``requirements-peers.txt``.

Everyone gets activations scaled to a mean norm of ``sqrt(d)`` and batches of 1,024 rows. Ours are trained as ``SAEConfig()``
says, on both models alike. Peers get a warm-up over the first 5 % of steps, a linear decay over the last 20 %, the one of
:data:`RATES` that is best, and else their defaults, which two changes improve on for SAELens: latents count as dead after
:data:`DEAD_STEPS` silent steps (its 1,000 are half of such a run), and ``b_dec`` starts at the data's mean, not at 0.

Our defaults were chosen on the first half of the held-out rows. All are judged on the second, by an evaluator that knows
nothing but weights. TopK keeps the k largest latents of a token, BatchTopK the ``k n`` largest of each 1,024
held-out tokens, whose L0 is therefore equal too; a latent is dead if it fires on no held-out token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import machine

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
DOC = ROOT / "docs" / "architectures.md"
BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"
TOKENS, HELDOUT, BATCH, SEEDS = 2_000_000, 200_000, 1024, (0, 1, 2)
STEPS = -(-TOKENS // BATCH)
WARMUP, DECAY = round(0.05 * STEPS), round(0.2 * STEPS)
DEAD_STEPS = 100
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
"""Learning rates that peers are tried at."""


class Setting(NamedTuple):
    """A residual stream in the middle of a model, and the dictionary for it."""

    layer: int
    d_sae: int
    k: int


SETTINGS = {"babyllama105": Setting(2, 2048, 32), "stories260K": Setting(2, 1024, 16)}


class Dictionary(NamedTuple):
    """``x_hat = sum_i a_i W_dec_i + b_dec`` with ``a`` the chosen of ``relu(W_enc (x - b_dec) + b_enc)``; rows of ``w_dec`` have
    norm 1. Float32 ``[d_sae, d_in]`` and vectors.
    """

    w_enc: np.ndarray
    b_enc: np.ndarray
    w_dec: np.ndarray
    b_dec: np.ndarray


Batches = Iterator[np.ndarray]
Train = Callable[[Setting, int, "np.ndarray", int, float | None], Dictionary]


def batches(x: np.ndarray, seed: int) -> Batches:
    from mlxsae.data import ArraySource

    source = ArraySource(x, batch_size=BATCH, seed=seed)
    for _ in range(STEPS):
        batch = source.next_batch()
        assert batch is not None
        yield np.array(batch[0])


@contextlib.contextmanager
def quick_selection() -> Iterator[None]:
    """``torch.topk`` of a flattened batch, many times faster and with the same result: it is asked of those values only that lie
    over a bound under the kth, which a sample of the batch suggests. Peers' BatchTopK spends most of its step there.
    """
    import torch

    plain = torch.topk, torch.Tensor.topk

    def topk(x: Any, k: int, *args: Any, **options: Any) -> Any:
        k = int(k)  # dictionary_learning passes a tensor of 32 bits, which the product below would overflow
        if x.ndim != 1 or len(x) < 2**16:
            return plain[1](x, k, *args, **options)
        sample = x.detach()[:: len(x) // 2**14]
        bound = plain[1](sample, min(len(sample), 32 + 5 * k * len(sample) // (4 * len(x)))).values[-1]
        among = (x.detach() > bound).nonzero()[:, 0]
        if len(among) < k:
            return plain[1](x, k, *args, **options)
        found = plain[1](x[among], k, *args, **options)
        return torch.return_types.topk((found.values, among[found.indices]))

    try:
        torch.topk = torch.Tensor.topk = topk  # type: ignore[assignment]
        yield
    finally:
        torch.topk, torch.Tensor.topk = plain  # type: ignore[assignment]


def saelens(rule: str) -> Train:
    def train(s: Setting, d_in: int, x: np.ndarray, seed: int, rate: float | None) -> Dictionary:
        import torch
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.saes import batchtopk_sae, topk_sae
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(seed)
        common: dict[str, Any] = {"d_in": d_in, "d_sae": s.d_sae, "device": "cpu"}
        if rule == "topk":
            sae = topk_sae.TopKTrainingSAE(topk_sae.TopKTrainingSAEConfig(k=s.k, **common))
        else:
            sae = batchtopk_sae.BatchTopKTrainingSAE(
                batchtopk_sae.BatchTopKTrainingSAEConfig(k=s.k, **common)
            )
        assert rate is not None
        sae.b_dec.data[:] = torch.from_numpy(x[:8192].mean(axis=0))
        config = SAETrainerConfig(
            total_training_samples=STEPS * BATCH,
            train_batch_size_samples=BATCH,
            lr=rate,
            lr_end=0.0,
            lr_warm_up_steps=WARMUP,
            lr_decay_steps=DECAY,
            dead_feature_window=DEAD_STEPS,
            logger=LoggingConfig(log_to_wandb=False),
        )
        with quick_selection():
            SAETrainer(config, sae, data_provider=map(torch.from_numpy, batches(x, seed))).fit()
        w_enc, b_enc, w_dec, b_dec = (
            p.detach().numpy() for p in (sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec)
        )
        norm = np.linalg.norm(w_dec, axis=1)  # it ranks latents by their value times this
        return Dictionary(w_enc * norm[:, None], b_enc * norm, w_dec / norm[:, None], b_dec)

    return train


def dictionary_learning(rule: str) -> Train:
    def train(s: Setting, d_in: int, x: np.ndarray, seed: int, rate: float | None) -> Dictionary:
        import torch
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer

        trainer = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[rule](
            steps=STEPS,
            activation_dim=d_in,
            dict_size=s.d_sae,
            k=s.k,
            layer=s.layer,
            lm_name="none",
            lr=rate,
            warmup_steps=WARMUP,
            decay_start=STEPS - DECAY,
            seed=seed,
            device="cpu",
        )
        with quick_selection():
            for step, batch in enumerate(batches(x, seed)):
                trainer.update(step, torch.from_numpy(batch))
        ae = trainer.ae
        parts = (ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T, ae.b_dec)
        return Dictionary(*(p.detach().numpy() for p in parts))

    return train


def ours(rule: str) -> Train:
    def train(s: Setting, d_in: int, x: np.ndarray, seed: int, rate: float | None) -> Dictionary:
        from mlxsae.train import SAEConfig, TrainConfig, train_sae_from_activations

        run = TrainConfig(total_tokens=TOKENS, batch_size=BATCH, seed=seed)
        config = SAEConfig(d_sae=s.d_sae, architecture=rule, k=s.k, train=run)
        sae = train_sae_from_activations(x, config).sae
        parts = (sae.encoder.weight, sae.encoder.bias, sae.decoder.weight, sae.decoder.bias)
        w_enc, b_enc, w_dec, b_dec = (np.array(p) for p in parts)
        norm = np.linalg.norm(w_dec, axis=1)  # 1 up to what folding the data's scale did
        return Dictionary(w_enc * norm[:, None], b_enc * norm, w_dec / norm[:, None], b_dec)

    return train


class Contestant(NamedTuple):
    title: str
    rule: str
    train: Train
    rates: tuple[float | None, ...] = RATES


CONTESTANTS = {
    "ours-topk": Contestant("mlxsae", "topk", ours("topk"), (None,)),
    "saelens-topk": Contestant("SAELens", "topk", saelens("topk")),
    "dictionary_learning-topk": Contestant("dictionary_learning", "topk", dictionary_learning("topk")),
    "ours-batchtopk": Contestant("mlxsae", "batchtopk", ours("batchtopk"), (None,)),
    "saelens-batchtopk": Contestant("SAELens", "batchtopk", saelens("batchtopk")),
    "dictionary_learning-batchtopk": Contestant(
        "dictionary_learning", "batchtopk", dictionary_learning("batchtopk")
    ),
}
RULES = {"topk": "TopK", "batchtopk": "BatchTopK"}


def evaluate(d: Dictionary, x: np.ndarray, k: int, rule: str) -> dict[str, float]:
    """FVU, L0 and dead fraction of a dictionary on ``x [n, d_in]``, sums in float64."""
    mean, fired = x.mean(axis=0, dtype=np.float64), np.zeros(len(d.b_enc), np.int64)
    error = scatter = 0.0
    for begin in range(0, len(x), BATCH):
        rows = x[begin : begin + BATCH]
        z = np.maximum((rows - d.b_dec) @ d.w_enc.T + d.b_enc, 0)
        if rule == "topk":
            lowest = np.partition(z, -k, axis=1)[:, -k, None]
        else:
            lowest = np.partition(z, -k * len(rows), axis=None)[-k * len(rows)]
        z[z < lowest] = 0
        fired += (z > 0).sum(axis=0)
        error += float(np.square(rows - d.b_dec - z @ d.w_dec, dtype=np.float64).sum())
        scatter += float(np.square(rows - mean).sum())
    return {"fvu": error / scatter, "l0": fired.sum() / len(x), "dead_fraction": float((fired == 0).mean())}


def store_activations(data: Path, out: Path) -> None:
    """``{model}-train.npy`` and ``{model}-heldout.npy``: float32 ``[n, d_in]`` of mean norm ``sqrt(d_in)``, from disjoint stories."""
    from mlxsae import lm as lm_room
    from mlxsae.data import ModelActivations

    texts = list(lm_room.read_texts(data / "text" / "tinystories_val.json"))
    out.mkdir(parents=True, exist_ok=True)
    for model, s in SETTINGS.items():
        lm, scale = lm_room.load(data / model), 0.0
        point = lm.hook_point("resid", layer=s.layer)
        for split, most in (("train", TOKENS), ("heldout", HELDOUT)):

            def text(lm: Any = lm, split: str = split, most: int = most) -> Iterator[Any]:
                sizes = {"context_size": 256, "batch_size": 32, "max_tokens": most}
                return lm_room.token_batches(lm, texts, split=split, seed=0, **sizes)

            chunks = ModelActivations(lm, point, text)
            x = np.concatenate([np.array(c.x, np.float32)[np.array(c.valid)] for c in chunks])
            scale = scale or math.sqrt(x.shape[1]) / float(np.linalg.norm(x, axis=1).mean())
            np.save(out / f"{model}-{split}.npy", x * np.float32(scale))


def load() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}


def measure(acts: Path, models: list[str], names: list[str], seeds: list[int], rates: list[float]) -> None:
    for model in models:
        x = np.load(acts / f"{model}-train.npy", mmap_mode="r")
        heldout, s = np.load(acts / f"{model}-heldout.npy"), SETTINGS[model]
        heldout = heldout[len(heldout) // 2 :]
        for seed in seeds:
            for name in names:
                contestant = CONTESTANTS[name]
                for rate in contestant.rates:
                    if rate is not None and rates and rate not in rates:
                        continue
                    what = {"model": model, "contestant": name, "seed": seed, "rate": rate}
                    if any(what.items() <= run.items() for run in load()["runs"]):
                        continue
                    start = time.perf_counter()
                    trained = contestant.train(s, x.shape[1], x, seed, rate)
                    what["seconds"] = round(time.perf_counter() - start, 1)
                    what |= evaluate(trained, heldout, s.k, contestant.rule)
                    _append(what, {model: {"train": len(x), "heldout": len(heldout)}})
                    print(what, flush=True)


def _append(run: dict[str, Any], rows: dict[str, Any]) -> None:
    packages = ("dictionary-learning", "mlx", "mlxsae", "sae-lens", "torch")
    results = load()  # anew: another process may have written since
    results["machine"] = machine.describe(machine.cores())
    results["versions"] = results.get("versions", {}) | machine.versions(*packages)
    results["rows"] = results.get("rows", {}) | rows
    results["runs"].append(run)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


class Score(NamedTuple):
    """A contestant's runs on a model at its best learning rate."""

    fvu: float
    error: float
    """Standard error of the mean."""
    l0: float
    dead: float
    rate: float | None
    seeds: int
    tried: tuple[float, ...] = ()
    """All learning rates that have been measured."""


def score(results: dict[str, Any], model: str, name: str) -> Score | None:
    """None where nothing was measured."""
    found = []
    for rate in CONTESTANTS[name].rates:
        wanted = {"model": model, "contestant": name, "rate": rate}
        runs = [run for run in results["runs"] if wanted.items() <= run.items()]
        if runs:
            fvu, l0, dead = ([run[key] for run in runs] for key in ("fvu", "l0", "dead_fraction"))
            spread = statistics.stdev(fvu) / math.sqrt(len(fvu)) if len(fvu) > 1 else math.nan
            mean = statistics.mean
            found.append(Score(mean(fvu), spread, mean(l0), mean(dead), rate, len(runs)))
    tried = tuple(sorted(s.rate for s in found if s.rate is not None))
    found = [s._replace(tried=tried) for s in found]
    # Seed 0 decides which rate the other seeds are spent on: one that was given up there is no contender.
    return min((s for s in found if s.seeds == max(f.seeds for f in found)), default=None)


def table(results: dict[str, Any]) -> str:
    lines = [
        "| activations | rule | trained by | FVU | L0 | dead | learning rate | seeds |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for model, s in SETTINGS.items():
        for rule, title in RULES.items():
            names = [name for name, c in CONTESTANTS.items() if c.rule == rule]
            for name in names:
                if (found := score(results, model, name)) is not None:
                    error = "" if math.isnan(found.error) else f" ± {found.error:.5f}"
                    of = f" (of {', '.join(f'{r:g}' for r in found.tried)})" if len(found.tried) > 1 else ""
                    rate = "default" if found.rate is None else f"{found.rate:g}{of}"
                    lines.append(
                        f"| {model}, layer {s.layer}, {s.d_sae:,} latents, k {s.k} | {title} | {CONTESTANTS[name].title} | "
                        f"{found.fvu:.5f}{error} | {found.l0:.1f} | {found.dead:.2%} | {rate} | {found.seeds} |"
                    )
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    return "\n".join(
        [
            f"Mean and standard error over seeds; {TOKENS:,} training tokens, the same in the same order for "
            "all; one evaluator, held-out rows on which nothing was tuned. Peers: a warm-up over 5 % and a linear decay over "
            f"20 % of the steps, for SAELens AuxK for what was silent for {DEAD_STEPS} steps and b_dec from the data's mean; else their "
            f"defaults. {versions}.",
            "",
            *lines,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    store = commands.add_parser("activations", help="store what all train on")
    store.add_argument("--data", type=Path, required=True)
    store.add_argument("--acts", type=Path, required=True)
    train = commands.add_parser("train", help="train what the results lack")
    train.add_argument("--acts", type=Path, required=True)
    train.add_argument("--model", action="append", choices=SETTINGS, help="default: both")
    train.add_argument("--only", action="append", choices=CONTESTANTS, help="default: all")
    train.add_argument("--seed", action="append", type=int, help=f"default: {SEEDS}")
    train.add_argument("--rate", action="append", type=float, help=f"peers' learning rates; default: {RATES}")
    show = commands.add_parser("table", help="print the table")
    show.add_argument("--write", action="store_true", help="put it into the docs")
    o = parser.parse_args()
    if o.command == "activations":
        store_activations(o.data, o.acts)
    elif o.command == "train":
        models, names = o.model or list(SETTINGS), o.only or list(CONTESTANTS)
        measure(o.acts, models, names, o.seed or list(SEEDS), o.rate or [])
    elif not o.write:
        print(table(load()))
    else:
        text = DOC.read_text()
        before, after = text.split(BEGIN, 1)[0], text.split(END, 1)[1]
        DOC.write_text(f"{before}{BEGIN}\n{table(load())}\n{END}{after}")


if __name__ == "__main__":
    main()
