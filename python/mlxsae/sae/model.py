"""The sparse autoencoder: a composition of encoder, rule and decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxsae import ops
from mlxsae.code import Code, DenseCode, SparseCode, SparseCodeCSR, to_dense
from mlxsae.sae.decoder import Decoder, TiedDecoder
from mlxsae.sae.encoder import Encoder
from mlxsae.sae.rule import BatchTopK, Encoded, Rule, State, TopK, must_be_rule, taken

DTYPES = (mx.float32, mx.float16, mx.bfloat16)


class SAE(nn.Module):
    """A sparse autoencoder, or a transcoder where the target is not the input.

    ::

        code  = rule((x - b_dec) @ W_enc + b_enc)       without "- b_dec" unless apply_b_dec_to_input
        x_hat = sum_i code.values[i] * W_dec[code.indices[i]] + b_dec

    Parameters in memory are feature-major: ``encoder.weight [d_sae, d_in]``, ``encoder.bias [d_sae]``,
    ``decoder.weight [d_sae, d_out]``, ``decoder.bias [d_out]``. ``W_enc [d_in, d_sae]``, ``W_dec``, ``b_enc``
    and ``b_dec`` are the same arrays under the field's names and shapes; assigning to them works too.

    Inputs are ``[..., d_in]`` with any leading dimensions and are cast to the SAE's dtype. Rules of a threshold (JumpReLU,
    ReLU, Gated, a trained BatchTopK) wait for their code, so such an SAE runs outside of ``mx.compile`` and ``mx.vmap``;
    within them :func:`mlxsae.ops.threshold_encode_capped` is the op to use.

    Parameters
    ----------
    d_in, d_sae : width of the activation, number of latents.
    k : entries kept per token; short for ``rule=TopK(k)``.
    rule : how latents are chosen; one that another SAE has already is copied. Give either ``k`` or ``rule``.
    d_out : width of the target. Giving it makes a transcoder, also where it is ``d_in`` (:attr:`transcoder`).
    skip : adds a linear path from input to target, ``x @ W_skip.T`` with ``W_skip [d_out, d_in]``, 0 at first (Paulo et
        al. 2025). It sees ``x`` as it comes, without ``- b_dec``.
    tied : the decoder's rows are the encoder's, one parameter.
    rank_by_decoder_norm : latents compete by ``pre_acts * |W_dec|``, their size in the output, instead of by pre_acts; a
        threshold is then one of these products. The values stay pre-activations.
    apply_b_dec_to_input : whether ``b_dec`` is subtracted from the input. By default it is, but for a
        transcoder. dtype : float32, float16 or bfloat16. seed : seed of the initial weights; without it they
        come from MLX's global random state. Rows of the decoder are random unit vectors, the encoder is its
        transpose (for a transcoder, independent unit vectors), biases are 0.

    Raises
    ------
    ValueError, TypeError : for sizes, ``k`` or dtypes out of range, each naming what it got.
    """

    one_product: ClassVar[bool] = True
    """Whether all pre-activations are one encoder's product with :meth:`encoder_input`."""
    one_input: ClassVar[bool] = True
    """Whether the input is one activation and not several side by side."""

    encoder: Encoder
    rule: Rule
    decoder: Decoder
    transcoder: bool
    """Whether the target is another activation than the input."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        k: int | None = None,
        rule: Rule | None = None,
        d_out: int | None = None,
        apply_b_dec_to_input: bool | None = None,
        skip: bool = False,
        tied: bool = False,
        rank_by_decoder_norm: bool = False,
        dtype: mx.Dtype = mx.float32,
        seed: int | None = None,
    ):
        for name, size in (("d_in", d_in), ("d_sae", d_sae), ("d_out", d_in if d_out is None else d_out)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"[SAE] {name} must be an int but got {type(size).__name__}.")
            if size <= 0:
                raise ValueError(f"[SAE] {name} must be positive but got {name}={size}.")
        if k is not None and not isinstance(k, bool) and isinstance(k, int) and not 0 < k <= d_sae:
            raise ValueError(f"[SAE] k must be in (0, d_sae] but got k={k} with d_sae={d_sae}.")
        if dtype not in DTYPES:
            raise ValueError(f"[SAE] dtype must be float32, float16 or bfloat16 but got {dtype}.")
        keys = (None, None) if seed is None else mx.random.split(mx.random.key(seed))
        w_dec = unit_rows(d_sae, d_in if d_out is None else d_out, keys[0])
        w_enc = w_dec if d_out is None else unit_rows(d_sae, d_in, keys[1])
        encoder = Encoder(w_enc.astype(dtype), mx.zeros(d_sae, dtype))
        b_dec = mx.zeros(w_dec.shape[1], dtype)
        if tied and d_out is not None:
            raise ValueError("[SAE] tied must be False for a transcoder, whose input is not its target.")
        self._assemble(
            encoder,
            _one_rule(k, rule),
            TiedDecoder(encoder, b_dec) if tied else Decoder(w_dec.astype(dtype), b_dec),
            d_out is None if apply_b_dec_to_input is None else apply_b_dec_to_input,
            d_out is not None,
        )
        if skip:
            self.W_skip = mx.zeros((self.d_out, d_in), dtype)
        self.rank_by_decoder_norm = rank_by_decoder_norm

    @classmethod
    def from_weights(
        cls,
        W_enc: mx.array | np.ndarray,
        W_dec: mx.array | np.ndarray,
        b_enc: mx.array | np.ndarray | None = None,
        b_dec: mx.array | np.ndarray | None = None,
        *,
        k: int | None = None,
        rule: Rule | None = None,
        apply_b_dec_to_input: bool = True,
        transcoder: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> SAE:
        """An SAE over given weights: ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_out]``, ``b_enc [d_sae]``,
        ``b_dec [d_out]``, all of one float dtype; missing biases are 0. ``transcoder`` says that the target is not the
        input where both are of one width.

        ``W_enc`` is transposed into memory once; a transposed view of a feature-major array is not copied.
        """
        W_enc, W_dec = _weights("W_enc", W_enc, 2), _weights("W_dec", W_dec, 2)
        d_sae, d_out = W_dec.shape
        b_enc = mx.zeros(d_sae, W_enc.dtype) if b_enc is None else _weights("b_enc", b_enc, 1)
        b_dec = mx.zeros(d_out, W_enc.dtype) if b_dec is None else _weights("b_dec", b_dec, 1)
        if W_enc.shape[1] != d_sae:
            raise ValueError(
                "[SAE] W_enc [d_in, d_sae] and W_dec [d_sae, d_out] must agree in d_sae "
                f"but got {W_enc.shape} and {W_dec.shape}."
            )
        for name, bias, size in (("b_enc", b_enc, d_sae), ("b_dec", b_dec, d_out)):
            if bias.shape != (size,):
                raise ValueError(f"[SAE] {name} must have shape ({size},) but got {bias.shape}.")
        if len({a.dtype for a in (W_enc, W_dec, b_enc, b_dec)}) > 1:
            raise ValueError(
                "[SAE] weights must have one dtype but got "
                f"W_enc {W_enc.dtype}, W_dec {W_dec.dtype}, b_enc {b_enc.dtype}, b_dec {b_dec.dtype}."
            )
        sae = cls.__new__(cls)
        encoder = Encoder(mx.contiguous(W_enc.T), b_enc)
        sae._assemble(encoder, _one_rule(k, rule), Decoder(W_dec, b_dec), apply_b_dec_to_input, transcoder)
        sae.metadata = metadata or {}
        return sae

    def _assemble(
        self,
        encoder: Encoder,
        rule: Rule,
        decoder: Decoder,
        apply_b_dec_to_input: bool,
        transcoder: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.encoder = encoder
        self.rule = taken(rule)
        self.decoder = decoder
        self.metadata = {}
        self.rank_by_decoder_norm = False
        self.transcoder = transcoder or self.d_in != self.d_out
        self.rule.must_be_for(type(self))
        self.rule.prepare(self.d_in, self.d_sae)
        if apply_b_dec_to_input and self.d_in != self.d_out:
            raise ValueError(
                "[SAE] apply_b_dec_to_input must be False where the input is not the target "
                f"but got True with d_in={self.d_in} and d_out={self.d_out}."
            )
        self.apply_b_dec_to_input = bool(apply_b_dec_to_input)

    def encode(self, x: mx.array) -> Code:
        """Code of ``x [..., d_in]``.

        ``SparseCode`` with ``values`` and ``indices [..., k]`` where the rule keeps ``k`` a token; ``SparseCodeCSR``, a
        compressed row for each token in the order of ``x.reshape(-1, d_in)``, where the number varies (this waits for the
        result); ``DenseCode [..., d_sae]`` for rules that are functions of dense pre-activations.
        """
        x = self.encoder_input(x)
        lead = x.shape[:-1]
        code = self._ranked(self.rule, self.rule.encode, x.reshape(math.prod(lead), self.d_in))
        if not isinstance(code, SparseCode | DenseCode):
            return code
        return type(code)(*(part.reshape(*lead, part.shape[-1]) for part in code))

    def learn(self, x: mx.array, state: State, *, rule: Rule | None = None) -> Encoded:
        """The code of ``x [n, d_in]`` as training takes it, with the next state of the rule; ``rule`` stands in for the
        SAE's own (annealing).
        """
        rule = self.rule if rule is None else rule
        found: list[Encoded] = []

        def learn(x: mx.array, weight: mx.array, bias: mx.array) -> Code:
            found.append(rule.learn(x, weight, bias, state))
            return found[0].code

        code, pre_acts = self._ranked(rule, learn, self.encoder_input(x)), found[0].pre_acts
        if self.rank_by_decoder_norm and pre_acts is not None and not rule.own_gate:
            ranks = self.ranks(rule)
            pre_acts = mx.where(ranks > 0, pre_acts / mx.where(ranks > 0, ranks, 1), 0)
        return found[0]._replace(code=code, pre_acts=pre_acts)

    def ranks(self, rule: Rule) -> mx.array:
        """What a pre-activation is multiplied by before ``rule`` chooses, or compares it with a threshold: decoder norms as
        constants ``[d_sae]`` where latents are ranked by these, else 1.
        """
        if not self.rank_by_decoder_norm or rule.own_gate:
            return mx.array(1.0, self.dtype)
        return mx.stop_gradient(self.decoder_norms()).astype(self.dtype)

    def _ranked(self, rule: Rule, encode: Callable[..., Code], x: mx.array) -> Code:
        """``encode(x, weight, bias)``, its latents chosen by their size in the output where the SAE asks for that."""
        weight, bias = self.encoder.weight, self.encoder.bias
        if not self.rank_by_decoder_norm:
            return encode(x, weight, bias)
        norms = mx.stop_gradient(self.decoder_norms()).astype(weight.dtype)
        code = encode(x, weight * norms[:, None], bias * norms)
        some = mx.where(norms > 0, norms, 1)  # no division by 0 whose derivative `where` would let through
        if isinstance(code, DenseCode):
            return DenseCode(mx.where(norms > 0, code.values / some, 0))
        indices = mx.stop_gradient(code.indices)
        if rule.makes_values:
            return code._replace(values=code.values / some[indices])
        where = code._replace(values=mx.stop_gradient(code.values), indices=indices)
        products = ops.gather_dot(x, weight, where if isinstance(where, SparseCodeCSR) else indices)
        return code._replace(values=mx.where(where.values > 0, products + bias[indices], 0), indices=indices)

    def decoder_norms(self) -> mx.array:
        """``|W_dec[i]|``, ``[d_sae]``: how strongly a latent of value 1 writes."""
        return row_norms(self.decoder.weight)

    def decode(self, code: Code, x: mx.array | None = None) -> mx.array:
        """``x_hat [..., d_out]`` of a code; ``[n, d_out]`` of ``n`` compressed rows. An SAE with a skip connection, or one
        that normalises each token, wants the input ``x [..., d_in]`` as well.
        """
        y_hat = self.decoder(code)
        if "W_skip" in self:
            x = self._like(y_hat, x, "for the skip connection")
            return y_hat + x @ self.W_skip.T
        if self.normalize_activations == "layer_norm":
            _, mean, std = layer_norm(self._like(y_hat, x, "for its mean and deviation"))
            return (y_hat * std + mean).astype(self.dtype)
        return y_hat

    def written(self, code: Code) -> mx.array:
        """What the latents of a code alone write: ``sum_i values[i] * W_dec[indices[i]]``, ``[..., d_out]``."""
        return self.decoder(code) - self.decoder.bias

    def _like(self, y_hat: mx.array, x: mx.array | None, why: str) -> mx.array:
        if x is None:
            raise ValueError(f"[SAE] x must be given to decode, {why}, but is None.")
        return x.reshape(*y_hat.shape[:-1], self.d_in).astype(self.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        """``x [..., d_in] -> x_hat [..., d_out]``."""
        return self.decode(self.encode(x), x).reshape(*x.shape[:-1], self.d_out)

    def units(self) -> dict[str, tuple[int, int]]:
        """How parameters are measured: for each the powers in which the scales of input and target enter. Those that are
        not named are free of scale.
        """
        # What is compared with sizes in the output is measured like these.
        ranked = self.rank_by_decoder_norm and not self.rule.own_gate
        return {
            "encoder.bias": (1, 0),
            "decoder.weight": (-1, 1),
            "decoder.bias": (0, 1),
            "W_skip": (-1, 1),
            **{f"rule.{n}": (0, power) if ranked else (power, 0) for n, power in self.rule.UNITS.items()},
        }

    def products(self, x: mx.array) -> list[tuple[mx.array, mx.array, mx.array]]:
        """What the pre-activations of ``x [n, d_in]`` are products of, in the order of latents: input, weight ``[m, d]``,
        bias ``[m]``. Empty where no one decoder writes for all latents.
        """
        return [(self.encoder_input(x), self.encoder.weight, self.encoder.bias)]

    def pre_acts(self, x: mx.array) -> mx.array:
        """Dense pre-activations ``[..., d_sae]``, before the rule. This is the array that :meth:`encode`
        avoids.
        """
        return self.encoder.pre_acts(self.encoder_input(x))

    def to_dense(self, code: Code) -> mx.array:
        """The code as dense latents ``[..., d_sae]``."""
        return to_dense(code, self.d_sae)

    def encoder_input(self, x: mx.array) -> mx.array:
        """What the encoder sees: ``x`` in the SAE's dtype, normalised as :attr:`normalize_activations` says, less ``b_dec``
        if ``apply_b_dec_to_input``.
        """
        if not isinstance(x, mx.array):
            raise TypeError(f"[SAE] x must be an mx.array but got {type(x).__name__}.")
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            raise ValueError(f"[SAE] x must have shape [..., {self.d_in}] but got {x.shape}.")
        if not mx.issubdtype(x.dtype, mx.floating):
            raise TypeError(f"[SAE] x must be floating point but got {x.dtype}.")
        x = x.astype(self.dtype)
        if self.normalize_activations == "layer_norm":
            x = layer_norm(x)[0].astype(self.dtype)
        return x - self.decoder.bias if self.apply_b_dec_to_input else x

    def rows(self, x: mx.array) -> mx.array:
        """``x [..., d_in]`` as ``[n, d_in]``."""
        self.encoder_input(x)  # says what x must be
        return x.reshape(-1, self.d_in)

    @property
    def normalize_activations(self) -> str:
        """What the SAE itself does to every token: ``none``, or ``layer_norm``: it encodes :func:`layer_norm` of ``x`` and
        gives the reconstruction the mean and the deviation of ``x`` again. Other normalisations are folded into weights;
        this one depends on the token.
        """
        return self.__dict__.get("_normalize_activations", "none")

    @normalize_activations.setter
    def normalize_activations(self, value: str) -> None:
        if value not in ("none", "layer_norm"):
            raise ValueError(f"[SAE] normalize_activations must be none or layer_norm but got {value!r}.")
        if value == "layer_norm" and (self.transcoder or "W_skip" in self or not self.one_input):
            raise ValueError(
                "[SAE] normalize_activations must be none where the target is not the one input but got layer_norm."
            )
        object.__setattr__(self, "_normalize_activations", value)

    @property
    def d_in(self) -> int:
        return self.encoder.weight.shape[1]

    @property
    def d_sae(self) -> int:
        return self.encoder.weight.shape[0]

    @property
    def d_out(self) -> int:
        return self.decoder.weight.shape[1]

    @property
    def dtype(self) -> mx.Dtype:
        return self.encoder.weight.dtype

    @property
    def W_enc(self) -> mx.array:
        """``[d_in, d_sae]``, a transposed view of ``encoder.weight``."""
        return self.encoder.weight.T

    @W_enc.setter
    def W_enc(self, value: mx.array) -> None:
        self.encoder.weight = mx.contiguous(self._replacement("W_enc", value, self.W_enc).T)

    @property
    def W_dec(self) -> mx.array:
        """``[d_sae, d_out]``; row i is the direction of feature i."""
        return self.decoder.weight

    @W_dec.setter
    def W_dec(self, value: mx.array) -> None:
        self.decoder.weight = self._replacement("W_dec", value, self.W_dec)

    @property
    def b_enc(self) -> mx.array:
        """``[d_sae]``"""
        return self.encoder.bias

    @b_enc.setter
    def b_enc(self, value: mx.array) -> None:
        self.encoder.bias = self._replacement("b_enc", value, self.b_enc)

    @property
    def b_dec(self) -> mx.array:
        """``[d_out]``"""
        return self.decoder.bias

    @b_dec.setter
    def b_dec(self, value: mx.array) -> None:
        self.decoder.bias = self._replacement("b_dec", value, self.b_dec)

    @property
    def metadata(self) -> dict[str, Any]:
        """What is known about the SAE: model, hook point, training. Travels with the files, never with the
        parameters.
        """
        return self.__dict__["_metadata"]

    @metadata.setter
    def metadata(self, value: dict[str, Any]) -> None:
        # nn.Module keeps every dict among its parameters; this one is none.
        object.__setattr__(self, "_metadata", dict(value))

    def __setattr__(self, key: str, value: Any) -> None:
        # nn.Module stores arrays and dicts under any name and so bypasses property setters.
        if isinstance(prop := getattr(type(self), key, None), property):
            prop.__set__(self, value)
        else:
            super().__setattr__(key, value)

    @staticmethod
    def _replacement(name: str, value: mx.array, current: mx.array) -> mx.array:
        if value.shape != current.shape or value.dtype != current.dtype:
            raise ValueError(
                f"[SAE] {name} must be {current.dtype} of shape {current.shape} "
                f"but got {value.dtype} of shape {value.shape}."
            )
        return value

    def _extra_repr(self) -> str:
        return f"apply_b_dec_to_input={self.apply_b_dec_to_input}"


def calibrate(sae: SAE, batches: Iterable[mx.array]) -> SAE:
    """Set the threshold of a BatchTopK SAE to the mean of the smallest values that it keeps of each of ``batches``
    ``[..., d_in]``; batches without tokens do not count. Returns the SAE.
    """
    if not isinstance(sae.rule, BatchTopK):
        raise TypeError(f"[calibrate] the rule must be BatchTopK but is {type(sae.rule).__name__}.")
    thresholds = []
    for x in batches:
        if (rows := sae.rows(x)).size:
            state = sae.learn(rows, sae.rule.initial_state()).state
            thresholds.append(state["last"].item())
    if not thresholds:
        raise ValueError("[calibrate] there must be at least one batch with tokens but got none.")
    sae.rule.threshold = sum(thresholds) / len(thresholds)
    return sae


def _one_rule(k: int | None, rule: Rule | None) -> Rule:
    if (k is None) == (rule is None):
        raise ValueError(f"[SAE] give either k or rule but got k={k} and rule={rule}.")
    if rule is not None:
        must_be_rule("SAE", "rule", rule)
    return TopK(k) if rule is None else rule  # type: ignore[arg-type]


def layer_norm(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """``(x - mean) / (std + 1e-5)`` of each row of ``x [..., d]``, with its mean and standard deviation ``[..., 1]``
    (unbiased), in float32: as SAELens and OpenAI take it.
    """
    x = x.astype(mx.float32)
    mean = x.mean(axis=-1, keepdims=True)
    x = x - mean
    std = mx.sqrt(mx.square(x).sum(axis=-1, keepdims=True) / max(x.shape[-1] - 1, 1))
    return x / (std + 1e-5), mean, std


def row_norms(weight: mx.array) -> mx.array:
    """Norms along the last axis in float32; a row of zeros has norm 0, and gradient 0 where MLX's has NaN."""
    squares = mx.square(weight.astype(mx.float32)).sum(axis=-1)
    some = squares > 0
    return mx.where(some, mx.sqrt(mx.where(some, squares, 1)), 0)


def unit_rows(rows: int, columns: int, key: mx.array | None) -> mx.array:
    w = mx.random.normal((rows, columns), key=key)
    return w / mx.linalg.norm(w, axis=-1, keepdims=True)


def _weights(name: str, value: mx.array | np.ndarray, ndim: int) -> mx.array:
    value = mx.array(value) if isinstance(value, np.ndarray) else value
    if not isinstance(value, mx.array):
        raise TypeError(f"[SAE] {name} must be an array but got {type(value).__name__}.")
    if value.dtype not in DTYPES:
        raise ValueError(f"[SAE] {name} must be float32, float16 or bfloat16 but got {value.dtype}.")
    if value.ndim != ndim:
        raise ValueError(f"[SAE] {name} must have {ndim} dimensions but has shape {value.shape}.")
    return value
