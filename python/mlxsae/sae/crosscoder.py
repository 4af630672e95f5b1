"""Crosscoders: one dictionary for several activations at once (Lindsey et al. 2024)."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np

from mlxsae.code import Code
from mlxsae.sae.model import SAE, row_norms, unit_rows
from mlxsae.sae.rule import Rule, positive_int


class Crosscoder(SAE):
    r"""One set of latents that reads ``n_sources`` activations of width ``d_source`` together and writes them all:

    .. math:: f = r\big(\textstyle\sum_s x_s W^{enc}_s + b_{enc}\big), \qquad \hat x_s = f W^{dec}_s + b^{dec}_s

    Sources are layers, components or models; models with one tokenizer read the same tokens. It is the SAE of the
    concatenated activations, and trains as one, by the same ops; data come as ``[n, n_sources * d_source]``. What makes
    it a crosscoder is how latents are weighed: by :math:`\sum_s |W^{dec}_{j,s}|`, in sparsity terms
    (:class:`~mlxsae.loss.L1`) and, with ``rank_by_decoder_norm``, in the choice of the largest. Then decoder rows want no
    unit norm: ``TrainConfig(normalize_decoder=False)``.

    ``W_enc [n_sources, d_source, d_sae]``, ``W_dec [d_sae, n_sources, d_source]``, ``b_dec [n_sources, d_source]`` are
    views in the field's shapes. :meth:`encode` and calls take ``[..., n_sources, d_source]`` or the concatenation.

    Parameters
    ----------
    d_source, n_sources, d_sae : widths. k, rule, rank_by_decoder_norm, dtype, seed : as in :class:`~mlxsae.SAE`.
    decoder_norm : norm of each latent's decoder row of each source at the start; the encoder is the transpose.
    """

    one_input = False

    def __init__(
        self,
        d_source: int,
        n_sources: int,
        d_sae: int,
        *,
        k: int | None = None,
        rule: Rule | None = None,
        rank_by_decoder_norm: bool = True,
        decoder_norm: float | None = None,
        dtype: mx.Dtype = mx.float32,
        seed: int | None = None,
    ):
        super().__init__(
            positive_int("Crosscoder", "d_source", d_source)
            * positive_int("Crosscoder", "n_sources", n_sources),
            d_sae,
            k=k,
            rule=rule,
            apply_b_dec_to_input=False,
            rank_by_decoder_norm=rank_by_decoder_norm,
            dtype=dtype,
            seed=seed,
        )
        self.n_sources = n_sources
        key = None if seed is None else mx.random.key(seed)
        rows = unit_rows(d_sae * n_sources, d_source, key)  # a direction of its own for each source
        rows = rows * (n_sources**-0.5 if decoder_norm is None else decoder_norm)
        self.encoder.weight = self.decoder.weight = rows.reshape(d_sae, -1).astype(dtype)

    @property
    def d_source(self) -> int:
        return self.d_in // self.n_sources

    @property
    def W_enc(self) -> mx.array:  # type: ignore[override]
        return self.encoder.weight.reshape(self.d_sae, self.n_sources, -1).transpose(1, 2, 0)

    @property
    def W_dec(self) -> mx.array:  # type: ignore[override]
        return self.decoder.weight.reshape(self.d_sae, self.n_sources, -1)

    @property
    def b_dec(self) -> mx.array:  # type: ignore[override]
        return self.decoder.bias.reshape(self.n_sources, -1)

    def encode(self, x: mx.array) -> Code:
        return super().encode(self._concatenated(x))

    def __call__(self, x: mx.array) -> mx.array:
        """Reconstruction in the shape of ``x``."""
        return super().__call__(self._concatenated(x)).reshape(x.shape)

    def rows(self, x: mx.array) -> mx.array:
        return super().rows(self._concatenated(x))

    def _concatenated(self, x: mx.array) -> mx.array:
        apart = x.ndim > 1 and x.shape[-2:] == (self.n_sources, self.d_source)
        return x.reshape(*x.shape[:-2], self.d_in) if apart else x

    def source_norms(self) -> mx.array:
        """``|W_dec[j, s]|``, ``[d_sae, n_sources]``."""
        return row_norms(self.W_dec)

    def decoder_norms(self) -> mx.array:
        """``sum_s |W_dec[j, s]|``, ``[d_sae]``."""
        return self.source_norms().sum(axis=-1)

    def source_shares(self) -> np.ndarray:
        """Each source's share of a latent's decoder norm, ``[d_sae, n_sources]``: 1 for a latent that is the source's
        alone, ``1 / n_sources`` for one that all share. A latent without a decoder has 0.
        """
        norms = np.array(self.source_norms())
        return norms / np.maximum(norms.sum(axis=1, keepdims=True), 1e-12)

    def source_cosines(self, a: int = 0, b: int = 1) -> np.ndarray:
        """Cosine between the decoder rows of sources ``a`` and ``b``, ``[d_sae]``: whether a shared latent means the same
        direction in both.
        """
        w = np.array(self.W_dec.astype(mx.float32))
        norms = np.linalg.norm(w, axis=-1)
        return (w[:, a] * w[:, b]).sum(axis=-1) / np.maximum(norms[:, a] * norms[:, b], 1e-12)

    def sharing(self, low: float = 0.3, high: float = 0.7) -> dict[str, int]:
        """Latents by whose they are: ``source_<s>`` where its share of the decoder norm is over ``high``, ``shared`` where
        every source's lies in ``[low, high]``, ``aligned`` of the shared ones where all rows agree (cosine over 0.9),
        ``other``. The customary bounds are for two sources.
        """
        shares = self.source_shares()
        shared = ((shares >= low) & (shares <= high)).all(axis=1)
        pairs = itertools.combinations_with_replacement(range(self.n_sources), 2)
        alike = np.min([self.source_cosines(a, b) for a, b in pairs], axis=0) > 0.9
        found = {f"source_{s}": int((shares[:, s] > high).sum()) for s in range(self.n_sources)}
        found |= {"shared": int(shared.sum()), "aligned": int((shared & alike).sum())}
        own = (shares > high).any(axis=1)
        return found | {"other": int((~shared & ~own).sum())}
