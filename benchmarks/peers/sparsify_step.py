"""sparsify's step, in the order of its trainer: renorm, forward, backward, projection, Adam, dead latents.

Its trainer takes a language model and a dataset, so its loop around ``SparseCoder`` is repeated here.
"""

from __future__ import annotations

import numpy as np
import torch
from sparsify.config import SparseCoderConfig
from sparsify.sparse_coder import SparseCoder

from benchmarks.shapes import Shape, Weights
from benchmarks.steps import BETAS, EPS, LR


class Sparsify:
    def __init__(self, shape: Shape, start: Weights):
        self._sae = sae = SparseCoder(shape.d_in, SparseCoderConfig(num_latents=shape.d_sae, k=shape.k))
        with torch.no_grad():
            sae.encoder.weight.copy_(torch.from_numpy(start.w_enc))
            sae.encoder.bias.copy_(torch.from_numpy(start.b_enc))
            sae.W_dec.copy_(torch.from_numpy(start.w_dec))
            sae.b_dec.copy_(torch.from_numpy(start.b_dec))
        self._optimizer = torch.optim.Adam(sae.parameters(), lr=LR, betas=BETAS, eps=EPS)
        self._tokens_since_fired = torch.zeros(shape.d_sae, dtype=torch.long)
        self.timed = {"step": self._step}
        self.batch = torch.from_numpy

    def _step(self, x: torch.Tensor) -> float:
        sae = self._sae
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x)
        fired = torch.zeros_like(self._tokens_since_fired, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._tokens_since_fired += x.shape[0]
        self._tokens_since_fired[fired] = 0
        return out.fvu.item()

    def select(self, x: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return self._sae.encode(x).top_indices.numpy()

    def parameters(self) -> dict[str, np.ndarray]:
        s = self._sae
        named = {"w_enc": s.encoder.weight, "b_enc": s.encoder.bias, "w_dec": s.W_dec, "b_dec": s.b_dec}
        return {name: p.detach().numpy() for name, p in named.items()}
