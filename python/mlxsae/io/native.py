"""The native format: a folder in SAELens' layout, so that SAELens and every tool around it opens what we
save.

``cfg.json``                architecture, sizes and free-form metadata, the keys of SAELens 6
``sae_weights.safetensors`` ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_out]``, ``b_enc``, ``b_dec``, and ``threshold
                            [d_sae]`` of a JumpReLU
``metadata.json``           what SAELens has no place for: our format version, the rule's arguments, training, metrics

``cfg.json`` names the function that the SAE is in use: a BatchTopK SAE is a JumpReLU with one threshold, as SAELens saves
its own. ``metadata.json`` remembers the rule that it was trained by, which :func:`load` gives back.

Memory is feature-major; ``W_enc`` is transposed here, once, on the way in and out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlxsae.io import arrays, atomic
from mlxsae.sae import RULES, SAE, BatchTopK, Crosscoder, Gated, JumpReLU, ReLU, Rule, TopK

WEIGHTS, CONFIG, METADATA = "sae_weights.safetensors", "cfg.json", "metadata.json"
FORMAT_VERSION = 1
SAELENS_VERSION = "6.54.12"
"""The SAELens release whose layout this is; its loader takes older files for another format."""

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_REQUIRED = {
    "architecture",
    "d_in",
    "d_sae",
    "dtype",
    "apply_b_dec_to_input",
    "normalize_activations",
    "metadata",
}
_OPTIONAL = {"device", "reshape_activations", "rescale_acts_by_decoder_norm"}
# Keys of cfg.json's metadata, in SAELens' words; everything else in SAE.metadata goes to metadata.json.
_SAELENS_METADATA = (
    "model_name",
    "model_class_name",
    "hook_name",
    "hook_name_out",
    "hook_head_index",
    "hook_head_index_out",
    "context_size",
    "prepend_bos",
    "exclude_special_tokens",
    "seqpos_slice",
    "dataset_path",
    "neuronpedia_id",
)


def save(sae: SAE, directory: str | os.PathLike, *, metadata: dict[str, Any] | None = None) -> None:
    """Save ``sae`` into ``directory``; ``metadata`` is merged over ``sae.metadata``.

    The three files are complete on disk before the first replaces an earlier one: a full disk, an unwritable
    folder or a crash leaves the earlier SAE whole.

    Raises
    ------
    ValueError : a rule or a shape that files do not know, metadata that JSON cannot hold.
    OSError : the folder cannot be written.
    """
    function, arguments, extra = _function(sae.rule, sae.d_sae)
    shape = _shape(sae)
    known = sae.metadata | (metadata or {})
    config: dict[str, Any] = {
        # Where SAELens has nothing of this function and shape, a name of our own makes it refuse the file, not misread it.
        "architecture": _name(function, shape),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.dtype).removeprefix("mlx.core."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": sae.normalize_activations,
        "reshape_activations": "none",
        **arguments,
        "metadata": {"sae_lens_version": SAELENS_VERSION}
        | {key: known[key] for key in _SAELENS_METADATA if key in known},
    }
    if "d_out" in _SHAPES[shape]:
        config["d_out"] = sae.d_out
    if isinstance(sae, Crosscoder):
        config |= {"n_sources": sae.n_sources, "rank_by_decoder_norm": int(sae.rank_by_decoder_norm)}
    if function == "topk":
        config["rescale_acts_by_decoder_norm"] = False
    bias = _ENCODER_BIAS.get(function, "b_enc")
    weights = {
        "W_enc": sae.encoder.weight.T,
        "W_dec": sae.decoder.weight,
        bias: sae.b_enc,
        "b_dec": sae.decoder.bias,
    }
    if "W_skip" in sae:
        weights["W_skip"] = sae.W_skip
    if sae.rank_by_decoder_norm and not isinstance(sae, Crosscoder):
        weights = _with_norms_folded(weights, bias)
    rule = {"architecture": sae.rule.architecture} | sae.rule.config()
    ours = {"format": "mlxsae", "format_version": FORMAT_VERSION, "rule": rule, "metadata": known}
    atomic.write_files(
        directory,
        {
            WEIGHTS: arrays.writer(weights | extra, {"format": "pt"}),
            METADATA: atomic.json_writer(ours),
            CONFIG: atomic.json_writer(config),
        },
    )


def load(directory: str | os.PathLike) -> SAE:
    """The SAE saved in ``directory`` by :func:`save` or, for architectures we have, by SAELens 6.

    Raises
    ------
    FileNotFoundError : the folder, ``cfg.json`` or the weights are missing.
    ValueError : damaged or truncated files, unknown or missing configuration keys, shapes that contradict the
        configuration; each message names file and fault.
    """
    directory = Path(directory)
    for path in (directory, directory / CONFIG, directory / WEIGHTS):
        if not path.exists():
            raise FileNotFoundError(f"[load] {path} must exist but does not.")
    config = _read_json(directory / CONFIG)
    name = config.get("architecture")
    names = {_name(function, shape): (function, shape) for function in _FUNCTIONS for shape in _SHAPES}
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"[load] architecture must be one of {sorted(names)} but got {name!r} in {CONFIG}.")
    function, kind = names[name]
    _check_config(config, _SHAPES[kind], _FUNCTIONS[function].arguments)
    d_in, d_sae, d_out = config["d_in"], config["d_sae"], config.get("d_out", config["d_in"])
    weights = arrays.read(directory / WEIGHTS)
    bias = _ENCODER_BIAS.get(function, "b_enc")
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), bias: (d_sae,), "b_dec": (d_out,)}
    shapes |= {key: (d_sae,) for key in _FUNCTIONS[function].extra}
    shapes |= {"W_skip": (d_out, d_in)} if kind == "skip_transcoder" else {}
    if weights.keys() != shapes.keys():
        raise ValueError(
            f"[load] {WEIGHTS} must hold {sorted(shapes)} but lacks {sorted(shapes.keys() - weights.keys())} "
            f"and has unknown {sorted(weights.keys() - shapes.keys())}."
        )
    for key, shape in shapes.items():
        if weights[key].shape != shape:
            raise ValueError(
                f"[load] {key} must have shape {shape} by {CONFIG} but got {weights[key].shape}."
            )
    if config.get("rescale_acts_by_decoder_norm"):
        # Selection on pre_acts * |W_dec|, decoding by W_dec / |W_dec|: the same function with the norms
        # folded in.
        weights = _with_norms_folded(weights, bias)
    dtype = _DTYPES[config["dtype"]]
    ours = _metadata(_read_json(directory / METADATA)) if (directory / METADATA).exists() else {}
    sae = (Crosscoder if kind == "crosscoder" else SAE).from_weights(
        *(weights[key].astype(dtype) for key in ("W_enc", "W_dec", bias, "b_dec")),
        rule=_rule(function, config, weights, ours.get("rule", {})),
        apply_b_dec_to_input=config["apply_b_dec_to_input"],
    )
    if kind == "skip_transcoder":
        sae.W_skip = weights["W_skip"].astype(dtype)
    if isinstance(sae, Crosscoder):
        sae.n_sources, sae.rank_by_decoder_norm = config["n_sources"], bool(config["rank_by_decoder_norm"])
    sae.normalize_activations = config["normalize_activations"]
    sae.metadata = {k: v for k, v in config["metadata"].items() if not k.startswith("sae_lens_")}
    sae.metadata = sae.metadata | ours.get("metadata", {})
    mx.eval(sae.parameters())
    return sae


class _Function(NamedTuple):
    """What files hold of a function from pre-activations to latents, in SAELens' words."""

    arguments: set[str]  # its keys in cfg.json
    extra: tuple[str, ...]  # its arrays [d_sae]


