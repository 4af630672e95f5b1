"""dictionary_learning's steps: ``Trainer.update`` itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.top_k import TopKTrainer

from benchmarks.shapes import Shape, Weights
from benchmarks.steps import LR


class _Step:
    trainer: Any

    def __init__(self, shape: Shape, start: Weights):
        self._trainer = type(self).trainer(
            steps=10_000,
            activation_dim=shape.d_in,
            dict_size=shape.d_sae,
            k=shape.k,
            layer=0,
            lm_name="none",
            lr=LR,
            warmup_steps=0,
            device="cpu",
        )
        ae = self._trainer.ae
        with torch.no_grad():
            ae.encoder.weight.copy_(torch.from_numpy(start.w_enc))
            ae.encoder.bias.copy_(torch.from_numpy(start.b_enc))
            ae.decoder.weight.copy_(torch.from_numpy(start.w_dec).T)
            ae.b_dec.copy_(torch.from_numpy(start.b_dec))
        self._count = 0
        self._k = shape.k
        self.timed = {"step": self._step}
        self.batch = torch.from_numpy

    def _step(self, x: torch.Tensor) -> float:
        # Its step 0 sets b_dec to the geometric median of the batch; a contest starts where all start.
        self._count += 1
        return self._trainer.update(self._count, x)

    def select(self, x: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            acts = self._trainer.ae.encode(x, use_threshold=False)
        return acts.topk(self._k, dim=-1).indices.numpy()

    def parameters(self) -> dict[str, np.ndarray]:
        ae = self._trainer.ae
        named = {
            "w_enc": ae.encoder.weight,
            "b_enc": ae.encoder.bias,
            "w_dec": ae.decoder.weight.T,
            "b_dec": ae.b_dec,
        }
        return {name: p.detach().numpy() for name, p in named.items()}


class TopK(_Step):
    trainer = TopKTrainer


class BatchTopK(_Step):
    trainer = BatchTopKTrainer
