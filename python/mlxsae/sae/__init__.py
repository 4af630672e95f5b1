"""Sparse autoencoders and transcoders: an encoder, a rule that chooses latents, a decoder."""

from __future__ import annotations

from mlxsae.sae.decoder import Decoder
from mlxsae.sae.encoder import Encoder
from mlxsae.sae.model import SAE, calibrate
from mlxsae.sae.presets import sae, transcoder
from mlxsae.sae.rule import RULES, BatchTopK, Encoded, JumpReLU, Rule, TopK

__all__ = [
    "RULES",
    "SAE",
    "BatchTopK",
    "Decoder",
    "Encoded",
    "Encoder",
    "JumpReLU",
    "Rule",
    "TopK",
    "calibrate",
    "sae",
    "transcoder",
]
