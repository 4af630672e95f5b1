"""The tokenizer of the tiny language: a word a token, as files that transformers and mlx-lm load offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import world as w

SPACE = "\u2581"  # stands for the space before a word, as in SentencePiece


def piece(word: str) -> str:
    """The token's spelling in the tokenizer: a word carries the space before it, a sign or a mark does not."""
    return word if word in w.PUNCTUATION + w.SPECIALS else SPACE + word


def tokenizer_json() -> dict[str, Any]:
    """The content of ``tokenizer.json`` (format of the `tokenizers` library)."""
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    signs = {"type": "Split", "pattern": {"Regex": "[.,:]"}, "behavior": "Isolated", "invert": False}
    bos = w.TOKEN_ID[w.BOS]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": w.TOKEN_ID[mark], "content": mark, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for mark in w.SPECIALS
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [metaspace, signs]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": w.BOS, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": w.BOS, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {w.BOS: {"id": w.BOS, "ids": [bos], "tokens": [w.BOS]}},
        },
        "decoder": metaspace,
        "model": {
            "type": "WordLevel",
            "vocab": {piece(word): i for word, i in w.TOKEN_ID.items()},
            "unk_token": w.UNKNOWN,
        },
    }


def write_tokenizer(folder: Path, context: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into `folder`."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": w.BOS,
        "eos_token": w.EOS,
        "pad_token": w.PAD,
        "unk_token": w.UNKNOWN,
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (("tokenizer.json", tokenizer_json()), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
