"""Feature cards: what a feature is about, where it fires, what it makes likelier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from mlxsae.report.html import Markup, element


class ShownExample(NamedTuple):
    """Text as pieces that join to it, and a feature's value on each."""

    pieces: Sequence[str]
    activations: Sequence[float]


class FeatureCard(NamedTuple):
    feature: int
    title: str
    facts: Sequence[str]  # one short sentence each
    promotes: Sequence[tuple[str, float]]  # token, nats that it gains through the feature
    examples: Sequence[ShownExample]
    maximum: float  # value drawn at full strength


def highlighted(example: ShownExample, maximum: float) -> Markup:
    """The text, each token on a background as strong as its activation, which the tooltip states. A token of which nothing
    would show, such as a line break, is spelt out where it is marked. NaN is marked at full strength.
    """
    peak = max((value for value in example.activations if not math.isnan(value)), default=0.0)
    parts = []
    for piece, value in zip(example.pieces, example.activations, strict=True):
        if value <= 0 or maximum <= 0:
            parts.append(element("span", piece))
            continue
        share = value / maximum
        strength = 1.0 if math.isnan(share) else min(max(share, 0.08), 1.0)
        word = piece.lstrip(" ") if _shows(piece) else repr(piece)
        if len(word) < len(piece):
            parts.append(Markup(" "))
        parts.append(
            element(
                "mark",
                word,
                style=f"--a:{strength:.2f}",
                title=f"{value:.2f}",
                class_="peak" if value == peak else None,
            )
        )
    return element("span", *parts)


def _shows(piece: str) -> bool:
    return any(c.isprintable() and not c.isspace() for c in piece)


def feature_card(card: FeatureCard) -> Markup:
    promoted = [
        element(
            "span",
            element("bdi", piece.strip() if _shows(piece) else repr(piece)),
            f" {gain:+.1f}",
            class_="chip",
        )
        for piece, gain in card.promotes
    ]
    return element(
        "article",
        element("h3", element("span", f"#{card.feature} ", class_="soft"), card.title),
        *(element("p", fact, class_="soft") for fact in card.facts),
        element("p", "Makes likelier (nats): ", *promoted) if promoted else "",
        element("ol", *(element("li", highlighted(e, card.maximum), dir="auto") for e in card.examples)),
        class_="card",
        id=f"feature-{card.feature}",
    )