_FUNCTIONS = {
    "topk": _Function({"k"}, ()),
    "jumprelu": _Function(set(), ("threshold",)),
    "standard": _Function(set(), ()),
    "gated": _Function(set(), ("r_mag", "b_mag")),
}
# Gated SAEs have no b_enc: the encoder's bias is the gate's.
_ENCODER_BIAS = {"gated": "b_gate"}


# What surrounds the function, with further keys of cfg.json.
_SHAPES: dict[str, set[str]] = {
    "": set(),
    "transcoder": {"d_out"},
    "skip_transcoder": {"d_out"},
    "crosscoder": {"n_sources", "rank_by_decoder_norm"},
}


def _name(function: str, shape: str) -> str:
    """``jumprelu_skip_transcoder``; SAELens' plain ``transcoder`` is one of the standard function."""
    if function == "standard" and shape.endswith("transcoder"):
        return shape
    return f"{function}_{shape}" if shape else function


def _shape(sae: SAE) -> str:
    if type(sae) not in (SAE, Crosscoder):
        raise ValueError(
            f"[save] the SAE must be a plain one, a transcoder or a crosscoder but is a {type(sae).__name__}; "
            "save its parameters with sae.save_weights."
        )
    if isinstance(sae, Crosscoder):
        return "crosscoder"
    if "W_skip" in sae:
        return "skip_transcoder"
    return "" if sae.d_out == sae.d_in else "transcoder"


