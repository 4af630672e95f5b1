"""Activations at every hook point against transformers in torch, on the same weights.

A tiny random model of each class is saved by transformers and opened by mlx-lm, as a user's would be. Torch's own
hooks sit where the definition in `HookPoint` says that the activation is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from mlx_lm.utils import load_model

from mlxsae import lm
from mlxsae.lm.families import sites_of

LAYERS, WIDTH, VOCAB, BAR = 3, 32, 97, 1e-4
COMMON = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": 56,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "attn_implementation": "eager", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Names(NamedTuple):
    """Where a torch block keeps what, `a|b` where blocks differ; "" where none has it. `mid` names the module that gets
    resid_mid."""

    blocks: str = "model.layers"
    attn: str = "self_attn"
    o_proj: str = "self_attn.o_proj"
    attn_out: str = "self_attn"
    mid: str = "post_attention_layernorm"
    mlp: str = "mlp"
    down_proj: str = "mlp.down_proj"
    mlp_out: str = "mlp"


LLAMA = Names()
POST_NORM = Names(attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
GEMMA = POST_NORM._replace(mid="pre_feedforward_layernorm")
NEOX = Names("gpt_neox.layers", "attention", "attention.dense", "attention", "", "mlp", "mlp.dense_4h_to_h")
# Activation functions are those that mlx-lm has, whatever the config says; transformers is told the same.
GELU, TANH = {"hidden_act": "gelu_python"}, {"hidden_act": "gelu_pytorch_tanh"}
ROOT = {"hidden_size": 64}  # mlx-lm's gemma3 scales embeddings by sqrt(d) in bfloat16, here exactly
MHA = {"num_key_value_heads": 4}
HEAD_DIM = {"head_dim": 8}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

GLM = Names(attn_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm")
HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "full_attention_interval": 2,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.5, "shared_expert_intermediate_size": 24, "head_dim": 8,
}  # fmt: skip
HYBRIDS = LLAMA._replace(attn_out="linear_attn|self_attn")

# class -> (fields, names)
FAMILIES: dict[str, tuple[dict[str, Any], Names]] = {
    "Llama": ({}, LLAMA),
    "Mistral": (HEAD_DIM, LLAMA),
    "Qwen2": ({}, LLAMA),
    "Qwen3": (HEAD_DIM, LLAMA),
    "Gemma": (HEAD_DIM | GELU, LLAMA),
    "Gemma2": (HEAD_DIM | {"query_pre_attn_scalar": 16, "sliding_window": 64}, GEMMA),
    "Gemma3": (HEAD_DIM | SLIDING | ROOT | {"query_pre_attn_scalar": 16, "sliding_window_pattern": 2}, GEMMA),
    "Olmo2": (MHA, POST_NORM._replace(mid="mlp")),
    "Phi3": ({"partial_rotary_factor": 1.0}, LLAMA),
    "Phi": (
        MHA | {"partial_rotary_factor": 0.5},
        LLAMA._replace(o_proj="self_attn.dense", mid="", down_proj="mlp.fc2"),
    ),
    "StableLm": ({"partial_rotary_factor": 0.5, "use_qkv_bias": True}, LLAMA),
    "Starcoder2": (GELU, LLAMA._replace(down_proj="mlp.c_proj")),
    "Cohere": (MHA, LLAMA._replace(mid="")),
    "GPT2": (
        {"n_embd": WIDTH, "n_head": 4, "n_layer": LAYERS, "n_positions": 64, "n_ctx": 64},
        Names("transformer.h", "attn", "attn.c_proj", "attn", "ln_2", "mlp", "mlp.c_proj"),
    ),
    "GPTNeoX": (TANH | {"intermediate_size": 4 * WIDTH}, NEOX),
    "GPTNeoX sequential": (
        TANH | {"intermediate_size": 4 * WIDTH, "use_parallel_residual": False},
        NEOX._replace(mid="post_attention_layernorm"),
    ),
    "Mixtral": (EXPERTS, LLAMA._replace(down_proj="")),
    "Qwen2Moe": (EXPERTS | {"shared_expert_intermediate_size": 24}, LLAMA._replace(down_proj="")),
    "Qwen3Moe": (EXPERTS | HEAD_DIM, LLAMA._replace(down_proj="")),
    "Olmoe": (EXPERTS | MHA, LLAMA._replace(down_proj="")),
    "Mamba": (
        {"state_size": 4, "conv_kernel": 4, "time_step_rank": 2, "use_cache": False},
        Names("backbone.layers", *[""] * 7),
    ),
    "Mamba2": (
        {"state_size": 4, "conv_kernel": 4, "time_step_rank": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1}
        | {"expand": 2, "use_cache": False},
        Names("backbone.layers", *[""] * 7),
    ),
    "Cohere2": (MHA | SLIDING | {"sliding_window_pattern": 2}, LLAMA._replace(mid="")),
    "Exaone4": (HEAD_DIM | SLIDING | {"sliding_window_pattern": "LG"}, POST_NORM._replace(mid="mlp")),
    "Gemma4": (HEAD_DIM | SLIDING, GEMMA),
    "Glm4": ({"partial_rotary_factor": 0.5, "attention_bias": True} | HEAD_DIM, GLM),
    "Glm4Moe": (
        EXPERTS
        | HEAD_DIM
        | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
        | {"first_k_dense_replace": 1, "use_qk_norm": True},
        LLAMA,
    ),
    "GptOss": (
        EXPERTS | HEAD_DIM | SLIDING | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        LLAMA._replace(down_proj=""),
    ),
    "Ministral3": (HEAD_DIM, LLAMA),
    "NanoChat": ({"rms_norm_eps": 1e-5}, LLAMA._replace(down_proj="mlp.fc2")),
    "Olmo3": (MHA | SLIDING, POST_NORM._replace(mid="mlp")),
    "Qwen3_5": (HYBRID, HYBRIDS),
    "Qwen3_5Moe": (HYBRID | EXPERTS, HYBRIDS),
    "Qwen3Next": (HYBRID | EXPERTS, HYBRIDS),
    "SeedOss": (HEAD_DIM, LLAMA),
    "SmolLM3": ({}, LLAMA),
}


def torch_model(name: str) -> Any:
    fields, _ = FAMILIES[name]
    cls = getattr(transformers, name.split()[0] + ("LMHeadModel" if name == "GPT2" else "ForCausalLM"), None)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = transformers.Gemma3TextConfig if name == "Gemma3" else cls.config_class
    torch.manual_seed(0)
    model = cls(config(**(COMMON | fields)))
    with torch.no_grad():
        for p in model.parameters():  # so that norms and biases matter too
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def open_in_mlx(theirs: Any, folder: Path) -> Any:
    """By mlx-lm, from the files that transformers writes, with the keys that files on the hub have."""
    body = theirs.transformer if hasattr(theirs, "transformer") else theirs  # the hub's gpt2 has no prefix
    body.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    rope = (
        config.get("rope_parameters") or {}
    )  # transformers 5 moved them here, mlx-lm reads the earlier keys
    if "rope_theta" not in rope and rope:
        config |= {
            "rope_theta": rope["full_attention"]["rope_theta"],
            "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
        }
    for old, new in (
        ("rope_theta", "rope_theta"),
        ("rotary_emb_base", "rope_theta"),
        ("partial_rotary_factor", "partial_rotary_factor"),
        ("rotary_pct", "partial_rotary_factor"),
    ):
        if new in rope:
            config[old] = rope[new]
    if "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])
    config.setdefault("rope_scaling", None)
    if config["model_type"].startswith(
        "qwen3_5"
    ):  # mlx-lm opens the whole model, of which this is the text part
        config = {"model_type": config["model_type"].removesuffix("_text"), "text_config": config}
    file.write_text(json.dumps(config))
    if (renamed := RENAMED.get(config["model_type"])) is not None:
        weights = folder / "model.safetensors"
        mx.save_safetensors(str(weights), renamed(dict(mx.load(str(weights)))))
    return load_model(folder)[0]


def nanochat_keys(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """As nanochat's own files call them."""
    names = {
        "model.embed_tokens": "transformer.wte", "model.layers": "transformer.h", "self_attn.o_proj": "attn.c_proj",
        "self_attn.q_proj": "attn.c_q", "self_attn.k_proj": "attn.c_k", "self_attn.v_proj": "attn.c_v",
        "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip

    def renamed(key: str) -> str:
        for old, new in names.items():
            key = key.replace(old, new)
        return key

    return {renamed(key): weight for key, weight in weights.items()}


def gpt_oss_keys(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """As mlx-lm writes them: the hub's files are quantised. Gates and ups take turns."""
    found = {}
    for key, weight in weights.items():
        stem, _, last = key.rpartition(".")
        part = last.removesuffix("_bias")
        end = "bias" if last.endswith("_bias") else "weight"
        if not stem.endswith("experts"):
            found[key] = weight
            continue
        weight = weight if end == "bias" else weight.swapaxes(1, 2)
        if part == "gate_up_proj":
            found[f"{stem}.gate_proj.{end}"], found[f"{stem}.up_proj.{end}"] = weight[:, ::2], weight[:, 1::2]
        else:
            found[f"{stem}.{part}.{end}"] = weight
    return {key: mx.contiguous(weight) for key, weight in found.items()}


def qwen3_5_moe_keys(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """As in the hub's files: all experts in one array, gates before ups."""
    found = {key: weight for key, weight in weights.items() if ".experts." not in key}
    for key in weights:
        if key.endswith("experts.0.down_proj.weight"):
            stem = key.removesuffix("0.down_proj.weight")
            gate, up, down = (
                mx.stack([weights[f"{stem}{i}.{name}_proj.weight"] for i in range(EXPERTS["num_experts"])])
                for name in ("gate", "up", "down")
            )
            found[f"{stem}gate_up_proj"], found[f"{stem}down_proj"] = mx.concatenate([gate, up], axis=1), down
    return found


RENAMED = {"nanochat": nanochat_keys, "gpt_oss": gpt_oss_keys, "qwen3_5_moe": qwen3_5_moe_keys}


def torch_activations(
    model: Any, names: Names, tokens: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    found: dict[str, np.ndarray] = {}
    handles = []

    def keep(name: str, value: Any) -> None:
        found[name] = value.detach().numpy()

    def at(block: Any, paths: str) -> Any:
        there = dict(block.named_modules())
        return next((there[path] for path in paths.split("|") if path in there), None)

    def before(module: Any, name: str) -> None:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            keep(name, args[0] if args else kwargs["hidden_states"])

        if module is not None:
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(module: Any, name: str, part: int = 0) -> None:
        def hook(module: Any, args: Any, output: Any) -> None:
            keep(name, output[part] if isinstance(output, tuple) else output)

        if module is not None:
            handles.append(module.register_forward_hook(hook))

    for layer, block in enumerate(model.get_submodule(names.blocks)):
        hook = f"blocks.{layer}."
        before(block, hook + "hook_resid_pre")
        after(block, hook + "hook_resid_post")
        if names.attn:
            after(at(block, names.attn), hook + "attn.hook_pattern", part=1)
            before(at(block, names.o_proj), hook + "attn.hook_z")
            after(at(block, names.attn_out), hook + "hook_attn_out")
            before(at(block, names.mlp), hook + "mlp.hook_in")
            after(at(block, names.mlp_out), hook + "hook_mlp_out")
        if names.mid:
            before(at(block, names.mid), hook + "hook_resid_mid")
        if names.down_proj:
            before(at(block, names.down_proj), hook + "mlp.hook_post")
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)).logits.numpy()
    for handle in handles:
        handle.remove()
    return found, logits


@pytest.mark.parametrize("name", FAMILIES)
def test_every_hook_point_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = torch_model(name)
    model = open_in_mlx(theirs, tmp_path)
    tokens = np.random.default_rng(1).integers(3, VOCAB, (2, 11))
    expected, expected_logits = torch_activations(theirs, FAMILIES[name][1], tokens)

    wrapped = lm.LanguageModel(model)
    points = [lm.HookPoint(layer, site) for layer in range(LAYERS) for site in sites_of(model, layer)]
    logits, found = lm.run_with_capture(wrapped, mx.array(tokens), points)
    assert set(expected) == {str(point) for point in points}
    np.testing.assert_allclose(logits, expected_logits, rtol=BAR, atol=BAR)
    for point in points:
        want = expected[str(point)]
        got = np.array(found[point]).reshape(want.shape)  # experts flatten tokens
        assert np.abs(want).max() > 1e-2
        np.testing.assert_allclose(got, want, rtol=BAR, atol=BAR, err_msg=str(point))
