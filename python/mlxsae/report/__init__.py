"""Reports as HTML and SVG: functions that take values and return strings. Pages need no network and run no script."""

from __future__ import annotations

from mlxsae.report.demo_page import ConceptRow, DemoResults, SteeredText, demo_page, share_detected
from mlxsae.report.features import FeatureCard, ShownExample, feature_card, highlighted
from mlxsae.report.svg import bar_chart, histogram, line_plot

__all__ = [
    "ConceptRow",
    "DemoResults",
    "FeatureCard",
    "ShownExample",
    "SteeredText",
    "bar_chart",
    "demo_page",
    "feature_card",
    "highlighted",
    "histogram",
    "line_plot",
    "share_detected",
]
