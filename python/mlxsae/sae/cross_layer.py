"""Cross-layer transcoders: latents read one layer and write to it and all later ones (Ameisen et al. 2025)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxsae import ops
from mlxsae.code import Code, DenseCode, SparseCode
from mlxsae.sae.copying import copied
from mlxsae.sae.encoder import Encoder
from mlxsae.sae.model import DTYPES, SAE, row_norms, unit_rows
from mlxsae.sae.rule import Encoded, Rule, State, TopK, must_be_rule, taken


class CrossLayerTranscoder(SAE):
    r"""One dictionary for every layer of a model: layer l's latents read what its MLP reads, and write to what the MLPs of
    layers l, l + 1, ... add.

    .. math:: f_l = r(x_l W^{enc}_l + b^{enc}_l), \qquad \hat y_m = \sum_{l \le m} f_l W^{dec}_{l \to m} + b^{dec}_m

    Trains like any SAE, on inputs and targets ``[n, n_layers * d]``, the layers one after the other; calls also take
    ``[..., n_layers, d]``. The code holds the latents of all layers, ``d_sae = n_layers * d_layer``, those of layer l from
    ``l * d_layer`` on. Decoders are ``W_dec(l) [d_layer, n_layers - l, d]``, stored by feature as everything else. Steps go
    through autodiff, with the sparse ops for rules that keep k latents a token.

    Parameters
    ----------
    d, n_layers, d_layer : width of the residual stream, layers, latents of each layer.
    k : latents a token and layer; or rule : one rule, of which each layer gets a copy. Codes of k a token, or dense ones.
    """

    one_product = one_input = False

    def __init__(
        self,
        d: int,
        n_layers: int,
        d_layer: int,
        *,
        k: int | None = None,
        rule: Rule | None = None,
        dtype: mx.Dtype = mx.float32,
        seed: int | None = None,
    ):
        for name, size in (("d", d), ("n_layers", n_layers), ("d_layer", d_layer)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(
                    f"[CrossLayerTranscoder] {name} must be an int but got {type(size).__name__}."
                )
        if min(d, n_layers, d_layer) <= 0:
            raise ValueError(
                "[CrossLayerTranscoder] d, n_layers and d_layer must be positive "
                f"but got {d}, {n_layers} and {d_layer}."
            )
        if (k is None) == (rule is None):
            raise ValueError(f"[CrossLayerTranscoder] give either k or rule but got k={k} and rule={rule}.")
        if dtype not in DTYPES:
            raise ValueError(
                f"[CrossLayerTranscoder] dtype must be float32, float16 or bfloat16 but got {dtype}."
            )
        nn.Module.__init__(self)
        keys = [None] * n_layers if seed is None else mx.random.split(mx.random.key(seed), n_layers)
        self.encoders = [
            Encoder(unit_rows(d_layer, d, key).astype(dtype), mx.zeros(d_layer, dtype)) for key in keys
        ]
        # Zeros, so that a step begins with the targets' means (Dunefsky et al. 2024; sparsify).
        self.W_decs = [mx.zeros((d_layer, (n_layers - layer) * d), dtype) for layer in range(n_layers)]
        self.decoder = _Bias(mx.zeros(n_layers * d, dtype))  # type: ignore[assignment]
        one = TopK(k) if rule is None else rule  # type: ignore[arg-type]
        must_be_rule("CrossLayerTranscoder", "rule", one)
        one.must_be_for(type(self))
        self.rule = _PerLayer([taken(copied(one)) for _ in range(n_layers)])
        self.rule.prepare(d, d_layer)
        self.metadata = {}
        self.apply_b_dec_to_input = False
        self.transcoder = True
        self.rank_by_decoder_norm = False

    @property
    def n_layers(self) -> int:
        return len(self.encoders)

    @property
    def d_layer(self) -> int:
        return self.encoders[0].weight.shape[0]

    @property
    def d_in(self) -> int:
        return self.n_layers * self.encoders[0].weight.shape[1]

    @property
    def d_out(self) -> int:
        return self.d_in

    @property
    def d_sae(self) -> int:
        return self.n_layers * self.d_layer

    @property
    def dtype(self) -> mx.Dtype:
        return self.encoders[0].weight.dtype

    def W_dec_of(self, layer: int) -> mx.array:
        """``[d_layer, n_layers - layer, d]``: what the latents of ``layer`` write to it and each later layer."""
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"[CrossLayerTranscoder] layer must be in [0, {self.n_layers}) but got {layer}.")
        return self.W_decs[layer].reshape(self.d_layer, self.n_layers - layer, -1)

    def encode(self, x: mx.array) -> Code:
        x = self.encoder_input(x.reshape(*x.shape[:-2], self.d_in) if self._apart(x) else x)
        lead = x.shape[:-1]
        code = self.learn(x.reshape(-1, self.d_in), self.rule.initial_state()).code
        return type(code)(*(part.reshape(*lead, part.shape[-1]) for part in code))

    def learn(self, x: mx.array, state: State, *, rule: Rule | None = None) -> Encoded:
        rules = self.rule if rule is None else rule
        assert isinstance(rules, _PerLayer)
        found, d = [], self.d_in // self.n_layers
        for layer, (r, encoder) in enumerate(zip(rules.layers, self.encoders, strict=True)):
            inner = self.encoder_input(x)[:, layer * d : (layer + 1) * d]
            found.append(r.learn(inner, encoder.weight, encoder.bias, r.initial_state()))
        dense = [f.pre_acts for f in found if f.pre_acts is not None]
        pre_acts = mx.concatenate(dense, axis=-1) if len(dense) == self.n_layers else None
        return Encoded(_stacked([f.code for f in found], self.d_layer), state, pre_acts)

    def decode(self, code: Code, x: mx.array | None = None) -> mx.array:
        """``y_hat [..., n_layers * d]`` of a code that :meth:`encode` gave."""
        return self.written(code) + self.decoder.bias

    def written(self, code: Code) -> mx.array:
        lead = code.values.shape[:-1]
        parts = [part.reshape(-1, self.n_layers, part.shape[-1] // self.n_layers) for part in code]
        d = self.d_in // self.n_layers
        y_hat = mx.zeros((parts[0].shape[0], self.d_in), self.dtype)
        for layer, weight in enumerate(self.W_decs):
            values = parts[0][:, layer]
            if isinstance(code, DenseCode):
                written = values @ weight
            else:
                # A band of a Matryoshka keeps the places of the others, with value 0.
                own = SparseCode(values, parts[1][:, layer] - layer * self.d_layer)
                written = ops.sparse_decode(own, weight)
            y_hat = y_hat + mx.pad(written, [(0, 0), (layer * d, 0)])
        return y_hat.reshape(*lead, self.d_in)

    def __call__(self, x: mx.array) -> mx.array:
        """Targets in the shape of ``x``."""
        return self.decode(self.encode(x)).reshape(x.shape)

    def products(self, x: mx.array) -> list[tuple[mx.array, mx.array, mx.array]]:
        return []

    def pre_acts(self, x: mx.array) -> mx.array:
        d = self.d_in // self.n_layers
        x = self.encoder_input(x)
        each = [e.pre_acts(x[..., i * d : (i + 1) * d]) for i, e in enumerate(self.encoders)]
        return mx.concatenate(each, axis=-1)

    def decoder_norms(self) -> mx.array:
        """Norm of all that a latent writes, ``[d_sae]``."""
        return mx.concatenate([row_norms(w) for w in self.W_decs])

    def units(self) -> dict[str, tuple[int, int]]:
        each = range(self.n_layers)
        return {
            "decoder.bias": (0, 1),
            **{f"encoders.{i}.bias": (1, 0) for i in each},
            **{f"W_decs.{i}": (-1, 1) for i in each},
            **{f"rule.{name}": (power, 0) for name, power in self.rule.UNITS.items()},
        }

    def _apart(self, x: mx.array) -> bool:
        return x.ndim > 1 and x.shape[-2:] == (self.n_layers, self.d_in // self.n_layers)


class _Bias(nn.Module):
    def __init__(self, bias: mx.array):
        super().__init__()
        self.bias = bias


class _PerLayer(Rule):
    """A rule for each layer, as one module."""

    layers: list[Rule]
    width: int
    """Latents of a layer."""

    def __init__(self, layers: list[Rule]):
        super().__init__()
        self.layers = layers

    @property
    def architecture(self) -> str:  # type: ignore[override]
        return self.layers[0].architecture

    @property
    def takes_auxk(self) -> bool:  # type: ignore[override]
        return self.layers[0].takes_auxk

    @property
    def k(self) -> int | None:
        """Of each layer."""
        return getattr(self.layers[0], "k", None)

    @property
    def bandwidth(self) -> float:
        return self.layers[0].bandwidth  # type: ignore[return-value]

    @property
    def through_input(self) -> bool:
        return self.layers[0].through_input  # type: ignore[return-value]

    def thresholds(self) -> mx.array | None:
        each = [rule.thresholds() for rule in self.layers]
        return None if each[0] is None else mx.concatenate([t for t in each if t is not None])

    @property
    def starts_from_data(self) -> bool:
        return any(rule.starts_from_data for rule in self.layers)

    def start(self, pre_acts: mx.array, l0: float | None) -> mx.array | None:
        n = len(self.layers)
        parts = zip(self.layers, mx.split(pre_acts, n, axis=-1), strict=True)
        found = [rule.start(own, None if l0 is None else l0 / n) for rule, own in parts]
        return None if found[0] is None else mx.concatenate([bias for bias in found if bias is not None])

    def config(self) -> dict[str, Any]:
        """Of each layer's rule."""
        return self.layers[0].config()

    def with_k(self, k: int) -> Rule:
        """``k`` of each layer, at most its latents."""
        made = _PerLayer([rule.with_k(min(k, self.width)) for rule in self.layers])
        made.width = self.width
        return made

    @property
    def UNITS(self) -> dict[str, int]:  # type: ignore[override]
        return {
            f"layers.{i}.{n}": power for i, rule in enumerate(self.layers) for n, power in rule.UNITS.items()
        }

    def prepare(self, d_in: int, d_sae: int) -> None:
        self.width = d_sae
        for rule in self.layers:
            rule.prepare(d_in, d_sae)

    def constrain(self, parameters: dict[str, Any]) -> dict[str, Any]:
        return {"layers": [r.constrain(p) for r, p in zip(self.layers, parameters["layers"], strict=True)]}


def _stacked(codes: list[Code], d_layer: int) -> Code:
    values = mx.concatenate([code.values for code in codes], axis=-1)
    if all(isinstance(code, DenseCode) for code in codes):
        return DenseCode(values)
    if not all(isinstance(code, SparseCode) for code in codes):
        raise ValueError(
            "[CrossLayerTranscoder] the rule must keep k latents a token, or be dense in training, but gives "
            f"{type(codes[0]).__name__}."
        )
    places = [code.indices + layer * d_layer for layer, code in enumerate(codes)]  # type: ignore[union-attr]
    return SparseCode(values, mx.concatenate(places, axis=-1))
