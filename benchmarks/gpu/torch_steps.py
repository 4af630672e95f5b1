"""Steps in PyTorch on CUDA: a dense step in bfloat16 with fused Adam, sparsify's, and one over OpenAI's Triton kernels.

All compute the same, TopK, mean squared error (sparsify: over the variance), projection, Adam, unit decoder rows, tokens
since fired. Where there is no GPU all but OpenAI's run on the CPU, to be tried out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.shapes import Shape, Weights
from benchmarks.steps import BETAS, EPS, LR

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Dense:
    """Everything dense but the selection: products in bfloat16 by autocast, float32 parameters, one fused Adam."""

    def __init__(self, shape: Shape, start: Weights):
        self.shape = shape
        self.params = [torch.nn.Parameter(torch.from_numpy(a).to(DEVICE)) for a in start]
        self.adam = torch.optim.Adam(self.params, lr=LR, betas=BETAS, eps=EPS, fused=True)
        self.tokens_since_fired = torch.zeros(shape.d_sae, dtype=torch.int32, device=DEVICE)
        self.forward: Callable[..., Any] = self._forward
        self.after: Callable[..., Any] = self._after

    def compiled(self) -> Dense:
        self.forward = torch.compile(self._forward)
        self.after = torch.compile(self._after)
        return self

    def _pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        w_enc, b_enc, _, b_dec = self.params
        return F.linear(x - b_dec, w_enc, b_enc)

    def _forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16):
            values, indices = torch.topk(self._pre_activations(x), self.shape.k, sorted=False)
            x_hat = self._decode(torch.relu(values), indices)
        return (x_hat.float() + self.params[3] - x).square().sum(-1).mean(), indices

    def _decode(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        dense = values.new_zeros(values.shape[0], self.shape.d_sae).scatter(1, indices, values)
        return dense @ self.params[2]

    @torch.no_grad()
    def _project(self) -> None:
        w, g = self.params[2], self.params[2].grad
        assert g is not None
        g -= (g * w).sum(-1, keepdim=True) * w

    @torch.no_grad()
    def _after(self, indices: torch.Tensor) -> None:
        self.params[2] /= self.params[2].norm(dim=-1, keepdim=True)
        fired = torch.zeros_like(self.tokens_since_fired, dtype=torch.bool).index_fill_(
            0, indices.flatten(), True
        )
        self.tokens_since_fired.add_(indices.shape[0]).masked_fill_(fired, 0)

    def step(self, x: torch.Tensor) -> float:
        loss, indices = self.forward(x)
        loss.backward()
        self._project()
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.after(indices)
        return loss.item()


class OpenAI(Dense):
    """The dense product and torch.topk, then the sparse kernels of openai/sparse_autoencoder for all that follows."""

    def __init__(self, shape: Shape, start: Weights):
        from sparse_autoencoder import kernels  # pip install git+https://github.com/openai/sparse_autoencoder

        super().__init__(shape, start)
        outer = kernels.triton_sparse_transpose_dense_matmul

        class Encode(torch.autograd.Function):
            @staticmethod
            def forward(
                ctx: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, b_dec: torch.Tensor
            ) -> Any:
                centred = (x - b_dec).to(torch.bfloat16)
                values, indices = torch.topk(
                    F.linear(centred, w.to(torch.bfloat16), b.to(torch.bfloat16)), shape.k
                )
                ctx.save_for_backward(centred, w, indices)
                ctx.mark_non_differentiable(indices)
                return values.float(), indices

            @staticmethod
            def backward(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
                centred, w, indices = ctx.saved_tensors
                db = torch.zeros(shape.d_sae, device=grad.device).scatter_add_(
                    0, indices.flatten(), grad.flatten().float()
                )
                dw = outer(indices, grad, centred.float(), N=shape.d_sae)
                return None, dw, db, -(db @ w)

        self._encode = Encode.apply
        self._sparse_decode = kernels.TritonDecoderAutograd.apply

    def _forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w_enc, b_enc, w_dec, b_dec = self.params
        values, indices = self._encode(x, w_enc, b_enc, b_dec)
        x_hat = self._sparse_decode(
            indices, torch.relu(values), w_dec.T
        )  # they keep it in column-major layout
        return (x_hat + b_dec - x).square().sum(-1).mean(), indices


class Sparsify:
    """sparsify's coder with its fused encoder and Triton decoder, in bfloat16 by autocast as its trainer runs it."""

    def __init__(self, shape: Shape, start: Weights):
        from sparsify import utils
        from sparsify.config import SparseCoderConfig
        from sparsify.sparse_coder import SparseCoder

        self.sae = sae = SparseCoder(
            shape.d_in, SparseCoderConfig(num_latents=shape.d_sae, k=shape.k), device=DEVICE
        )
        if DEVICE == "cuda" and utils.decoder_impl.__name__ != "triton_decode":
            raise RuntimeError("[benchmarks.gpu] sparsify must decode by Triton but finds none.")
        with torch.no_grad():
            for p, a in zip((sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec), start, strict=True):
                p.copy_(torch.from_numpy(a))
        self.adam = torch.optim.Adam(sae.parameters(), lr=LR, betas=BETAS, eps=EPS, fused=True)
        self.tokens_since_fired = torch.zeros(shape.d_sae, dtype=torch.long, device=DEVICE)

    def step(self, x: torch.Tensor) -> float:
        sae = self.sae
        sae.set_decoder_norm_to_unit_norm()
        with torch.autocast(DEVICE, torch.bfloat16):
            out = sae(x)
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        fired = torch.zeros_like(self.tokens_since_fired, dtype=torch.bool).index_fill_(
            0, out.latent_indices.flatten(), True
        )
        self.tokens_since_fired.add_(x.shape[0]).masked_fill_(fired, 0)
        return out.fvu.item()


def make(name: str, shape: Shape, start: Weights, copied: int) -> dict[str, Callable[[torch.Tensor], Any]]:
    """What can be timed of a contestant: name -> function of a batch."""
    made = {
        "torch-dense": lambda: Dense(shape, start),
        "torch-dense-compiled": lambda: Dense(shape, start).compiled(),
        "openai": lambda: OpenAI(shape, start),
        "sparsify": lambda: Sparsify(shape, start),
    }[name]()
    return {"step": made.step}


def batch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).to(DEVICE)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def reset_peak_memory() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


def device() -> dict[str, Any]:
    return {"device_name": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"}
