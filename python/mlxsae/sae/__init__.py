"""Sparse autoencoders and transcoders: an encoder, a rule that chooses latents, a decoder."""

from __future__ import annotations

from mlxsae.sae.cross_layer import CrossLayerTranscoder
from mlxsae.sae.crosscoder import Crosscoder
from mlxsae.sae.decoder import Decoder, TiedDecoder
from mlxsae.sae.encoder import Encoder
from mlxsae.sae.gates import Activation, Gated, ReLU, SigmoidGated
from mlxsae.sae.hierarchical import Hierarchical, HierarchicalSAE
from mlxsae.sae.model import SAE, calibrate
from mlxsae.sae.presets import of_rule, sae, transcoder
from mlxsae.sae.rule import BatchTopK, Encoded, GroupMax, JumpReLU, Rule, TopK, TopKJumpReLU

RULES: dict[str, type[Rule]] = {
    rule.architecture: rule
    for rule in (TopK, BatchTopK, JumpReLU, ReLU, Gated, SigmoidGated, TopKJumpReLU, GroupMax, Hierarchical)
}
"""The rules that configurations know, by architecture."""

__all__ = [
    "RULES",
    "SAE",
    "Activation",
    "BatchTopK",
    "CrossLayerTranscoder",
    "Crosscoder",
    "Decoder",
    "Encoded",
    "Encoder",
    "Gated",
    "GroupMax",
    "Hierarchical",
    "HierarchicalSAE",
    "JumpReLU",
    "ReLU",
    "Rule",
    "SigmoidGated",
    "TiedDecoder",
    "TopK",
    "TopKJumpReLU",
    "calibrate",
    "of_rule",
    "sae",
    "transcoder",
]
