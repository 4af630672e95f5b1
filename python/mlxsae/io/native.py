"""The native format: a folder in SAELens' layout, so that SAELens and every tool around it opens what we
save.

``cfg.json``                architecture, sizes and free-form metadata, the keys of SAELens 6
``sae_weights.safetensors`` ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_out]``, ``b_enc``, ``b_dec``
``metadata.json``           what SAELens has no place for: our format version, training, metrics

Memory is feature-major; ``W_enc`` is transposed here, once, on the way in and out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxsae.io import arrays, atomic
from mlxsae.sae import RULES, SAE

WEIGHTS, CONFIG, METADATA = "sae_weights.safetensors", "cfg.json", "metadata.json"
FORMAT_VERSION = 1
SAELENS_VERSION = "6.54.12"
"""The SAELens release whose layout this is; its loader takes older files for another format."""

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_TRANSCODER = "_transcoder"
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
    ValueError : a rule that files do not know, metadata that JSON cannot hold.
    OSError : the folder cannot be written.
    """
    if sae.rule.architecture not in RULES:
        raise ValueError(
            f"[save] rule must be one of {sorted(RULES)} but got {type(sae.rule).__name__}; "
            "save its parameters with sae.save_weights."
        )
    known = sae.metadata | (metadata or {})
    config: dict[str, Any] = {
        # SAELens has no transcoder with this rule: a name of our own makes it refuse the file, not misread
        # it.
        "architecture": sae.rule.architecture + ("" if sae.d_out == sae.d_in else _TRANSCODER),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.dtype).removeprefix("mlx.core."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **sae.rule.config(),
        "metadata": {"sae_lens_version": SAELENS_VERSION}
        | {key: known[key] for key in _SAELENS_METADATA if key in known},
    }
    if sae.d_out != sae.d_in:
        config["d_out"] = sae.d_out
    if sae.rule.architecture == "topk":
        config["rescale_acts_by_decoder_norm"] = False
    weights = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    ours = {"format": "mlxsae", "format_version": FORMAT_VERSION, "metadata": known}
    atomic.write_files(
        directory,
        {
            WEIGHTS: arrays.writer(weights, {"format": "pt"}),
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
    base = name.removesuffix(_TRANSCODER) if isinstance(name, str) else ""
    if base not in RULES:
        raise ValueError(f"[load] architecture must be one of {sorted(RULES)} but got {name!r} in {CONFIG}.")
    rule_type = RULES[base]
    _check_config(config, {"d_out"} if base != name else set(), set(rule_type.PARAMETERS))
    d_in, d_sae, d_out = config["d_in"], config["d_sae"], config.get("d_out", config["d_in"])
    weights = arrays.read(directory / WEIGHTS)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,)}
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
        norm = mx.linalg.norm(weights["W_dec"].astype(mx.float32), axis=-1)
        for key, factor in (("W_enc", norm), ("b_enc", norm), ("W_dec", 1 / norm[:, None])):
            weights[key] = (weights[key].astype(mx.float32) * factor).astype(weights[key].dtype)
    dtype = _DTYPES[config["dtype"]]
    sae = SAE.from_weights(
        *(weights[key].astype(dtype) for key in ("W_enc", "W_dec", "b_enc", "b_dec")),
        rule=rule_type(**{key: config[key] for key in rule_type.PARAMETERS}),
        apply_b_dec_to_input=config["apply_b_dec_to_input"],
    )
    sae.metadata = {k: v for k, v in config["metadata"].items() if not k.startswith("sae_lens_")}
    if (directory / METADATA).exists():
        sae.metadata = sae.metadata | _metadata(_read_json(directory / METADATA))
    mx.eval(sae.parameters())
    return sae


def _check_config(config: dict[str, Any], extra: set[str], rule: set[str]) -> None:
    required = _REQUIRED | extra | rule
    if missing := sorted(required - config.keys()):
        raise ValueError(f"[load] {CONFIG} must have the keys {sorted(required)} but lacks {missing}.")
    if unknown := sorted(config.keys() - required - _OPTIONAL):
        raise ValueError(f"[load] {CONFIG} must have only known keys but has {unknown}.")
    for key in ("d_in", "d_sae", *extra):
        if isinstance(config[key], bool) or not isinstance(config[key], int) or config[key] <= 0:
            raise ValueError(f"[load] {key} must be a positive integer but got {config[key]!r} in {CONFIG}.")
    allowed: dict[str, tuple[Any, ...]] = {
        "dtype": tuple(_DTYPES),
        "apply_b_dec_to_input": (True, False),
        # Other normalisations act at run time; the field folds them into the weights, and so do we.
        "normalize_activations": ("none",),
        "reshape_activations": ("none",),
        "rescale_acts_by_decoder_norm": (True, False),
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
    return ours["metadata"]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"[load] {path} must be JSON but is damaged ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"[load] {path} must be a JSON object but is a {type(value).__name__}.")
    return value
