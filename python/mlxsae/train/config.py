"""Hyper-parameters: small nested dataclasses that round-trip through JSON and refuse unknown keys."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

import mlx.core as mx

from mlxsae.loss import (
    AUXK_PRESETS,
    DEFAULT_TERMS,
    END_TO_END,
    RECONSTRUCTION,
    TERMS,
    AuxK,
    FixedPrefixes,
    Loss,
    Lp,
    Prefixes,
    RandomPrefixes,
    Term,
    anneal,
)
from mlxsae.loss.compose import Weight
from mlxsae.sae import RULES, SAE, Crosscoder, CrossLayerTranscoder, Gated, Rule, of_rule
from mlxsae.train.flat_names import nested
from mlxsae.train.optimizers import OPTIMIZERS, WITH_WEIGHT_DECAY
from mlxsae.train.schedules import in_steps

PRECISIONS = ("float32", "certified", "tf32", "bfloat16")
"""How the encoder multiplies in training (:class:`TrainConfig`)."""
WAKE = 0.001
"""How much the bias of a dead latent rises in a step by default (:class:`TrainConfig`)."""
K_FROM = 8
"""``sparsity_warm_up_steps`` of a rule that keeps the k largest: k falls from so many times itself."""
GHOSTS = 0.1
"""Weight of the term ``ghost_gradients`` by its flat name ``use_ghost_grads``."""
MOMENTS = ("float32", "bfloat16")
"""Types in which Adam's moments are kept (:class:`OptimizerConfig`)."""
VARIANTS = ("dense", "lazy", "row_sparse")
"""What Adam does to latents that a batch does not use (:class:`OptimizerConfig`)."""


