"""Tiny random language models of every family, built through mlx-lm's own classes, and a toy that speaks."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

VOCAB, WIDTH, LAYERS = 61, 32, 4

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "norm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
_SSM = {"state_size": 4, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 2}
_SLIDING = {"sliding_window": 6, "sliding_window_pattern": 2}
_LAYER_TYPES = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}

_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.5,
}
_GEMMA4 = _LAYER_TYPES | {
    "global_head_dim": 8,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": VOCAB,
}

# name -> (module of mlx_lm.models, fields on top of the base)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("cohere", {"num_key_value_heads": 4}),
    "cohere2": ("cohere2", _SLIDING),
    "exaone4": ("exaone4", _SLIDING | {"sliding_window_pattern": "LG", "rope_scaling": None}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {"text_config": _BASE | _SLIDING | {"model_type": "gemma3_text"}}),
    "gemma3_text": ("gemma3_text", _SLIDING),
    "gemma4": ("gemma4", {"text_config": _BASE | _GEMMA4 | {"model_type": "gemma4_text"}}),
    "gemma4_text": ("gemma4_text", _GEMMA4 | {"hidden_size_per_layer_input": 0}),
    "glm4": ("glm4", {"partial_rotary_factor": 0.5, "attention_bias": True}),
    "glm4_moe": (
        "glm4_moe",
        _MOE
        | {
            "max_window_layers": 0,
            "attention_bias": False,
            "use_qk_norm": True,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 2,
            "n_shared_experts": 1,
            "partial_rotary_factor": 0.5,
            "rope_scaling": None,
        },
    ),
    "gpt2": (
        "gpt2",
        {
            "n_ctx": 128,
            "n_embd": WIDTH,
            "n_head": 4,
            "n_layer": LAYERS,
            "n_positions": 128,
            "layer_norm_epsilon": 1e-5,
        },
    ),
    "gpt_neox": ("gpt_neox", {"rotary_emb_base": 10000, "rotary_pct": 0.25}),
    "gpt_neox-sequential": (
        "gpt_neox",
        {"rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": False},
    ),
    "gpt_oss": ("gpt_oss", _MOE | _LAYER_TYPES | {"rope_scaling": None}),
    "llama": ("llama", {}),
    "llama-sliding": ("llama", _LAYER_TYPES),
    "mamba": ("mamba", _SSM),
    "mamba2": (
        "mamba2",
        _SSM
        | {
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 1,
            "time_step_limit": [0.001, 0.1],
            "layer_norm_epsilon": 1e-5,
        },
    ),
    "ministral3": (
        "ministral3",
        {
            "rope_parameters": {
                "rope_theta": 1e4,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 4,
            }
        },
    ),
    "mistral3": ("mistral3", {"text_config": _BASE | {"model_type": "llama"}}),
    "mixtral": ("mixtral", _MOE),
    "nanochat": ("nanochat", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", _LAYER_TYPES),
    "olmoe": ("olmoe", _MOE),
    "phi": ("phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", _MOE),
    "qwen3": ("qwen3", {}),
    "qwen3_5": ("qwen3_5", {"text_config": _BASE | _LINEAR | {"model_type": "qwen3_5_text"}}),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        {"text_config": _BASE | _LINEAR | _MOE | {"model_type": "qwen3_5_moe_text"}},
    ),
    "qwen3_moe": ("qwen3_moe", _MOE),
    "qwen3_next": ("qwen3_next", _LINEAR | _MOE),
    "seed_oss": ("seed_oss", {"attention_bias": True, "attention_out_bias": False}),
    "smollm3": ("smollm3", {}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "qk_layernorm": False}),
    "stablelm-parallel": (
        "stablelm",
        {
            "use_qkv_bias": True,
            "partial_rotary_factor": 0.5,
            "qk_layernorm": True,
            "use_parallel_residual": True,
        },
    ),
    "starcoder2": ("starcoder2", {}),
}


def make(name: str, seed: int = 0) -> nn.Module:
    """A random model of the family; every parameter is drawn, so that norms and biases matter too."""
    module_name, extra = CONFIGS[name]
    module = importlib.import_module(f"mlx_lm.models.{module_name}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(_BASE | {"model_type": module_name} | extra))
    model.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def tokens_of(b: int, t: int, seed: int = 1) -> mx.array:
    return mx.random.randint(3, VOCAB, (b, t), key=mx.random.key(seed))


def write_folder(
    folder: Path, *, dtype: mx.Dtype = mx.float32, bos: bool = True, quantize: bool = False
) -> Path:
    """A llama with a character tokenizer, as a folder that mlx-lm opens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    model = make("llama")
    config = _BASE | {"model_type": "llama", "eos_token_id": 2}
    if bos:
        config["bos_token_id"] = 1
    if quantize:
        nn.quantize(model, group_size=32, bits=8)
        config["quantization"] = {"group_size": 32, "bits": 8}
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        {k: w.astype(dtype) if mx.issubdtype(w.dtype, mx.floating) else w for k, w in weights.items()},
    )
    (folder / "config.json").write_text(json.dumps(config))

    letters = ["<unk>", "<s>", "</s>", " ", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,?!"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters[:VOCAB])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    specials = {"unk_token": "<unk>", "eos_token": "</s>"}
    if bos:
        specials["bos_token"] = "<s>"
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(list(specials.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | specials
        )
    )
    return folder
