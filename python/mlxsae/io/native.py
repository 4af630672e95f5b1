"""The native format: a folder in SAELens' layout, so that SAELens and every tool around it opens what we
save.

``cfg.json``                architecture, sizes and free-form metadata, the keys of SAELens 6
``sae_weights.safetensors`` ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_out]``, ``b_enc``, ``b_dec``, and ``threshold
                            [d_sae]`` of a JumpReLU; a cross-layer transcoder has two files a layer
                            (:mod:`mlxsae.io.cross_layer`)
``metadata.json``           what SAELens has no place for: our format version, the rule's arguments, training, metrics

``cfg.json`` names the function that the SAE is in use: a BatchTopK SAE is a JumpReLU with one threshold, as SAELens saves
its own. ``metadata.json`` remembers the rule that it was trained by, which :func:`load` gives back.

Memory is feature-major; ``W_enc`` is transposed here, once, on the way in and out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxsae.io import arrays, atomic, cross_layer
from mlxsae.io.rules import FUNCTIONS, files_know, function_of, rule_of
from mlxsae.sae import SAE, Crosscoder, CrossLayerTranscoder, HierarchicalSAE
from mlxsae.sae.model import row_norms

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


def holds(sae: SAE) -> bool:
    """Whether files know this shape and this rule. What they do not know keeps its weights by ``sae.save_weights``."""
    rule = cross_layer.one_rule(sae) if isinstance(sae, CrossLayerTranscoder) else sae.rule
    return type(sae) in (SAE, HierarchicalSAE, Crosscoder, CrossLayerTranscoder) and files_know(rule)


def save(sae: SAE, directory: str | os.PathLike, *, metadata: dict[str, Any] | None = None) -> None:
    """Save ``sae`` into ``directory``, where ``~`` is home; ``metadata`` is merged over ``sae.metadata``.

    All files are complete on disk before the first replaces an earlier one: a full disk, an unwritable
    folder or a crash leaves the earlier SAE whole.

    Raises
    ------
    ValueError : a rule or a shape that files do not know, metadata that JSON cannot hold.
    OSError : the folder cannot be written.
    """
    directory = Path(directory).expanduser()
    shape = _shape(sae)
    layered = isinstance(sae, CrossLayerTranscoder)
    used = cross_layer.one_rule(sae) if layered else sae.rule
    function, arguments, extra = function_of(used, sae.d_sae)
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
    if layered:
        config["n_layers"] = sae.n_layers
    if function == "topk":
        config["rescale_acts_by_decoder_norm"] = False
    rule = {"architecture": used.architecture} | used.config()
    ours = {"format": "mlxsae", "format_version": FORMAT_VERSION, "rule": rule, "metadata": known}
    try:
        texts = {METADATA: atomic.json_writer(ours), CONFIG: atomic.json_writer(config)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"[save] metadata must be what JSON can hold but {error}.") from error
    weights = cross_layer.files(sae, known) if layered else {WEIGHTS: _weights(sae, function, extra)}
    atomic.write_files(directory, weights | texts)
    cross_layer.remove_others(directory, weights)


def load(directory: str | os.PathLike) -> SAE:
    """The SAE saved in ``directory`` by :func:`save` or, for architectures we have, by SAELens 6; or the cross-layer
    transcoder saved there by circuit-tracer.

    Raises
    ------
    FileNotFoundError : the folder, ``cfg.json`` or the weights are missing.
    ValueError : damaged or truncated files, unknown or missing configuration keys, shapes that contradict the
        configuration; each message names file and fault.
    """
    directory = Path(directory).expanduser()
    _must_exist(directory)
    config = None if (directory / CONFIG).exists() else cross_layer.foreign(directory)
    if config is None:
        _must_exist(directory / CONFIG)
        config = read_json(directory / CONFIG)
    name = config.get("architecture")
    names = {_name(function, shape): (function, shape) for function in FUNCTIONS for shape in _SHAPES}
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"[load] architecture must be one of {sorted(names)} but got {name!r} in {CONFIG}.")
    function, kind = names[name]
    _check_config(config, _SHAPES[kind], set(FUNCTIONS[function].arguments))
    dtype = _DTYPES[config["dtype"]]
    ours = _metadata(read_json(directory / METADATA)) if (directory / METADATA).exists() else {}
    if kind == "cross_layer_transcoder":
        sae = cross_layer.load(directory, function, config, dtype, ours.get("rule", {}))
        return _described(sae, config, ours)
    _must_exist(directory / WEIGHTS)
    d_in, d_sae, d_out = config["d_in"], config["d_sae"], config.get("d_out", config["d_in"])
    weights = arrays.read(directory / WEIGHTS)
    bias = FUNCTIONS[function].bias
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), bias: (d_sae,), "b_dec": (d_out,)}
    shapes |= FUNCTIONS[function].shapes(d_in, d_sae)
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
        if not mx.issubdtype(weights[key].dtype, mx.floating):
            raise ValueError(f"[load] {key} must be floating point but got {weights[key].dtype}.")
    if config.get("rescale_acts_by_decoder_norm"):
        # Selection on pre_acts * |W_dec|, decoding by W_dec / |W_dec|: the same function with the norms
        # folded in.
        weights = _with_norms_folded(weights, bias)
    made = Crosscoder if kind == "crosscoder" else HierarchicalSAE if function == "hierarchical" else SAE
    sae = made.from_weights(
        *(weights[key].astype(dtype) for key in ("W_enc", "W_dec", bias, "b_dec")),
        rule=rule_of(function, config, weights, ours.get("rule", {})),
        apply_b_dec_to_input=config["apply_b_dec_to_input"],
        transcoder=kind.endswith("transcoder"),
    )
    if kind == "skip_transcoder":
        sae.W_skip = weights["W_skip"].astype(dtype)
    if isinstance(sae, Crosscoder):
        sae.n_sources, sae.rank_by_decoder_norm = config["n_sources"], bool(config["rank_by_decoder_norm"])
    return _described(sae, config, ours)


def _described(sae: SAE, config: dict[str, Any], ours: dict[str, Any]) -> SAE:
    sae.normalize_activations = config["normalize_activations"]
    sae.metadata = {k: v for k, v in config["metadata"].items() if not k.startswith("sae_lens_")}
    sae.metadata = sae.metadata | ours.get("metadata", {})
    mx.eval(sae.parameters())
    return sae


# What surrounds the function, with further keys of cfg.json.
_SHAPES: dict[str, set[str]] = {
    "": set(),
    "transcoder": {"d_out"},
    "skip_transcoder": {"d_out"},
    "crosscoder": {"n_sources", "rank_by_decoder_norm"},
    "cross_layer_transcoder": {"n_layers"},
}


def _name(function: str, shape: str) -> str:
    """``jumprelu_skip_transcoder``; SAELens' plain ``transcoder`` is one of the standard function."""
    if function == "standard" and shape in ("transcoder", "skip_transcoder"):
        return shape
    return f"{function}_{shape}" if shape else function


