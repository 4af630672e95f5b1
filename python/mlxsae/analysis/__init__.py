"""What an SAE's features do: where they fire, what they detect, what they cause, and steering by them."""

from __future__ import annotations

from mlxsae.analysis.demonstration import Candidate, Steering, find_steering
from mlxsae.analysis.detection import Detection, detection_table
from mlxsae.analysis.effects import Effect, direct_effects
from mlxsae.analysis.examples import Example, FeatureStatistics, Survey, survey
from mlxsae.analysis.steering import steer

__all__ = [
    "Candidate",
    "Detection",
    "Effect",
    "Example",
    "FeatureStatistics",
    "Steering",
    "Survey",
    "detection_table",
    "direct_effects",
    "find_steering",
    "steer",
    "survey",
]