def _with_norms_folded(weights: dict[str, mx.array], bias: str) -> dict[str, mx.array]:
    """Selection on pre_acts * |W_dec|, decoding by W_dec / |W_dec|: the same function with the norms folded in. (A threshold
    is already one of pre_acts * |W_dec|.)"""
    norm = mx.linalg.norm(weights["W_dec"].astype(mx.float32), axis=-1)
    factors = {"W_enc": norm, bias: norm, "W_dec": 1 / norm[:, None]}
    return weights | {
        key: (weights[key].astype(mx.float32) * factor).astype(weights[key].dtype)
        for key, factor in factors.items()
    }


def _function(rule: Rule, d_sae: int) -> tuple[str, dict[str, Any], dict[str, mx.array]]:
    """What the rule is in use: the function's name, its keys in ``cfg.json``, its arrays."""
    if isinstance(rule, TopK):
        return "topk", {"k": rule.k}, {}
    if isinstance(rule, JumpReLU):
        return "jumprelu", {}, {"threshold": rule.threshold}
    if isinstance(rule, BatchTopK):
        if rule.threshold is None:
            raise ValueError(
                "[save] a BatchTopK rule must have a threshold but has none: train the SAE, or mlxsae.sae.calibrate it."
            )
        return "jumprelu", {}, {"threshold": mx.full(d_sae, rule.threshold, mx.float32)}
    if isinstance(rule, ReLU):
        return "standard", {}, {}
    if isinstance(rule, Gated):
        return "gated", {}, {"r_mag": rule.r_mag, "b_mag": rule.b_mag}
    known = ["batchtopk", "gated", "jumprelu", "relu", "topk"]
    raise ValueError(
        f"[save] rule must be one of {known} but got {type(rule).__name__}; "
        "save its parameters with sae.save_weights."
    )


def _rule(function: str, config: dict[str, Any], weights: dict[str, mx.array], ours: dict[str, Any]) -> Rule:
    """The rule of a function; the one it was trained by where our own metadata remember that."""
    options = {key: value for key, value in ours.items() if key != "architecture"}
    rule_type = RULES.get(ours.get("architecture", function), JumpReLU)
    if unknown := sorted(options.keys() - set(rule_type.PARAMETERS)):
        raise ValueError(f"[load] the rule in {METADATA} must have only known keys but has {unknown}.")
    if function == "topk":
        return TopK(config["k"])
    if function == "standard":
        return ReLU()
    if function == "gated":
        rule = Gated()
        rule.r_mag, rule.b_mag = weights["r_mag"], weights["b_mag"]
        return rule
    return BatchTopK(**options) if rule_type is BatchTopK else JumpReLU.of(weights["threshold"], **options)


def _check_config(config: dict[str, Any], extra: set[str], rule: set[str]) -> None:
    required = _REQUIRED | extra | rule
    if missing := sorted(required - config.keys()):
        raise ValueError(f"[load] {CONFIG} must have the keys {sorted(required)} but lacks {missing}.")
    if unknown := sorted(config.keys() - required - _OPTIONAL):
        raise ValueError(f"[load] {CONFIG} must have only known keys but has {unknown}.")
    for key in ("d_in", "d_sae", *(extra - {"rank_by_decoder_norm"})):
        if isinstance(config[key], bool) or not isinstance(config[key], int) or config[key] <= 0:
            raise ValueError(f"[load] {key} must be a positive integer but got {config[key]!r} in {CONFIG}.")
    allowed: dict[str, tuple[Any, ...]] = {
        "dtype": tuple(_DTYPES),
        "apply_b_dec_to_input": (True, False),
        # Those that are one factor are folded into the weights by the field, and by us.
        "normalize_activations": ("none", "layer_norm"),
        "reshape_activations": ("none",),
        "rescale_acts_by_decoder_norm": (True, False),
        "rank_by_decoder_norm": (0, 1),
    }
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise ValueError(
                f"[load] {key} must be one of {list(values)} but got {config[key]!r} in {CONFIG}."
            )
    if not isinstance(config["metadata"], dict):
        raise ValueError(f"[load] metadata must be an object but got {config['metadata']!r} in {CONFIG}.")


def _metadata(ours: dict[str, Any]) -> dict[str, Any]:
    if ours.get("format") != "mlxsae" or not isinstance(ours.get("metadata"), dict):
        raise ValueError(f"[load] {METADATA} must be written by mlxsae but has the keys {sorted(ours)}.")
    if ours.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"[load] format_version must be at most {FORMAT_VERSION} but got {ours['format_version']}; "
            "update mlxsae."
        )
    return ours


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"[load] {path} must be JSON but is damaged ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"[load] {path} must be a JSON object but is a {type(value).__name__}.")
    return value
