"""The report of ``mlxsae demo``: one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlxsae.report.features import FeatureCard, feature_card
from mlxsae.report.html import Markup, details, element, figure, page, section, table
from mlxsae.report.svg import bar_chart, histogram, line_plot

GOOD_F1 = 0.9


class ConceptRow(NamedTuple):
    """How well the best single feature detects one labelled concept; ``feature`` None where it is too rare to say."""

    name: str
    description: str
    feature: int | None
    threshold: float
    f1: float
    precision: float
    recall: float
    positives: int


class SteeredText(NamedTuple):
    feature: int
    title: str
    strength: float
    typical: float  # the feature's mean where it fires
    where: str
    prompt: str
    before: str
    after: str


class DemoResults(NamedTuple):
    model: str
    hook_point: str
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, Any]]  # records of the trainer
    fire_rate: np.ndarray  # [d_sae]
    features: Sequence[FeatureCard]
    concepts: Sequence[ConceptRow]
    steered: SteeredText | None
    facts: Sequence[tuple[str, str]]  # how it was made


def share_detected(concepts: Sequence[ConceptRow]) -> float:
    """Share of all concepts, those too rare to judge included, that a single feature detects with F1 over 0.9."""
    return sum(c.f1 > GOOD_F1 for c in concepts) / max(len(concepts), 1)


def demo_page(results: DemoResults) -> str:
    """The whole page as HTML."""
    sections = [
        ("summary", "Summary", _summary(results)),
        ("training", "Training", _training(results)),
        ("features", "Ten telling features", _features(results)),
        ("truth", "Against the ground truth", _truth(results)),
        ("steering", "Steering", _steering(results)),
        ("made", "How it was made", _made(results)),
    ]
    return page(
        "A sparse autoencoder on a tiny language model",
        *(section(title, *content, anchor=anchor) for anchor, title, content in sections),
        contents=[(anchor, title) for anchor, title, _ in sections],
    )


def _summary(r: DemoResults) -> list[Markup]:
    m = r.metrics
    figures = [
        ("fraction of variance unexplained", f"{m['fvu']:.4f}"),
        ("loss recovered (mean ablation)", f"{m['loss_recovered_mean']:.4f}"),
        ("loss recovered (zero ablation)", f"{m['loss_recovered_zero']:.4f}"),
        ("latents per token (L0)", f"{m['l0']:.1f}"),
        ("dead latents", f"{m['dead_fraction']:.2%}"),
        ("concepts with F1 over 0.9", f"{share_detected(r.concepts):.0%} of {len(r.concepts)}"),
    ]
    boxes = [element("div", element("dt", name), element("dd", value)) for name, value in figures]
    return [
        element(
            "p",
            f"The model {r.model} was read at {r.hook_point}. All figures are from {int(m['n_tokens']):,} tokens of "
            "documents that the autoencoder was not trained on.",
        ),
        element("dl", *boxes, class_="figures"),
    ]


def _training(r: DemoResults) -> list[Markup]:
    tokens = [record["tokens"] for record in r.history]

    def curve(key: str) -> tuple[list[float], list[float]]:
        return tokens, [float(record.get(key, float("nan"))) for record in r.history]

    plots = [
        figure(
            line_plot({"FVU": curve("fvu")}, title="FVU while training", x_label="tokens", log_y=True),
            "Fraction of variance unexplained on the batch in hand, logarithmic.",
        ),
        figure(
            line_plot(
                {"dead": curve("dead_fraction")}, title="Dead latents while training", x_label="tokens"
            ),
            "Share of latents that have been silent for long.",
        ),
        figure(
            histogram(
                r.fire_rate,
                title="How often latents fire",
                x_label="share of tokens on which a latent fires (logarithmic)",
                log_x=True,
            ),
            f"Activation density of {len(r.fire_rate):,} latents on held-out text; "
            f"{int((r.fire_rate == 0).sum()):,} never fired there and are left out.",
        ),
    ]
    return [element("div", *plots, class_="plots")]


def _features(r: DemoResults) -> list[Markup]:
    return [
        element(
            "p",
            "The features that say most about the text, in bits per token about the concept that each detects best. "
            "Examples are the held-out documents in which each fires most strongly; the darker, the stronger.",
        ),
        element("div", *(feature_card(card) for card in r.features), class_="cards"),
    ]


def _truth(r: DemoResults) -> list[Markup]:
    ranked = sorted(r.concepts, key=lambda c: -c.f1)
    detected = sum(c.f1 > GOOD_F1 for c in r.concepts)
    rows = [
        (
            c.name,
            c.description,
            "too rare" if c.feature is None else f"#{c.feature}",
            f"{c.threshold:.2f}",
            f"{c.f1:.3f}",
            f"{c.precision:.3f}",
            f"{c.recall:.3f}",
            f"{c.positives:,}",
        )
        for c in ranked
    ]
    columns = ("concept", "what it is", "feature", "threshold", "F1", "precision", "recall", "tokens")
    return [
        element(
            "p",
            "The language is generated, so what each token means is known. For each concept the one feature and threshold "
            "that detect it best were chosen on one half of the held-out documents; the figures are from the other half. "
            f"F1 is over {GOOD_F1} for {detected} of {len(r.concepts)} concepts ({share_detected(r.concepts):.0%}).",
        ),
        figure(
            bar_chart(
                [(c.name, c.f1) for c in ranked], title="F1 of each concept's best feature", mark=GOOD_F1
            ),
            f"F1 of the best single feature for each concept; the dashed line is {GOOD_F1}.",
            narrow=True,
        ),
        details(
            "The table",
            table(columns, rows, caption="Best single feature for each concept", numeric=(3, 4, 5, 6, 7)),
        ),
    ]


def _steering(r: DemoResults) -> list[Markup]:
    s = r.steered
    if s is None:
        return [element("p", "No feature was found that changes what the model says and leaves it fluent.")]
    return [
        element(
            "p",
            f"Feature #{s.feature} ({s.title}) was set to {s.strength:.2f} {s.where}; where it fires by itself its mean is "
            f"{s.typical:.2f}. Only the difference that this makes was added to the activation; the rest of it, the "
            "autoencoder's error included, stayed.",
        ),
        element("p", "Before:", class_="soft"),
        element("blockquote", element("span", s.prompt, class_="soft"), element("strong", s.before)),
        element("p", "After:", class_="soft"),
        element(
            "blockquote", element("span", s.prompt, class_="soft"), element("strong", s.after), class_="after"
        ),
    ]


def _made(r: DemoResults) -> list[Markup]:
    return [table(("", ""), r.facts, caption="Settings, versions and times")]