class _Config:
    """JSON round trip for frozen dataclasses."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, partial: bool = False) -> Self:
        """The configuration that :meth:`to_dict` wrote. Unknown and missing keys and wrong types raise
        ``ValueError`` with the key's path; with ``partial`` missing keys take their defaults.
        """
        return _parse(cls, values, "", partial)

    def __post_init__(self) -> None:
        """Bring every field to its declared type, as :meth:`from_dict` does; a part may be an object of its keys."""
        hints = _hints(type(self))
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, f.name, _value(hints[f.name], getattr(self, f.name), f.name, True))


def default_learning_rate(d_sae: int) -> float:
    """``4e-3 * sqrt(2048 / d_sae)``, at most 5e-3: the square-root law of Gao et al. 2024 through what is
    best for a run of 2M tokens at ``d_sae = 2048`` with unit decoder rows and activations of norm
    ``sqrt(d_in)``.
    """
    return min(5e-3, 4e-3 * math.sqrt(2048 / d_sae))


@dataclass(frozen=True)
class OptimizerConfig(_Config):
    """An optimiser of :data:`mlxsae.train.optimizers.OPTIMIZERS`, and its learning rate over time.

    ``warmup`` and ``decay`` are fractions of all steps, or steps where over 1: linear from 0 to ``learning_rate`` over
    the first, then constant, then ``shape`` (``linear`` or ``cosine``) down to 0 over the last; ``shape="constant"``
    has no decay. Without a ``learning_rate`` it is
    :func:`default_learning_rate` (for Adam). ``max_grad_norm`` clips the global gradient norm. Only ``adam`` has the
    fused step; ``weight_decay`` is decoupled, for optimisers that have it.

    ``moments`` is the type in which Adam's moments of both matrices are kept: ``float32``, or ``bfloat16`` with stochastic
    rounding (:func:`mlxsae.ops.feature_update`), which takes a third off the memory of parameters and moments. It wants
    the fused engine.

    ``variant`` is how Adam treats latents that a batch does not use, with the fused engine. ``dense``: they move by their
    momentum, as Adam says. ``lazy``: the same, in bits, but a decoder row makes its missed steps when it is next used, or
    looked at, or 64 steps later (``mlxsae.train.engine.LAZY_WINDOW``), which spares memory traffic where batches use few of
    the latents. ``row_sparse``: rows of both matrices that a batch does not use stay as they are, moments included (``torch.optim.SparseAdam``): less
    work again, and another optimiser.

    beta_2 is 0.99: the gradient shrinks by orders of magnitude within the first hundred steps, and a longer
    memory of the large early ones throttles the steps for a thousand more. The decay is long because latents stay in use
    under it: against a decay over the last 20 % half as many of a BatchTopK's are dead, at the same FVU (2M tokens).
    """

    learning_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    warmup: float = 0.05
    decay: float = 0.5
    shape: str = "linear"
    max_grad_norm: float | None = None
    name: str = "adam"
    weight_decay: float = 0.0
    moments: str = "float32"
    variant: str = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("name", self.name, self.name in OPTIMIZERS, f"be one of {sorted(OPTIMIZERS)}")
        _require("moments", self.moments, self.moments in MOMENTS, f"be one of {list(MOMENTS)}")
        fits = self.moments == "float32" or self.name == "adam"
        _require("moments", self.moments, fits, f"be float32 for {self.name}")
        _require("variant", self.variant, self.variant in VARIANTS, f"be one of {list(VARIANTS)}")
        fits = self.variant == "dense" or self.name == "adam"
        _require("variant", self.variant, fits, f"be dense for {self.name}")
        if self.learning_rate is not None:
            _require("learning_rate", self.learning_rate, self.learning_rate > 0, "be positive")
            _require("learning_rate", self.learning_rate, self.learning_rate < math.inf, "be finite")
        _require("betas", self.betas, all(0 <= b < 1 for b in self.betas), "lie in [0, 1)")
        _require("eps", self.eps, self.eps >= 0, "not be negative")
        fits = self.weight_decay == 0 or (self.weight_decay > 0 and self.name in WITH_WEIGHT_DECAY)
        _require("weight_decay", self.weight_decay, fits, f"be 0, or positive for {list(WITH_WEIGHT_DECAY)}")
        for name in ("warmup", "decay"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "not be negative")
        if max(self.warmup, self.decay) <= 1:
            both = self.warmup + self.decay
            _require("warmup + decay", both, both <= 1, "be at most 1")
        shapes = ("constant", "cosine", "linear")
        _require("shape", self.shape, self.shape in shapes, f"be one of {list(shapes)}")
        if self.max_grad_norm is not None:
            _require("max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "be positive or None")


SPARSITY = frozenset({"l1", "lp", "tanh", "l0", "gate_l1", "gate_mean"})
"""Terms whose weight decides how many latents fire, and nothing else does."""


@dataclass(frozen=True)
class LossConfig(_Config):
    """Reconstruction term, AuxK, and what else the architecture needs.

    ``reconstruction`` is ``fvu``, ``mse`` or ``nmse``. ``auxk`` names a preset of :mod:`mlxsae.loss.auxk`, is None, or
    ``auto``: ``dictionary_learning`` for rules that keep the largest and for JumpReLU (FVU 0.0184 -> 0.0154, dead 45 ->
    20 %, in 600 steps on the bundled model), None for ReLU and gates (the same FVU with it, dead 38 -> 29 %, 37 -> 34 %;
    ``saelens``, which aims at the whole residual, ruins all of these). ``auxk_weight`` and ``k_aux`` default to the preset's
    weight and ``d_in / 2``. A latent is dead in a batch if it did not fire in the last ``dead_after`` tokens before it, by default a 100th of the run, at
    most 10M.

    ``terms`` are weights of further terms by their names in :data:`mlxsae.loss.TERMS`; None means those that the rule
    cannot do without (:data:`mlxsae.loss.DEFAULT_TERMS`: JumpReLU's L0, ReLU's L1, ...). They rise linearly from 0 over
    the fraction ``warmup`` of the run (steps where over 1). With ``target_l0`` those of them in :data:`SPARSITY` are not
    constants: a controller multiplies their weights until so many latents fire for a token
    (:class:`~mlxsae.train.pressure.SparsityController`).

    ``end_to_end`` puts ``kl`` or ``cross_entropy`` of the model's predictions, with the reconstruction in place of the
    activation, in place of the reconstruction term, which is only watched then. It wants the doors that have the model
    and text (``train_sae``); steps are then whole contexts of about ``batch_size`` tokens in all.

    ``p_end`` anneals the power of the term ``lp`` linearly from 1, when ``warmup`` is over, to there at the end, at the size
    that L1 has (:class:`mlxsae.loss.Lp`).

    ``prefixes`` makes the SAE a Matryoshka: widths as ascending shares of ``d_sae`` (or numbers of latents, over 1), the
    full width being added; ``random_prefixes`` draws so many anew for each step instead.
    """

    reconstruction: str = "fvu"
    terms: dict[str, float] | None = None
    end_to_end: str | None = None
    p_end: float | None = None
    warmup: float = 0.0
    target_l0: float | None = None
    prefixes: tuple[float, ...] | None = None
    random_prefixes: int | None = None
    auxk: str | None = "auto"
    auxk_weight: float | None = None
    k_aux: int | None = None
    dead_after: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = sorted(RECONSTRUCTION)
        _require("reconstruction", self.reconstruction, self.reconstruction in known, f"be one of {known}")
        for name, weight in (self.terms or {}).items():
            _require("terms", name, name in TERMS, f"be among {sorted(TERMS)}")
            _require(f"terms.{name}", weight, weight >= 0, "not be negative")
        _require("warmup", self.warmup, self.warmup >= 0, "not be negative")
        known = sorted(END_TO_END)
        fits = self.end_to_end is None or self.end_to_end in known
        _require("end_to_end", self.end_to_end, fits, f"be None or one of {known}")
        if self.p_end is not None:
            _require("p_end", self.p_end, 0 < self.p_end <= 1, "lie in (0, 1]")
            _require("terms", self.terms, "lp" in (self.terms or {}), "have lp where p_end is given")
        if self.target_l0 is not None:
            _require("target_l0", self.target_l0, self.target_l0 > 0, "be positive")
            _require(
                "target_l0", self.target_l0, self.end_to_end is None, "be None where end_to_end is given"
            )
        if self.prefixes is not None and self.random_prefixes is not None:
            raise ValueError("[config] prefixes and random_prefixes must not both be given but are.")
        self._prefixes()
        presets = ["auto", *sorted(AUXK_PRESETS)]
        _require("auxk", self.auxk, self.auxk is None or self.auxk in presets, f"be None or one of {presets}")
        if self.auxk_weight is not None:
            _require("auxk_weight", self.auxk_weight, self.auxk_weight >= 0, "not be negative")
        if self.k_aux is not None:
            _require("k_aux", self.k_aux, self.k_aux > 0, "be positive")
        if self.dead_after is not None:
            _require("dead_after", self.dead_after, self.dead_after > 0, "be positive")

    def _prefixes(self) -> Prefixes | None:
        if self.random_prefixes is not None:
            return RandomPrefixes(self.random_prefixes)
        return None if self.prefixes is None else FixedPrefixes(self.prefixes)

    def preset_for(self, rule: Rule) -> str | None:
        """The preset of AuxK for an SAE of ``rule``."""
        if self.auxk != "auto":
            return self.auxk
        return "dictionary_learning" if rule.takes_auxk else None

    def build(
        self,
        sae: SAE,
        total_steps: int = 0,
        end_to_end: Term | None = None,
        pressure: Callable[[], float] | None = None,
    ) -> Loss:
        """The loss for ``sae`` in a run of ``total_steps``; ``end_to_end`` is the term that the field of this name asks for,
        ``pressure`` gives the factor on sparsity terms of the step at hand, where the run has a ``target_l0``.
        """
        if self.end_to_end is not None and end_to_end is None:
            raise ValueError(
                f"[config] end_to_end must be None without a model and text but got {self.end_to_end!r}; "
                "train_sae has them, or give fit a loss."
            )
        auxk, d_in = None, sae.d_in
        if (preset := self.preset_for(sae.rule)) is not None:
            weight = AUXK_PRESETS[preset].weight if self.auxk_weight is None else self.auxk_weight
            auxk = weight, AuxK(max(d_in // 2, 1) if self.k_aux is None else self.k_aux, preset)
        weights = DEFAULT_TERMS.get(sae.rule.architecture, {}) if self.terms is None else self.terms
        if self.target_l0 is not None and not weights.keys() & SPARSITY:
            raise ValueError(
                f"[config] target_l0 must come with a term among {sorted(SPARSITY)} but got {sorted(weights)}; rules with "
                "a k, and l0_target, aim at that."
            )
        if isinstance(sae.rule, Gated) and "gate_reconstruction" not in weights:
            raise ValueError(
                "[config] terms must have gate_reconstruction for a Gated, whose gate learns from nothing else, but have "
                f"{sorted(weights)}."
            )
        if self.target_l0 is not None and self.target_l0 > sae.d_sae:
            raise ValueError(
                f"[config] target_l0 must be at most d_sae={sae.d_sae} but got {self.target_l0}."
            )
        rising = in_steps(self.warmup, total_steps)

        def weight_of(name: str, weight: float) -> Weight:
            factor = pressure if name in SPARSITY else None
            if not rising and factor is None:
                return weight
            return lambda step: (
                weight
                * (min(1.0, (step + 1) / rising) if rising else 1.0)
                * (1.0 if factor is None else factor())
            )

        terms = {name: (weight_of(name, weight), TERMS[name]) for name, weight in weights.items()}
        if self.p_end is not None:
            begin = min(rising, total_steps - 1)
            terms["lp"] = terms["lp"][0], Lp(anneal(1.0, self.p_end, begin, total_steps), like=1.0)
        if end_to_end is not None and self.end_to_end is not None:
            terms[self.end_to_end] = 1.0, end_to_end
        share = 1.0 if end_to_end is None else 0.0
        reconstruction = {self.reconstruction: (share, RECONSTRUCTION[self.reconstruction])}
        return Loss(reconstruction, auxk, terms, self._prefixes())


@dataclass(frozen=True)
class TrainConfig(_Config):
    """One run of ``fit``.

    The run is ``total_tokens`` long, or ``epochs`` passes over data that know their length.

    ``normalize`` is folded into the weights of the SAE that comes out: ``expected_norm`` scales activations so that
    their mean norm is ``sqrt(d_in)``, ``mean_std`` brings each coordinate to mean 0 and standard deviation 1, ``whiten``
    multiplies what is left of the mean by ``C^(-whitening / 2)`` for the covariance ``C``, 1 being full whitening: loud
    directions then count less in the loss (:meth:`mlxsae.train.initial.Spread.whitening`). ``layer_norm``
    brings each token there; no weights can do that, so the SAE does it in use too (``SAE.normalize_activations``).
    ``b_dec_init`` is ``geometric_median``, ``mean`` or ``keep``; both normalisation and initial ``b_dec`` come from
    ``sample_size`` rows, and so do the dictionary's first directions where ``decoder_init`` is ``pca``, ``data`` or
    ``random`` (:func:`~mlxsae.train.initialize`) and not ``keep``. None is ``keep``, since ``fit`` may be given weights that
    are worth keeping, but :class:`SAEConfig`, which makes its SAE, has ``data``: rows of the sample are a tenth better (FVU
    0.027 in place of 0.030 for a BatchTopK of 2,048 latents after 2M tokens). An SAE whose encoder has a bias was trained
    before, and keeps its directions and ``b_dec``, as frozen ones are kept. ``normalize_decoder`` keeps decoder rows at unit norm and removes the gradient along them.
    ``engine`` is ``auto``, ``autodiff`` or ``fused``.

    ``precision`` is that of the encoder's product; parameters and the update are float32 in each.

    - ``float32``: the float32 result. On a GPU too: where its product is less exact (TF32 on NVIDIA and M5), that only
      screens. On x86 a product of whole numbers screens where that is faster (:func:`mlxsae.ops.topk_encode`).
    - ``certified``: the same bits. Multiplies in 8 or 16 bits, by a copy of the encoder that the update renews, and
      computes again in float32 whatever a proven error bound cannot decide.
    - ``tf32``: what the GPU's float32 product gives, TF32 included: latents and values are not exact. The float32 result
      on the CPU, which has no such product.
    - ``bfloat16``: operands rounded to bfloat16. On a GPU selection and values are those of its bfloat16 product: fast,
      not exact, full of ties. On the CPU selection is exact on the rounded operands.

    ``certified`` and ``bfloat16`` keep a copy of the encoder in 16 bits and want the fused engine. The autodiff engine's
    other products are MLX's, which on NVIDIA are TF32 unless ``MLX_ENABLE_TF32=0``: under ``float32`` it warns.

    ``gradient_accumulation_steps``, ``mixed_precision`` (bfloat16 over float32 masters) and
    ``gradient_checkpointing`` are for the autodiff engine, see :mod:`mlxsae.train.gradients`; a step then takes
    ``gradient_accumulation_steps * batch_size`` rows. The fused engine holds nothing that they could save.

    ``k_start`` anneals the rule's ``k``: linearly from there to its own over the fraction ``k_warmup`` of the run (steps
    where over 1). ``wake`` is added to the encoder's bias of a latent at every step that finds it dead, until it fires, in
    units of the scaled activations. None is :data:`WAKE` where a bias is trained and the loss has AuxK, some of whose latents
    would never win a place among the selected without; 0 does nothing. ``resample_every`` makes dead latents anew from rows that are explained badly, every so many steps
    (:class:`~mlxsae.train.DeadNeuronCallback`).

    All randomness of a step comes from ``seed`` and the number of the step.
    """

    total_tokens: int = 2_000_000
    batch_size: int = 1024
    seed: int = 0
    epochs: float | None = None
    normalize: str = "expected_norm"
    whitening: float = 0.5
    b_dec_init: str = "geometric_median"
    decoder_init: str | None = None
    sample_size: int = 8192
    normalize_decoder: bool = True
    engine: str = "auto"
    precision: str = "float32"
    gradient_accumulation_steps: int = 1
    mixed_precision: bool = False
    gradient_checkpointing: bool = False
    k_start: int | None = None
    k_warmup: float = 0.1
    wake: float | None = None
    resample_every: int | None = None
    log_every: int = 100
    validate_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "total_tokens",
            "batch_size",
            "sample_size",
            "gradient_accumulation_steps",
            "log_every",
            "validate_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            _require(name, getattr(self, name), getattr(self, name) > 0, "be positive")
        _require("seed", self.seed, 0 <= self.seed < 2**64, "be in [0, 2^64)")
        if self.epochs is not None:
            _require("epochs", self.epochs, self.epochs > 0, "be positive")
        for name, values in (
            ("normalize", ("expected_norm", "layer_norm", "mean_std", "none", "whiten")),
            ("b_dec_init", ("geometric_median", "mean", "keep")),
            ("decoder_init", (None, "keep", "data", "pca", "random")),
            ("engine", ("auto", "autodiff", "fused")),
            ("precision", PRECISIONS),
        ):
            _require(name, getattr(self, name), getattr(self, name) in values, f"be one of {list(values)}")
        if self.k_start is not None:
            _require("k_start", self.k_start, self.k_start > 0, "be positive")
            _require("k_warmup", self.k_warmup, self.k_warmup > 0, "be positive where k_start is given")
        _require("whitening", self.whitening, 0 <= self.whitening <= 1, "lie from 0 to 1")
        _require("k_warmup", self.k_warmup, self.k_warmup >= 0, "not be negative")
        _require("wake", self.wake, self.wake is None or self.wake >= 0, "not be negative")
        if self.resample_every is not None:
            _require("resample_every", self.resample_every, self.resample_every > 0, "be positive")

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def total_steps(self) -> int:
        return -(-self.total_tokens // self.rows_per_step)

    def k_at(self, step: int, rule: Rule, d_sae: int) -> int | None:
        """The ``k`` of a step of an annealed run, at most ``d_sae``; None where it is the rule's own."""
        steps = min(in_steps(self.k_warmup, self.total_steps), self.total_steps)
        if self.k_start is None or step >= steps:
            return None
        if (k := getattr(rule, "k", None)) is None:
            raise ValueError(f"[fit] k_start wants a rule with a k but got {type(rule).__name__}.")
        start = min(self.k_start, d_sae)
        return round(start + (k - start) * step / steps)

    @property
    def dead_after(self) -> int:
        """Tokens without firing after which a latent is dead; silence is counted to 2**31 - 1."""
        return min(self.loss.dead_after or max(1, min(10_000_000, self.total_tokens // 100)), 2**31 - 1)

    @property
    def autodiff_only(self) -> str:
        """What of this run only the autodiff engine can do; empty where nothing is."""
        if self.optimizer.name != "adam":
            return f"the optimizer is {self.optimizer.name}"
        for name in ("mixed_precision", "gradient_checkpointing"):
            if getattr(self, name):
                return f"{name} is asked for"
        return "gradient_accumulation_steps is over 1" if self.gradient_accumulation_steps > 1 else ""


@dataclass(frozen=True)
class DataConfig(_Config):
    """How text becomes activations where a door reads it.

    ``hook_point`` serves an SAE whose door is given no layer, in any spelling that names one.
    ``validation_split`` of the documents, chosen by a hash of their text, is never trained on (none by default); the
    activations of at most ``validation_tokens`` of theirs serve for validation. ``context_size`` is that of the model, at most 256, unless
    given; ``lm_batch_size`` rows go through the model at once; ``buffer_tokens`` activations are held for shuffling
    (131,072, or what fits in 1 GiB).
    """

    hook_point: str | None = None
    validation_split: float = 0.0
    validation_tokens: int = 20_000
    context_size: int | None = None
    lm_batch_size: int = 16
    buffer_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        split = self.validation_split
        _require("validation_split", split, 0 <= split < 1, "be a fraction in [0, 1)")
        for name in ("validation_tokens", "context_size", "lm_batch_size", "buffer_tokens"):
            value = getattr(self, name)
            _require(name, value, value is None or value > 0, "be positive")


@dataclass(frozen=True)
class TrackingConfig(_Config):
    """Where a door sends metrics: Weights & Biases (``project``, ``name``, ``entity``, ``tags``), folders for TensorBoard
    and for plain files."""

    wandb: bool = False
    project: str = "mlxsae"
    entity: str | None = None
    name: str | None = None
    tags: tuple[str, ...] | None = None
    tensorboard: str | None = None
    local: str | None = None


T = TypeVar("T", bound=type)


def _flat_names_too(cls: T) -> T:
    """Let the constructor take :mod:`mlxsae.train.flat_names` beside the fields."""
    make, fields = cls.__init__, {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]

    @functools.wraps(make)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        for name, value in nested({k: v for k, v in options.items() if k not in fields}).items():
            if name not in fields:
                raise ValueError(f"[config] keys must be known but {cls.__name__} has no {name}.")
            if isinstance(value, dict):
                base = options.get(name) or fields[name].default_factory()  # type: ignore[misc]
                base = _value(_hints(cls)[name], base, name, True)
                value = type(base).from_dict(merged(base.to_dict(), value))
            options[name] = value
        make(self, *args, **{k: v for k, v in options.items() if k in fields})
        if (terms := _terms_of_flat_names(self, options)) is not None:
            loss = dataclasses.replace(self.train.loss, terms=terms)
            object.__setattr__(self, "train", dataclasses.replace(self.train, loss=loss))
        if options.get("sparsity_warm_up_steps") and self.train.k_start is None:
            rule = RULES[self.architecture]
            if "k" in rule.PARAMETERS and rule.with_k is Rule.with_k:  # no penalty rises: k falls
                object.__setattr__(self, "train", dataclasses.replace(self.train, k_start=K_FROM * self.k))

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


def _terms_of_flat_names(config: Any, options: dict[str, Any]) -> dict[str, float] | None:
    """Terms for what flat names mean to the architecture at hand; None where they say enough by themselves. An L1 on a
    gated SAE is one on its gate, and ghost gradients are a term where there is no AuxK to do their work.
    """
    architecture, loss = config.architecture, config.train.loss
    usual = DEFAULT_TERMS.get(architecture, {})
    given = terms = usual if loss.terms is None else loss.terms
    weight = options.get("lambda_sparse") or options.get("l1_coefficient")
    if architecture == "gated" and weight:
        terms = usual | {"gate_l1": weight}
    if options.get("use_ghost_grads") and loss.auxk == "auto" and not RULES[architecture].takes_auxk:
        terms = {"ghost_gradients": GHOSTS} | terms
    return None if terms == given else terms


@_flat_names_too
@dataclass(frozen=True)
class SAEConfig(_Config):
    """An SAE, how to train it, and what on. ``d_sae`` overrides ``expansion_factor``; ``d_in`` comes from the data if
    None. ``architecture`` names a rule of :data:`mlxsae.sae.RULES`, ``rule`` gives its further arguments. ``tied`` makes
    the decoder the encoder's transpose. The SAE starts from rows of data unless ``train.decoder_init`` says otherwise or a
    penalty makes it sparse (:data:`mlxsae.loss.DEFAULT_TERMS`): a ReLU's latents then all fail together (FVU 0.98 in place
    of 0.08 after 300 steps at a wanted L0), so it starts from random directions.

    The constructor also takes the flat names of :mod:`mlxsae.train.flat_names`: ``SAEConfig(learning_rate=3e-4)``.
    """

    MADE_FROM: ClassVar[str | None] = "data"
    """``train.decoder_init`` where it is None."""

    d_in: int | None = None
    d_sae: int | None = None
    expansion_factor: int = 32
    architecture: str = "topk"
    k: int = 32
    rule: dict[str, Any] | None = None
    tied: bool = False
    dtype: str = "float32"
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        by_penalty = self.architecture in DEFAULT_TERMS
        if self.train.decoder_init is None and self.MADE_FROM is not None and not by_penalty:
            object.__setattr__(self, "train", dataclasses.replace(self.train, decoder_init=self.MADE_FROM))
        for name in ("d_in", "d_sae", "expansion_factor", "k"):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), getattr(self, name) > 0, "be positive")
        known = sorted(RULES)
        _require("architecture", self.architecture, self.architecture in known, f"be one of {known}")
        arguments = sorted({"k", *RULES[self.architecture].PARAMETERS})
        for name in self.rule or {}:
            _require("rule", name, name in arguments, f"have only the keys {arguments}")
        dtypes = ("float32", "float16", "bfloat16")
        _require("dtype", self.dtype, self.dtype in dtypes, f"be one of {list(dtypes)}")

    def _require_any_shape(self, what: str) -> None:
        """What only an SAE can be."""
        _require("tied", self.tied, not self.tied, f"be False for {what}")
        fits = not RULES[self.architecture].own_sae
        _require("architecture", self.architecture, fits, f"be a rule that {what} can have")

    @classmethod
    def from_model(
        cls, model: Any, layer: int | None = None, *, layer_idx: int | None = None, **options: Any
    ) -> Self:
        """For the stream after block ``layer`` (or ``layer_idx``) of a model (a ``LanguageModel`` or a facade with one in
        ``lm``)."""
        layer = layer_idx if layer is None else layer
        if layer is None:
            raise ValueError("[SAEConfig.from_model] layer must be given.")
        d_in = getattr(model, "lm", model).d_model
        return cls(**{"d_in": d_in, "hook_point": f"blocks.{layer}.hook_resid_post"} | options)

    def build(self, d_in: int) -> SAE:
        """The untrained SAE for activations of width ``d_in``."""
        return of_rule(d_in, self._width(d_in), **self._arguments(), tied=self.tied)

    def _width(self, d_in: int) -> int:
        if self.d_in is not None and self.d_in != d_in:
            raise ValueError(
                f"[{type(self).__name__}] d_in must be the activations' width {d_in} but got d_in={self.d_in}."
            )
        return self.expansion_factor * d_in if self.d_sae is None else self.d_sae

    def _arguments(self) -> dict[str, Any]:
        rule_type = RULES[self.architecture]
        known = {"k": self.k} if "k" in rule_type.PARAMETERS else {}
        rule = rule_type(**known | (self.rule or {}))
        return {"rule": rule, "dtype": getattr(mx, self.dtype), "seed": self.train.seed}


@_flat_names_too
@dataclass(frozen=True)
class TranscoderConfig(SAEConfig):
    """A transcoder: reads one activation, predicts another. ``skip`` adds a linear path from input to target."""

    MADE_FROM = None

    expansion_factor: int = 8
    k: int = 50
    skip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_any_shape("a transcoder")

    def build(self, d_in: int, d_out: int | None = None) -> SAE:
        """The untrained transcoder from width ``d_in`` to ``d_out``."""
        d_out = d_in if d_out is None else d_out
        skip: dict[str, Any] = {"skip": True} if self.skip else {}
        return SAE(d_in, self._width(d_in), d_out=d_out, **self._arguments(), **skip)


@_flat_names_too
@dataclass(frozen=True)
class CrosscoderConfig(SAEConfig):
    """A crosscoder: one dictionary for ``n_sources`` activations of one width. ``expansion_factor`` is ``d_sae`` over the
    width of one source. ``source_weights`` weigh the sources' squared errors, alike by default. Each source gets a scale
    of its own, folded into the weights; with ``rank_by_decoder_norm``, where that cannot be, all get one.
    """

    MADE_FROM = None

    expansion_factor: int = 24
    k: int = 150
    source_weights: tuple[float, ...] | None = None
    rank_by_decoder_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_any_shape("a crosscoder")
        weights = self.source_weights
        _require("source_weights", weights, weights is None or min(weights, default=0) > 0, "be positive")

    def build(self, d_in: int, n_sources: int = 2) -> SAE:
        """The untrained crosscoder for ``n_sources`` activations of width ``d_in``."""
        if self.source_weights is not None and len(self.source_weights) != n_sources:
            raise ValueError(
                f"[CrosscoderConfig] source_weights must be {n_sources} numbers but got {self.source_weights}."
            )

        made = Crosscoder(
            d_in,
            n_sources,
            self._width(d_in),
            rank_by_decoder_norm=self.rank_by_decoder_norm,
            **self._arguments(),
        )
        if self.source_weights is not None:
            made.metadata = made.metadata | {"source_weights": list(self.source_weights)}
        return made


@_flat_names_too
@dataclass(frozen=True)
class CrossLayerConfig(SAEConfig):
    """A cross-layer transcoder. ``expansion_factor`` is the latents of one layer over the width of the stream, or ``d_sae``
    the latents of one layer; ``k`` counts per token and layer. Decoder rows have no norm of their own, and begin at 0.
    """

    MADE_FROM = None

    expansion_factor: int = 8
    k: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_any_shape("a cross-layer transcoder")

    def build(self, d_in: int, n_layers: int = 2) -> SAE:
        """The untrained transcoder of ``n_layers`` layers of width ``d_in``."""
        return CrossLayerTranscoder(d_in, n_layers, self._width(d_in), **self._arguments())


C = TypeVar("C", bound=SAEConfig)


def overruled(config: C, options: dict[str, Any]) -> C:
    """``config`` with ``options`` in place of what it says: its own fields, or flat names. A ``k`` among them is an L0 to
    reach where a penalty makes the SAE sparse and no weight of it is given (:func:`wanting_l0`).
    """
    names = [f.name for f in dataclasses.fields(config)]
    made = type(config)(**({name: getattr(config, name) for name in names} | options))
    weighed = made.train.loss.terms is not None or isinstance(made, CrossLayerConfig)  # whose k is a layer's
    return made if options.get("k") is None or weighed else wanting_l0(made, options["k"])


def wanting_l0(config: C, k: float) -> C:
    """``config`` with ``train.loss.target_l0 = k`` where nothing else can say how many latents fire: the rule has no ``k``
    and the loss has a term of :data:`SPARSITY`. Any other as it is, also one that wants an L0 already.
    """
    loss = config.train.loss
    terms = DEFAULT_TERMS.get(config.architecture, {}) if loss.terms is None else loss.terms
    settled = loss.target_l0 is not None or loss.end_to_end is not None
    if settled or "k" in RULES[config.architecture].PARAMETERS or SPARSITY.isdisjoint(terms):
        return config
    train = dataclasses.replace(config.train, loss=dataclasses.replace(loss, target_l0=float(k)))
    return dataclasses.replace(config, train=train)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid upon ``base``, object by object."""
    found = dict(base)
    for key, value in over.items():
        old = found.get(key)
        found[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return found


def _require(name: str, value: Any, holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"[config] {name} must {what} but got {value!r}.")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _parse(cls: Any, values: Any, path: str, partial: bool) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"[config] {path.rstrip('.') or cls.__name__} must be an object but got {values!r}.")
    hints = _hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(
            f"[config] keys must be known but got {_join(path, unknown)}; known are {sorted(fields)}."
        )
    if (missing := sorted(fields.keys() - values.keys())) and not partial:
        raise ValueError(f"[config] every key must be given but {_join(path, missing)} is missing.")
    return cls(
        **{name: _value(fields[name], value, f"{path}{name}", partial) for name, value in values.items()}
    )


def _value(kind: Any, value: Any, path: str, partial: bool) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else _parse(kind, value, path + ".", partial)
    if isinstance(kind, types.UnionType):  # X | None
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"[config] {path} must be an object but got {value!r}.")
        of = typing.get_args(kind)[1]
        return {k: v if of is Any else _value(of, v, f"{path}.{k}", partial) for k, v in value.items()}
    if typing.get_origin(kind) is tuple:
        members = typing.get_args(kind)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"[config] {path} must be a list but got {value!r}.")
        if members[-1] is Ellipsis:
            members = members[:1] * len(value)
        if len(value) != len(members):
            raise ValueError(f"[config] {path} must be a list of {len(members)} but got {value!r}.")
        return tuple(
            _value(k, v, f"{path}[{i}]", partial) for i, (k, v) in enumerate(zip(members, value, strict=True))
        )
    accepted = {float: numbers.Real, int: numbers.Integral}.get(kind, kind)  # NumPy's too
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"[config] {path} must be {kind.__name__} but got {value!r}.")
    return kind(value)


def _join(path: str, names: list[str]) -> str:
    return ", ".join(path + name for name in names)