def _shape(sae: SAE) -> str:
    named = {Crosscoder: "crosscoder", CrossLayerTranscoder: "cross_layer_transcoder"}
    if type(sae) in named:
        return named[type(sae)]
    if type(sae) not in (SAE, HierarchicalSAE):
        raise ValueError(
            f"[save] the SAE must be a plain one, a transcoder or a crosscoder but is a {type(sae).__name__}; "
            "save its parameters with sae.save_weights."
        )
    if "W_skip" in sae:
        return "skip_transcoder"
    return "transcoder" if sae.transcoder else ""


def _weights(sae: SAE, function: str, extra: dict[str, mx.array]) -> atomic.Writer:
    bias = FUNCTIONS[function].bias
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
    return arrays.writer(weights | extra, {"format": "pt"})


def _with_norms_folded(weights: dict[str, mx.array], bias: str) -> dict[str, mx.array]:
    """Selection on pre_acts * |W_dec|, decoding by W_dec / |W_dec|: the same function with the norms folded in. (A threshold
    is already one of pre_acts * |W_dec|.) A row of zeros stays one, and its latent silent."""
    norm = row_norms(weights["W_dec"])
    some = mx.where(norm > 0, norm, 1)
    factors = {"W_enc": norm, bias: norm, "W_dec": 1 / some[:, None]}
    return weights | {
        key: (weights[key].astype(mx.float32) * factor).astype(weights[key].dtype)
        for key, factor in factors.items()
    }


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
    for part, whole in (("n_sources", "d_in"), ("n_layers", "d_in"), ("n_layers", "d_sae")):
        if part in extra and config[whole] % config[part]:
            raise ValueError(
                f"[load] {part}={config[part]} must divide {whole}={config[whole]} in {CONFIG} but does not."
            )
    if not isinstance(config["metadata"], dict):
        raise ValueError(f"[load] metadata must be an object but got {config['metadata']!r} in {CONFIG}.")


def _must_exist(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"[load] {path} must exist but does not.")


def _metadata(ours: dict[str, Any]) -> dict[str, Any]:
    if ours.get("format") != "mlxsae" or not isinstance(ours.get("metadata"), dict):
        raise ValueError(f"[load] {METADATA} must be written by mlxsae but has the keys {sorted(ours)}.")
    version, rule = ours.get("format_version", 0), ours.get("rule", {})
    if not isinstance(version, int) or not isinstance(rule, dict):
        raise ValueError(
            f"[load] format_version must be an integer and rule an object but got {version!r} and {rule!r} in {METADATA}."
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"[load] format_version must be at most {FORMAT_VERSION} but got {version}; update mlxsae."
        )
    return ours


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"[load] {path} must be JSON but is damaged ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"[load] {path} must be a JSON object but is a {type(value).__name__}.")
    return value
