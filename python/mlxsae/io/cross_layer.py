"""Files of a cross-layer transcoder: circuit-tracer's, beside ours.

``W_enc_{l}.safetensors``  ``W_enc_l [d_layer, d]``, ``b_enc_l [d_layer]``, ``b_dec_l [d]``, ``threshold_l [d_layer]`` of a JumpReLU
``W_dec_{l}.safetensors``  ``W_dec_l [d_layer, n_layers - l, d]``
``config.yaml``            where it belongs, as circuit-tracer asks (in JSON, which YAML contains)

circuit-tracer (0.5) has ReLU and JumpReLU here and takes anything else for ReLU; so the files of other functions begin with
the function's name, and it does not find them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxsae.io import arrays, atomic
from mlxsae.io.rules import FUNCTIONS, function_of, rule_of
from mlxsae.sae import CrossLayerTranscoder, Rule

_THEIRS = ("standard", "jumprelu")
_LAYER_FILE = re.compile(rf"(({'|'.join(FUNCTIONS)})_)?W_(enc|dec)_\d+\.safetensors")
_KIND = "cross_layer_transcoder"


def one_rule(sae: CrossLayerTranscoder) -> Rule:
    """The rule that every layer has a copy of."""
    return sae.rule.layers[0]  # type: ignore[attr-defined]


def files(sae: CrossLayerTranscoder, metadata: dict[str, Any]) -> dict[str, atomic.Writer]:
    """Writers by the names of the files."""
    found: dict[str, atomic.Writer] = {}
    rules: list[Rule] = sae.rule.layers  # type: ignore[attr-defined]
    biases = sae.decoder.bias.reshape(sae.n_layers, -1)
    for layer, (rule, encoder) in enumerate(zip(rules, sae.encoders, strict=True)):
        function, _, extra = function_of(rule, sae.d_layer)
        own = {
            "W_enc": encoder.weight,
            FUNCTIONS[function].bias: encoder.bias,
            "b_dec": biases[layer],
        } | extra
        enc, dec = _names(function, layer)
        tensors = {f"{name}_{layer}": a for name, a in own.items()}
        found[enc] = arrays.writer(tensors, {"format": "pt"})
        found[dec] = arrays.writer({f"W_dec_{layer}": sae.W_dec_of(layer)}, {"format": "pt"})
    hooks = [_one_hook(metadata.get(name), sae.n_layers) for name in ("inputs", "targets")]
    if all(hooks) and function_of(rules[0], sae.d_layer)[0] in _THEIRS:
        theirs = {
            "model_name": metadata.get("model_name", ""),
            "model_kind": _KIND,
            "feature_input_hook": hooks[0],
            "feature_output_hook": hooks[1],
        }
        found["config.yaml"] = atomic.json_writer(theirs)
    return found


def remove_others(directory: Path, written: Mapping[str, Any]) -> None:
    """Drop the layers of an earlier transcoder of more of them: circuit-tracer counts files. A ``config.yaml`` that is not a
    cross-layer transcoder's is somebody else's.
    """
    for path in directory.iterdir():
        if path.name in written:
            continue
        theirs = path.name == "config.yaml" and path.is_file() and _KIND.encode() in path.read_bytes()
        if theirs or _LAYER_FILE.fullmatch(path.name):
            path.unlink()


def load(
    directory: Path, function: str, config: dict[str, Any], dtype: mx.Dtype, ours: dict[str, Any]
) -> CrossLayerTranscoder:
    """The transcoder of a configuration that was checked, with ``d_in``, ``d_sae`` and ``n_layers`` in it."""
    n = config["n_layers"]
    d, d_layer = config["d_in"] // n, config["d_sae"] // n
    bias = FUNCTIONS[function].bias
    of_layer = {"W_enc": (d_layer, d), bias: (d_layer,), "b_dec": (d,)}
    of_layer |= FUNCTIONS[function].shapes(d, d_layer)
    found = []
    for layer in range(n):
        parts = [of_layer, {"W_dec": (d_layer, n - layer, d)}]
        own: dict[str, mx.array] = {}
        for file, shapes in zip(_names(function, layer), parts, strict=True):
            own |= _read(directory / file, layer, shapes)
        found.append(own)
    rules = [rule_of(function, config, own, ours) for own in found]
    sae = CrossLayerTranscoder(d, n, d_layer, rule=rules[0], dtype=dtype)
    for layer, own in enumerate(found):
        sae.encoders[layer].weight, sae.encoders[layer].bias = (
            own["W_enc"].astype(dtype),
            own[bias].astype(dtype),
        )
        sae.W_decs[layer] = own["W_dec"].reshape(d_layer, -1).astype(dtype)
        sae.rule.layers[layer] = rules[layer]  # type: ignore[attr-defined]
    sae.decoder.bias = mx.concatenate([own["b_dec"] for own in found]).astype(dtype)
    return sae


def foreign(directory: Path) -> dict[str, Any] | None:
    """The configuration of a folder that has only circuit-tracer's files; None where it has none of them."""
    n = len(list(directory.glob("W_enc_*.safetensors")))
    if n == 0:
        return None
    first = arrays.entries(directory / _names("standard", 0)[0])
    if "W_enc_0" not in first:
        raise ValueError(f"[load] {directory}/W_enc_0.safetensors must hold W_enc_0 but has {sorted(first)}.")
    if len(shape := first["W_enc_0"].shape) != 2:
        raise ValueError(f"[load] W_enc_0 must have shape [d_layer, d] but has {shape} in {directory}.")
    d_layer, d = shape
    function = "jumprelu" if "threshold_0" in first else "standard"
    return {
        "architecture": f"{function}_cross_layer_transcoder",
        "d_in": n * d,
        "d_sae": n * d_layer,
        "n_layers": n,
        "dtype": str(first["W_enc_0"].dtype).removeprefix("mlx.core."),
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {},
    }


def _names(function: str, layer: int) -> tuple[str, str]:
    begin = "" if function in _THEIRS else f"{function}_"
    return f"{begin}W_enc_{layer}.safetensors", f"{begin}W_dec_{layer}.safetensors"


def _read(path: Path, layer: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, mx.array]:
    if not path.exists():
        raise FileNotFoundError(f"[load] {path} must exist but does not.")
    found = {name.removesuffix(f"_{layer}"): a for name, a in arrays.read(path).items()}
    got = {name: a.shape for name, a in found.items()}
    if got != shapes:
        raise ValueError(f"[load] {path} must hold {shapes} but has {got}.")
    for name, a in found.items():
        if not mx.issubdtype(a.dtype, mx.floating):
            raise ValueError(f"[load] {name} must be floating point but got {a.dtype} in {path}.")
    return found


def _one_hook(names: Any, n_layers: int) -> str:
    """``mlp.hook_in`` of ``["blocks.0.mlp.hook_in", "blocks.1.mlp.hook_in", ...]``; empty where they are not all layers'."""
    places = [str(name).split(".", 2) for name in names or ()]
    if len(places) != n_layers or any(len(place) != 3 for place in places):
        return ""
    alike = len({place[2] for place in places}) == 1
    return places[0][2] if alike and [place[1] for place in places] == [*map(str, range(n_layers))] else ""
