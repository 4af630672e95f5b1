"""SAELens' TopK step: ``SAETrainer._train_step`` itself."""

from __future__ import annotations

import numpy as np
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks.shapes import Shape, Weights
from benchmarks.steps import BETAS, LR


class SAELens:
    def __init__(self, shape: Shape, start: Weights, *, autocast: bool = False):
        sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                k=shape.k,
                d_in=shape.d_in,
                d_sae=shape.d_sae,
                rescale_acts_by_decoder_norm=False,
                device="cpu",
            )
        )
        with torch.no_grad():
            sae.W_enc.copy_(torch.from_numpy(start.w_enc).T)
            sae.W_dec.copy_(torch.from_numpy(start.w_dec))
            sae.b_enc.copy_(torch.from_numpy(start.b_enc))
            sae.b_dec.copy_(torch.from_numpy(start.b_dec))
        config = SAETrainerConfig(
            total_training_samples=10_000 * shape.n,
            train_batch_size_samples=shape.n,
            lr=LR,
            lr_end=LR,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            autocast=autocast,
            logger=LoggingConfig(log_to_wandb=False),
        )
        self._sae = sae
        self._k = shape.k
        self._trainer = SAETrainer(config, sae, data_provider=iter(()))
        self.timed = {"step": self._step}
        self.batch = torch.from_numpy

    def _step(self, x: torch.Tensor) -> float:
        output = self._trainer.step(x)
        self._trainer.n_training_steps += 1
        return output.loss.item()

    def select(self, x: torch.Tensor) -> np.ndarray:
        with torch.no_grad(), self._trainer.autocast_if_enabled:
            acts, _ = self._sae.encode_with_hidden_pre(x)
        return acts.float().topk(self._k, dim=-1).indices.numpy()

    def parameters(self) -> dict[str, np.ndarray]:
        s = self._sae
        named = {"w_enc": s.W_enc.T, "b_enc": s.b_enc, "w_dec": s.W_dec, "b_dec": s.b_dec}
        return {name: p.detach().numpy() for name, p in named.items()}
