"""A language model with its tokenizer, from a folder, a hub name, or the package itself."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .families import Family, blocks_of, family_of, sites_of
from .hook_point import SITES, HookPoint

TINY = "tiny"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """An mlx-lm model and its tokenizer.

    Attributes
    ----------
    model : nn.Module
        `model(tokens [b, t]) -> logits [b, t, vocab]`.
    tokenizer : mlx_lm.tokenizer_utils.TokenizerWrapper
        None where only token ids are used.
    name : str
        "tiny", the hub name, or the folder's name.
    n_layers, d_model : int
        Number of blocks, counted from 0; width of the residual stream.
    family : Family
        Where the sites of a block lie.
    """

    model: nn.Module
    tokenizer: Any = None
    name: str = ""
    n_layers: int = field(init=False)
    d_model: int = field(init=False)
    family: Family = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_layers", len(blocks_of(self.model)))
        object.__setattr__(self, "family", family_of(self.model))
        object.__setattr__(self, "d_model", self.shape_at(HookPoint(0, "resid_pre"))[-1])

    def __call__(self, tokens: mx.array) -> mx.array:
        """Logits [b, t, vocab] of tokens [b, t]."""
        return self.model(tokens)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that this model's blocks have; in hybrids, not every block has all."""
        there = {site for layer in range(self.n_layers) for site in sites_of(self.model, layer)}
        return tuple(site for site in SITES if site in there)

    @cached_property
    def n_heads(self) -> int | None:
        """Number of query heads; None where no block has an attention that can be looked into."""
        for layer in range(self.n_layers):
            if "attn_pattern" in sites_of(self.model, layer):
                return self.shape_at(HookPoint(layer, "attn_pattern"))[1]
        return None

    def shape_at(self, spec: Any) -> tuple[int, ...]:
        """Shape of the activation at a hook point for one token, such as (1, 1, d_model).

        Configs spell widths in many ways; the graph of a forward pass knows them, and nothing is computed.
        """
        from .hooks import run_with_capture

        _, found = run_with_capture(self.model, mx.zeros((1, 1), mx.int32), spec)
        return next(iter(found.values())).shape

    def unembed(self, resid: mx.array) -> mx.array:
        """Logits [..., vocab] of the last block's resid_post [..., d_model]: final norm, head, and what else comes
        after the blocks. Of an earlier layer's, this is the logit lens.
        """
        from .hooks import splice

        if resid.shape[-1:] != (self.d_model,):
            raise ValueError(f"[unembed] resid must be [..., {self.d_model}] but has shape {resid.shape}.")
        rows = resid.reshape(1, -1, self.d_model)
        # The rest of the pass is replaced before anything of it is computed.
        with splice(self.model, {HookPoint(self.n_layers - 1, "resid_post"): lambda x: rows}):
            logits = self.model(mx.zeros(rows.shape[:2], mx.int32))
        return logits.reshape(*resid.shape[:-1], -1)

    @property
    def context_size(self) -> int | None:
        """The longest text that the model's config promises to read, where it states one."""
        arguments = getattr(self.model, "args", None)
        arguments = getattr(arguments, "text_config", None) or arguments
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            known = arguments.get(name) if isinstance(arguments, dict) else getattr(arguments, name, None)
            if isinstance(known, int) and known >= 2:
                return known
        return None

    def hook_point(self, spec: Any, *, layer: int | None = None) -> HookPoint:
        """`HookPoint.parse`, checked against this model: layer in range, site there."""
        from .families import locate

        hook_point = HookPoint.parse(spec, layer=layer)
        locate(self.model, hook_point)
        return hook_point

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids of `text`, after BOS where the tokenizer has one and `bos` asks for it."""
        ids = list(self._tokens.encode(text, add_special_tokens=False, verbose=False))
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int] | mx.array) -> str:
        """Text of token ids [t]."""
        return self._tokens.decode(ids.tolist() if isinstance(ids, mx.array) else list(ids))

    def token_to_str(self, token: int) -> str:
        """The text that one token stands for, its leading space included."""
        piece = self._tokens.convert_ids_to_tokens(int(token))
        if not isinstance(piece, str):
            raise ValueError(f"[token_to_str] token must be an id of the vocabulary but got {token}.")
        # One token alone loses its leading space in most decoders: take what it adds to itself.
        once, twice = self.decode([token]), self.decode([token, token])
        return twice[len(once) :] if twice.startswith(once) and token not in self.special_ids else piece

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, None where the tokenizer has none."""
        return self._tokens.bos_token_id

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a text."""
        return frozenset(self._tokens.eos_token_ids)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that are not text: BOS, EOS, padding, unknown, chat markup."""
        tokens = self._tokens
        added = getattr(tokens, "added_tokens_decoder", {})
        marked = (i for i, token in added.items() if getattr(token, "special", False))
        return frozenset(tokens.all_special_ids) | frozenset(marked) | self.eos_ids

    @property
    def _tokens(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(f"[LanguageModel] {self.name or 'this model'} must have a tokenizer for text.")
        return self.tokenizer


def load(path_or_name: str | os.PathLike[str], *, dtype: mx.Dtype | None = None) -> LanguageModel:
    """Load a language model through mlx-lm.

    Parameters
    ----------
    path_or_name : str or path
        "tiny" (the model in this package), a folder that mlx-lm can read, or a Hugging Face name.
        An existing folder wins.
    dtype : mx.Dtype, optional
        Cast the weights to it. By default weights stay as stored, but 16-bit ones become float32 where MLX's
        default device is the CPU, whose 16-bit matmul is a scalar loop. Quantised models are left alone.

    Raises
    ------
    FileNotFoundError
        No such folder, or no config or weights in it.
    ValueError
        A damaged config or weight file, a model type that mlx-lm does not know, weights that do not fit
        the config, `dtype` for a quantised model.
    OSError
        The hub cannot deliver the model.
    """
    text = os.fspath(path_or_name)
    folder = Path(text or os.devnull).expanduser()  # Path("") would be the working directory
    if text == TINY and not folder.is_dir():
        from .tiny import folder as tiny_folder

        folder, name = Path(tiny_folder()), TINY
    elif folder.is_dir():
        name = folder.resolve().name
    elif text and folder.exists():
        raise FileNotFoundError(
            f"[load] path must be a folder with a config and weights but {text!r} is a file."
        )
    elif _HUB_NAME.fullmatch(text):
        folder, name = _from_hub(text), text
    else:
        raise FileNotFoundError(
            f"[load] path_or_name must be a folder, 'owner/name' on the hub, or {TINY!r} but got {text!r}, "
            "and there is no such folder."
        )
    _check_folder(folder)

    import mlx_lm

    try:
        model, tokenizer = mlx_lm.load(str(folder), lazy=True)[:2]
    except Exception as e:  # mlx-lm's errors are of every kind, down to KeyError
        raise ValueError(
            f"[load] {text!r} must be a model that mlx-lm can read but it says: {_say(e)}"
        ) from e
    _cast(model, dtype)
    mx.eval(model.parameters())
    return LanguageModel(model, tokenizer, name)


def _say(e: BaseException) -> str:
    said = " ".join(str(e).split()) or type(e).__name__
    return said if len(said) < 400 else said[:400] + " ..."


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    try:
        return Path(snapshot_download(name, allow_patterns=DEFAULT_ALLOW_PATTERNS))
    except Exception as e:
        raise OSError(
            f"[load] {name!r} must be a folder or a model on the hub, "
            f"but there is no such folder and the hub gave: {_say(e)}"
        ) from e


def _check_folder(folder: Path) -> None:
    """Find before loading what mlx-lm would report badly, or, for a truncated file, not at all."""
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"[load] a model folder must hold config.json but {str(folder)!r} has none.")
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"[load] {str(config)!r} must be JSON but is damaged: {e}.") from e
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ValueError(f"[load] {str(config)!r} must be an object with a string 'model_type'.")

    files = sorted(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise ValueError(f"[load] {str(index)!r} must map weights to files but is damaged: {e}.") from e
        if missing := sorted(named - {file.name for file in files}):
            raise FileNotFoundError(
                f"[load] {str(folder)!r} must hold every shard but lacks {', '.join(missing)}."
            )
    if not files:
        raise FileNotFoundError(
            f"[load] a model folder must hold weights as model*.safetensors but {str(folder)!r} has none."
        )
    for file in files:
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    """Header readable, and the file exactly as long as the header says."""
    size = file.stat().st_size

    def damaged(why: str) -> ValueError:
        return ValueError(f"[load] {str(file)!r} must be a whole safetensors file but {why}.")

    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise damaged(
                f"its {size} bytes are too few for its header; it is truncated or no safetensors file"
            )
        try:
            header = json.loads(f.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            raise damaged("its header is damaged") from e
    if size != expected:
        raise damaged(f"it has {size} bytes where its header asks for {expected}")


def _is_quantized(model: nn.Module) -> bool:
    return any(isinstance(getattr(module, "bits", None), int) for _, module in model.named_modules())


def _cast(model: nn.Module, dtype: mx.Dtype | None) -> None:
    if dtype is not None and not mx.issubdtype(dtype, mx.floating):
        raise ValueError(f"[load] dtype must be a float type but got {dtype}.")
    if _is_quantized(model):
        if dtype is not None:
            raise ValueError("[load] dtype must be None for a quantised model: its weights are not floats.")
        return
    weights: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    if dtype is None:
        half = any(w.dtype in (mx.float16, mx.bfloat16) for _, w in weights)
        if mx.default_device().type != mx.DeviceType.cpu or not half:
            return
        dtype = mx.float32
    keeps = getattr(model, "cast_predicate", lambda key: True)  # mlx-lm: false for what stays in float32
    model.load_weights(
        [(k, w.astype(dtype) if mx.issubdtype(w.dtype, mx.floating) and keeps(k) else w) for k, w in weights]
    )
