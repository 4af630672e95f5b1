"""Train an SAE on the bundled language model and see what it found, in a few minutes, with nothing to download.

The bundled model speaks a generated language that says of each token what it means, so the features have a ground
truth. DIR gets the SAE (cfg.json, sae_weights.safetensors, metadata.json), run.json, and report.html, a page that
needs nothing but itself.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxsae import lm as lm_room
from mlxsae.analysis import (
    Candidate,
    Detection,
    Example,
    Survey,
    detection_table,
    direct_effects,
    find_steering,
    survey,
)
from mlxsae.cli import options as kinds
from mlxsae.cli import terminal
from mlxsae.cli.run_file import RunFile, alone, fingerprint, writable
from mlxsae.data import ShuffleBuffer
from mlxsae.data.model_activations import ModelActivations
from mlxsae.io import atomic, native
from mlxsae.lm import HookPoint, LanguageModel, TokenBatch, tiny
from mlxsae.lm.tiny import world as tiny_world
from mlxsae.lm.tiny.language import token_rows
from mlxsae.metrics.in_model import evaluate_in_model
from mlxsae.report import (
    ConceptRow,
    DemoResults,
    FeatureCard,
    ShownExample,
    SteeredText,
    demo_page,
    share_detected,
)
from mlxsae.report.demo_page import GOOD_F1
from mlxsae.sae import SAE
from mlxsae.train import FitResult, LossConfig, OptimizerConfig, SAEConfig, TrainConfig, fit

# Few latents per token: with more, FVU is lower still, but fewer of them stand for one thing. A little whitening keeps
# latents in use that quiet directions need; with much of it the concepts of loud ones fall apart. The first 64 latents,
# which must do alone, take the broad concepts (women, colours); without them each word has a latent of its own.
K, EXPANSION_FACTOR, BATCH, LEARNING_RATE, WHITENING = 6, 8, 1024, 2e-3, 0.3
PREFIXES = (1 / 16, 1 / 4)
_ROWS, _BUFFER = 64, 131_072  # documents per pass of the model, activations held for shuffling
_SORTED = 50_000  # words of documents that are sorted by length, so that little is padded
_SHOWN, _EXAMPLES, _PROMPTS, _CANDIDATES = 10, 4, 16, 32
_MARKS = [tiny_world.TOKEN_ID[mark] for mark in tiny_world.SPECIALS]
_CAUSED = 0.05  # nats: a smaller effect is not worth a word
REPORT = "report.html"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=kinds.path, default=Path("out/demo"), help="folder to write (%(default)s)"
    )
    parser.add_argument("--seed", type=kinds.whole(0, 2**64 - 2), default=0, help="(%(default)s)")
    parser.add_argument("--tokens", type=kinds.whole(), default=1_000_000, help="to train on (%(default)s)")
    parser.add_argument(
        "--heldout-tokens", type=kinds.whole(), default=60_000, help="to evaluate on (%(default)s)"
    )
    parser.add_argument(
        "--port",
        type=kinds.whole(0, 65_535),
        help="then serve the report here, on this machine only; 0 picks one",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(options: argparse.Namespace) -> int:
    with alone("demo", options.out):
        return _run(options, options.out)


def _run(options: argparse.Namespace, out: Path) -> int:
    with writable("demo", out):
        record = RunFile(
            out,
            "demo",
            options.argv,
            seed=options.seed,
            options={name: getattr(options, name) for name in ("tokens", "heldout_tokens")},
            model=fingerprint(str(tiny.folder())) | {"name": "tiny"},
        )
    try:
        results, sae = _demonstrate(options)
        known = {"model_name": "tiny", "hook_name": results.hook_point, "context_size": tiny.CONTEXT}
        native.save(sae, out, metadata=known | {"evaluation": dict(results.metrics)})
        report = demo_page(results).encode()
        atomic.write_files(out, {REPORT: lambda file: atomic.void(file.write(report))})
    except BaseException as e:
        with contextlib.suppress(OSError):
            interrupted = isinstance(e, KeyboardInterrupt)
            record.finish("interrupted" if interrupted else "failed", error=f"{type(e).__name__}: {e}")
        raise
    summary = dict(results.metrics) | {
        "concepts": len(results.concepts),
        "concepts_detected": share_detected(results.concepts),
        "core_concepts": len(_core(results.concepts)),
        "core_concepts_detected": share_detected(_core(results.concepts)),
    }
    record.finish("done", results=summary, times=dict(results.facts))
    _show(results)
    print(f"\nThe report: {(out / REPORT).resolve().as_uri()}")
    print(f"The SAE:    {out.resolve()}")
    if options.port is not None:
        _serve(out, options.port)
    return 0


def _demonstrate(options: argparse.Namespace) -> tuple[DemoResults, SAE]:
    clock = _Clock(options.quiet)
    lm = lm_room.load("tiny")
    # The residual stream after half of the blocks.
    hook_point = lm.hook_point("resid", layer=(lm.n_layers - 1) // 2)
    clock.begin("training", f"{options.tokens:,} tokens at {hook_point}")
    seen: set[bytes] = set()
    result = _train(lm, hook_point, options, seen)

    clock.begin("evaluation", f"{options.heldout_tokens:,} held-out tokens")
    heldout = _heldout(options.heldout_tokens, options.seed + 1, seen)
    batches = [
        TokenBatch(mx.array(heldout.tokens[i : i + _ROWS]), mx.array(heldout.valid[i : i + _ROWS]))
        for i in range(0, len(heldout.tokens), _ROWS)
    ]
    metrics = evaluate_in_model(lm, result.sae, hook_point, batches)

    clock.begin("ground truth", f"{len(tiny.CONCEPTS)} concepts")
    found = survey(lm, result.sae, hook_point, batches)
    detections = detection_table(found, heldout.labels[heldout.valid])

    clock.begin("features", "examples and effects")
    told = most_telling(detections, _CANDIDATES)
    cards = _cards(lm, result.sae, hook_point, found, told)

    clock.begin("steering", "looking for a change that shows")
    steered = _steered(lm, result.sae, hook_point, found, cards, told, options.seed)
    clock.end()

    metrics |= {
        "train_tokens": result.state.tokens,
        "train_seconds": round(clock.seconds["training"], 1),
        "tokens_per_s": result.state.tokens / clock.seconds["training"],
    }
    concepts = [_concept(d) for d in detections]
    return (
        DemoResults(
            model=lm.name,
            hook_point=str(hook_point),
            metrics=metrics,
            history=result.history,
            fire_rate=found.statistics().fire_rate,
            features=cards[:_SHOWN],
            concepts=concepts,
            steered=steered,
            facts=[
                ("model", f"{lm.name}: {lm.n_layers} blocks of width {lm.d_model}"),
                (
                    "SAE",
                    f"Matryoshka TopK, k {K}, {result.sae.d_sae:,} latents (expansion {EXPANSION_FACTOR})",
                ),
                (
                    "training",
                    f"{result.state.tokens:,} tokens in {result.state.step:,} steps, seed {options.seed}",
                ),
                *((f"time: {name}", f"{seconds:.1f} s") for name, seconds in clock.seconds.items()),
            ],
        ),
        result.sae,
    )


def _train(
    lm: LanguageModel, hook_point: HookPoint, options: argparse.Namespace, seen: set[bytes]
) -> FitResult:
    """Activations stream from the model through the shuffling buffer into the trainer."""
    config = SAEConfig(
        k=K,
        expansion_factor=EXPANSION_FACTOR,
        train=TrainConfig(
            total_tokens=options.tokens,
            batch_size=BATCH,
            seed=options.seed,
            log_every=max(1, min(50, options.tokens // (40 * BATCH))),
            normalize="whiten",
            whitening=WHITENING,
            decoder_init="data",
            wake=0.001,
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, decay=0.2),
            loss=LossConfig(
                dead_after=max(1, options.tokens // 40), auxk="weakest", k_aux=32, prefixes=PREFIXES
            ),
        ),
    )
    needed = config.train.total_steps * BATCH
    stream = ModelActivations(lm, hook_point, lambda: _documents(needed, options.seed, seen))
    capacity = max(BATCH, min(_BUFFER, options.tokens))
    source = ShuffleBuffer(stream, batch_size=BATCH, capacity=capacity, seed=options.seed)
    return fit(config.build(lm.d_model), source, config.train, progress=not options.quiet)


def _documents(n_words: int, seed: int, seen: set[bytes]) -> Iterator[TokenBatch]:
    """Training documents of at least ``n_words``, one a row as the model knows them; ``seen`` remembers them."""
    documents = tiny.documents(sys.maxsize, seed)
    while n_words > 0:
        some: list[list[str]] = []
        wanted = min(_SORTED, n_words)
        while wanted > 0:
            some.append(next(documents))
            wanted -= len(some[-1])
            n_words -= len(some[-1])
        some.sort(key=len)
        tokens = token_rows(some)
        seen.update(row.tobytes() for row in tokens)
        for i in range(0, len(some), _ROWS):
            rows = tokens[i : i + _ROWS, : 2 + max(map(len, some[i : i + _ROWS]))]  # marks at both ends
            yield TokenBatch(mx.array(rows), mx.array(np.isin(rows, _MARKS, invert=True).tolist()))


def _heldout(n_tokens: int, seed: int, seen: set[bytes]) -> tiny.Labelled:
    """Labelled documents of another seed, without any that training has seen."""
    found = tiny.labelled(n_tokens, seed)
    new = np.array([row.tobytes() not in seen for row in found.tokens])
    return tiny.Labelled(*(part[new] for part in found))


def most_telling(detections: Sequence[Detection], n: int) -> list[Detection]:
    """The ``n`` detections that say most about their concepts in bits, each feature once; those with a good F1 first."""
    chosen: dict[int, Detection] = {}
    for detection in sorted(detections, key=lambda d: (d.f1 <= GOOD_F1, -d.information)):
        if detection.feature is not None and len(chosen) < n:
            chosen.setdefault(detection.feature, detection)
    return list(chosen.values())


def _cards(
    lm: LanguageModel, sae: SAE, hook_point: HookPoint, found: Survey, told: Sequence[Detection]
) -> list[FeatureCard]:
    statistics = found.statistics()
    cards = []
    for detection in told:
        feature = detection.feature
        assert feature is not None
        examples = found.top_examples(feature, _EXAMPLES)
        effects = direct_effects(lm, sae, hook_point, feature, examples)
        concept = tiny.CONCEPTS[detection.concept]
        cards.append(
            FeatureCard(
                feature,
                concept.description,
                [
                    f"{concept.name}: F1 {detection.f1:.3f}, {detection.information:.3f} bits per token.",
                    f"Fires on {statistics.fire_rate[feature]:.2%} of tokens, mean {statistics.mean[feature]:.2f}, "
                    f"at most {statistics.maximum[feature]:.2f}.",
                ],
                [(lm.token_to_str(e.token), e.change) for e in effects if e.change >= _CAUSED],
                [_shown(lm, example) for example in examples],
                float(statistics.maximum[feature]),
            )
        )
    return cards


def _shown(lm: LanguageModel, example: Example) -> ShownExample:
    return ShownExample([lm.token_to_str(int(t)) for t in example.tokens], example.activations.tolist())


def _concept(detection: Detection) -> ConceptRow:
    concept = tiny.CONCEPTS[detection.concept]
    return ConceptRow(concept.name, concept.description, *detection[1:7])


def _core(concepts: Sequence[ConceptRow]) -> list[ConceptRow]:
    names = set(tiny.core_concepts())
    return [c for c in concepts if c.name in names]


def _steered(
    lm: LanguageModel,
    sae: SAE,
    hook_point: HookPoint,
    found: Survey,
    cards: Sequence[FeatureCard],
    told: Sequence[Detection],
    seed: int,
) -> SteeredText | None:
    """A good detector that, set where its word stands in another meaning, changes how a document goes on."""
    mean = found.statistics().mean
    start = [] if lm.bos_id is None else [lm.bos_id]
    candidates = {}
    for detection in told:
        if detection.feature is not None and detection.f1 > GOOD_F1:
            candidates[detection.feature] = Candidate(
                float(mean[detection.feature]),
                list(found.followers(detection.feature, detection.threshold)),
                [start + words for words in found.contrasts(detection.feature, _PROMPTS, seed=seed)],
            )
    steering = find_steering(lm, sae, hook_point, candidates)
    if steering is None:
        return None
    return SteeredText(
        steering.feature,
        next(card.title for card in cards if card.feature == steering.feature),
        steering.strength,
        float(mean[steering.feature]),
        "at the last token of the prompt",
        steering.prompt,
        steering.before,
        steering.after,
    )


def _show(results: DemoResults) -> None:
    colour, room = terminal.has_colour(), max(40, min(terminal.width(), 120) - 4)
    print(terminal.metrics_table(dict(results.metrics)))

    print(f"\n{terminal.bold('The ten most telling features', colour)}, and where they fire")
    for card in results.features:
        gains = "  ".join(f"{piece.strip()} +{gain:.1f}" for piece, gain in card.promotes[:4])
        print(
            f"\n{terminal.bold(f'#{card.feature}', colour)} {card.title}  {terminal.dim(card.facts[0], colour)}"
        )
        if gains:
            print(terminal.dim(f"   makes likelier: {terminal.clean(gains)}", colour))
        for example in card.examples[:3]:
            peak = int(np.argmax(example.activations))
            shown = terminal.highlight(
                example.pieces, example.activations, card.maximum, colour, around=peak, room=room
            )
            print(f"   {shown}")

    good = sum(c.f1 > GOOD_F1 for c in results.concepts)
    print(f"\n{terminal.bold('Against the ground truth', colour)}: the best single feature for each concept")
    rows = [
        (
            c.name,
            "-" if c.feature is None else f"#{c.feature}",
            f"{c.f1:.3f}",
            f"{c.precision:.3f}",
            f"{c.recall:.3f}",
            c.positives,
        )
        for c in sorted(results.concepts, key=lambda c: -c.f1)
    ]
    print(
        terminal.table(
            rows, head=("concept", "feature", "F1", "precision", "recall", "tokens"), right=(1, 2, 3, 4, 5)
        )
    )
    print(f"F1 over {GOOD_F1}: {good} of {len(rows)} concepts ({share_detected(results.concepts):.0%})")
    core = _core(results.concepts)
    print(
        f"Of the {len(core)} that one direction tells in the model itself (see its card): "
        f"{sum(c.f1 > GOOD_F1 for c in core)} ({share_detected(core):.0%})"
    )

    print(f"\n{terminal.bold('Steering', colour)}")
    s = results.steered
    if s is None:
        print("No feature was found that changes what the model says and leaves it fluent.")
    else:
        print(
            f"#{s.feature} ({s.title}) set to {s.strength:.2f} {s.where}; its mean where it fires is {s.typical:.2f}"
        )
        print(f"   before: {s.prompt}{terminal.bold(s.before, colour)}")
        print(f"   after:  {s.prompt}{terminal.bold(s.after, colour)}")


def _serve(folder: Path, port: int) -> None:
    """The report over HTTP on this machine only, until Ctrl-C."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"Serving http://127.0.0.1:{server.server_port}/{REPORT} until Ctrl-C", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


class _Clock:
    """Times of the parts, each announced on stderr."""

    def __init__(self, quiet: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._quiet = quiet
        self._name = ""
        self._start = 0.0

    def begin(self, name: str, what: str) -> None:
        self.end()
        self._name, self._start = name, time.perf_counter()
        if not self._quiet:
            print(f"{name}: {what}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._name:
            self.seconds[self._name] = time.perf_counter() - self._start
        self._name = ""
