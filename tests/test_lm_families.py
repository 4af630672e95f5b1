"""The laws of the residual stream, and generation under edits, on a random model of every family."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from lm_toys import CONFIGS, LAYERS, WIDTH, make, tokens_of
from mlxsae import lm
from mlxsae.lm import FAMILIES, HookPoint
from mlxsae.lm.families import sites_of, submodule

model_of = cache(make)
PARALLEL = {"cohere", "cohere2", "gpt_neox", "phi", "stablelm-parallel"}
EXPERTS = {"gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next"}
HYBRID = {"qwen3_5", "qwen3_5_moe", "qwen3_next"}  # every second block has linear attention
families = pytest.mark.parametrize("name", CONFIGS)


def everything(model: nn.Module) -> list[HookPoint]:
    return [HookPoint(layer, site) for layer in range(LAYERS) for site in sites_of(model, layer)]


def test_every_row_of_the_table_is_tested() -> None:
    assert {module for module, _ in CONFIGS.values()} == set(FAMILIES)


@families
def test_sites(name: str) -> None:
    expected = {"resid_pre", "resid_post"} if name.startswith("mamba") else set(lm.SITES)
    absent = ({"resid_mid"} if name in PARALLEL else set()) | ({"mlp_post"} if name in EXPERTS else set())
    model = model_of(name)
    assert set(lm.LanguageModel(model).sites) == expected - absent
    for layer in range(LAYERS):
        linear = {"attn_pattern", "z"} if name in HYBRID and layer % 2 == 0 else set()
        experts = {"mlp_post"} if name == "glm4_moe" and layer >= 2 else set()
        assert set(sites_of(model, layer)) == expected - absent - linear - experts


@families
def test_capture_changes_no_bit_and_leaves_no_trace(name: str) -> None:
    model, tokens = model_of(name), tokens_of(2, 9)
    types = [type(module) for _, module in model.named_modules()]
    names = [key for key, _ in tree_flatten(model.parameters())]
    plain = model(tokens)
    logits, found = lm.run_with_capture(model, tokens, everything(model))
    assert mx.array_equal(logits, plain)
    wrapped = lm.LanguageModel(model)
    for point, x in found.items():
        if point.site == "attn_pattern":
            assert x.shape == (2, wrapped.n_heads, 9, 9)
        else:
            assert x.shape == (2, 9, wrapped.shape_at(point)[-1])
            assert x.shape[-1] == WIDTH or point.site in ("z", "mlp_post")
    assert [type(module) for _, module in model.named_modules()] == types
    assert [key for key, _ in tree_flatten(model.parameters())] == names
    assert mx.array_equal(model(tokens), plain)


@families
def test_the_residual_stream_adds_up(name: str) -> None:
    model = model_of(name)
    found = lm.capture(model, tokens_of(2, 9), everything(model))
    for layer in range(LAYERS):
        at = {site: found[HookPoint(layer, site)] for site in sites_of(model, layer)}
        if layer:
            assert mx.array_equal(at["resid_pre"], found[HookPoint(layer - 1, "resid_post")])
        if "resid_mid" in at:
            assert mx.array_equal(at["resid_mid"], at["resid_pre"] + at["attn_out"])
            if not name.startswith("gemma4"):
                assert mx.array_equal(at["resid_post"], at["resid_mid"] + at["mlp_out"])
        elif "mlp_out" in at:
            total = at["resid_pre"] + at["attn_out"] + at["mlp_out"]
            assert mx.allclose(at["resid_post"], total, rtol=1e-6, atol=1e-6)
        if "mlp_in" in at:  # the MLP, and the post-norm where there is one, really map mlp_in to mlp_out
            family, block = FAMILIES[CONFIGS[name][0]], model.layers[layer]
            y = block[family.mlp](at["mlp_in"])
            if family.mlp_out != family.mlp:
                y = block[family.mlp_out](y)
            assert mx.allclose(y, at["mlp_out"], rtol=1e-5, atol=1e-6)


@families
def test_the_inside_of_attention_and_mlp(name: str) -> None:
    """z and mlp_post are what the last projections map; the pattern is a causal distribution that makes z."""
    model, tokens = model_of(name), tokens_of(2, 9)
    family, found = FAMILIES[CONFIGS[name][0]], lm.capture(model, tokens, everything(model))
    plain = model(tokens)
    for layer in range(LAYERS):
        at = {site: found[HookPoint(layer, site)] for site in sites_of(model, layer)}
        block = model.layers[layer]
        for inner, path, outer, end in (
            ("z", family.z, "attn_out", family.attn_out if "norm" in family.attn_out else ""),
            ("mlp_post", family.mlp_post, "mlp_out", family.mlp_out if "norm" in family.mlp_out else ""),
        ):
            if inner in at:
                y = submodule(block, path)(at[inner])
                y = submodule(block, end)(y) if end else y
                assert mx.allclose(y, at[outer], rtol=1e-5, atol=1e-6)
        if "attn_pattern" not in at:
            continue
        pattern, point = at["attn_pattern"], HookPoint(layer, "attn_pattern")
        assert mx.all(mx.triu(pattern, k=1) == 0)
        total = pattern.sum(axis=-1)
        assert mx.all(total < 1) if name == "gpt_oss" else mx.allclose(total, mx.ones_like(total), atol=1e-5)
        # Through the array instead of the fused kernel, the same comes out; through another array, it does not.
        with lm.splice(model, {point: lambda p: p * 1}):
            assert mx.allclose(model(tokens), plain, rtol=0, atol=1e-4)
        with lm.splice(model, {point: lambda p: mx.zeros_like(p).at[..., 0].add(1)}):
            assert mx.abs(model(tokens) - plain).max() > 1e-3


@families
def test_patterns_under_a_cache_are_rows_of_the_whole_pattern(name: str) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    model, tokens = model_of(name), tokens_of(1, 5)  # within the sliding windows
    if "attn_pattern" not in sites_of(model, 1):
        pytest.skip("no attention")
    point = HookPoint(1, "attn_pattern")
    whole, cache_ = lm.capture(model, tokens, point)[point], make_prompt_cache(model)
    for a, b in ((0, 3), (3, 4), (4, 5)):
        part = lm.capture(model, tokens[:, a:b], point, cache=cache_)[point]
        assert mx.allclose(part, whole[:, :, a:b, :b], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["cohere2", "gemma3_text", "gpt_oss", "llama-sliding", "olmo3"])
def test_patterns_past_a_sliding_window_are_in_the_order_of_the_tokens(name: str) -> None:
    """The cache overwrites its oldest key; what is seen, and what an edit names, is the text's order."""
    from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

    model, tokens, window = model_of(name), tokens_of(1, 20), 6
    cache_ = make_prompt_cache(model)
    layer = next(i for i, c in enumerate(cache_) if isinstance(c, RotatingKVCache))
    point = HookPoint(layer, "attn_pattern")
    whole = lm.capture(model, tokens, point)[point]

    def oldest(p: mx.array) -> mx.array:  # only the first key that a query of the whole text sees
        first = mx.maximum(mx.arange(p.shape[-2]) - window + 1, 0)[:, None] == mx.arange(p.shape[-1])
        return mx.broadcast_to(first.astype(p.dtype), p.shape)

    with lm.splice(model, {point: oldest}):
        edited = model(tokens)
    twin = make_prompt_cache(model)
    chunks = [(0, 4), *((i, i + 1) for i in range(4, 13)), (13, 16), *((i, i + 1) for i in range(16, 20))]
    for a, b in chunks:
        part = lm.capture(model, tokens[:, a:b], point, cache=cache_)[point]
        keys = part.shape[-1]
        assert mx.allclose(part, whole[:, :, a:b, b - keys : b], rtol=0, atol=1e-5)
        if b - a == 1:
            edit = {point: lambda p: mx.zeros_like(p).at[..., 0].add(1)}
        else:
            edit = {point: lambda p, a=a, b=b: oldest(whole)[:, :, a:b, b - p.shape[-1] : b]}
        with lm.splice(model, edit):
            got = model(tokens[:, a:b], cache=twin)
        assert mx.allclose(got, edited[:, a:b], rtol=0, atol=1e-4)


@families
def test_capture_stops_after_the_deepest_hook_point(name: str) -> None:
    model, tokens = model_of(name), tokens_of(1, 7)
    for site in sites_of(model, 1):
        point = HookPoint(1, site)
        _, whole = lm.run_with_capture(model, tokens, point)

        def forbidden(x: mx.array) -> mx.array:
            raise AssertionError("a block after the deepest hook point was run")

        with lm.splice(model, {HookPoint(layer, "resid_pre"): forbidden for layer in (2, 3)}):
            cut = lm.capture(model, tokens, [point, HookPoint(0, "resid_post")])
            with pytest.raises(AssertionError, match="was run"):
                model(tokens)
        assert mx.array_equal(cut[point], whole[point])


@families
def test_an_edit_at_every_site_reaches_the_logits(name: str) -> None:
    model, tokens = model_of(name), tokens_of(2, 9)
    plain = model(tokens)
    for site in sites_of(model, 1):
        point = HookPoint(1, site)
        with lm.splice(model, {point: lambda x: x}):
            assert mx.array_equal(model(tokens), plain)
        with lm.splice(model, {point: mx.zeros_like}):
            zeroed, found = lm.run_with_capture(model, tokens, point)
        assert mx.all(found[point] == 0)
        assert mx.abs(zeroed - plain).max() > 1e-3


@families
def test_edits_of_the_residual_stream_are_what_the_rest_of_the_model_sees(name: str) -> None:
    """Replacing resid_mid or resid_post by another prompt's gives exactly that prompt's continuation."""
    if name == "gemma4":
        pytest.skip("every block also gets an input from the tokens themselves")
    model, tokens, other = model_of(name), tokens_of(1, 9, seed=1), tokens_of(1, 9, seed=2)
    expected = model(other)
    for site in ("resid_mid", "resid_post"):
        point = HookPoint(1, site)
        if site not in sites_of(model, 1):
            continue
        # From block 2 on, all that the model knows is the residual stream (no cache here).
        value = lm.capture(model, other, point)[point]
        with lm.splice(model, {point: lambda x, value=value: value}):
            patched, found = lm.run_with_capture(model, tokens, (3, "resid_post"))
        reference = lm.capture(model, other, (3, "resid_post"))
        assert mx.allclose(
            found[HookPoint(3, "resid_post")], reference[HookPoint(3, "resid_post")], atol=1e-4
        )
        assert mx.allclose(patched, expected, atol=1e-4)


@families
def test_edits_under_a_cache_equal_edits_without(name: str) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    model, tokens = model_of(name), tokens_of(1, 13)
    mx.random.seed(5)
    direction = mx.random.normal((WIDTH,))
    sites = [site for site in ("attn_out", "resid_mid", "mlp_out", "resid_post") if site in sites_of(model)]
    # A different edit at each layer, all of them functions of one token alone, as SAE edits are.
    edits = {
        HookPoint(i % LAYERS, site): lambda x: x + 0.1 * direction * mx.tanh(x)
        for i, site in enumerate(sites)
    }
    with lm.splice(model, edits):
        whole = model(tokens)
        cache_ = make_prompt_cache(model)
        parts = [
            model(tokens[:, a:b], cache=cache_)
            for a, b in [(0, 5), (5, 8), *((i, i + 1) for i in range(8, 13))]
        ]
    assert mx.abs(whole - model(tokens)).max() > 1e-3
    assert mx.allclose(mx.concatenate(parts, axis=1), whole, rtol=0, atol=1e-4)


def test_an_unlisted_family_has_its_residual_stream_only() -> None:
    from mlx_lm.models import granite

    args = {
        "model_type": "granite", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 61,
        "logits_scaling": 1.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5, "max_position_embeddings": 64, "attention_bias": False,
        "mlp_bias": False, "rope_theta": 1e4,
    }  # fmt: skip
    model = granite.Model(granite.ModelArgs.from_dict(args))
    assert sites_of(model) == ("resid_pre", "resid_post")
    assert lm.capture(model, tokens_of(1, 4), "layers.1")[HookPoint(1, "resid_post")].shape == (1, 4, 32)
    with pytest.raises(ValueError, match="granite has no mlp_out in block 0; it has resid_pre, resid_post"):
        lm.capture(model, tokens_of(1, 4), "layers.0.mlp")


def test_parallel_blocks_have_no_resid_mid() -> None:
    with pytest.raises(
        ValueError, match="gpt_neox has no resid_mid in block 2; it has resid_pre, attn_pattern, z, attn_out"
    ):
        lm.capture(model_of("gpt_neox"), tokens_of(1, 4), "blocks.2.hook_resid_mid")


def test_gemma3_residual_sums_stay_finite_in_float16() -> None:
    model = make("gemma3_text")
    model.set_dtype(mx.float16)
    model.layers[1].post_attention_layernorm.weight = mx.full((WIDTH,), 6e4, mx.float16)
    points = [HookPoint(1, site) for site in ("resid_mid", "mlp_out", "resid_post")]
    found = lm.capture(model, tokens_of(1, 5), points)
    mid, post = found[points[0]], found[points[2]]
    assert mid.dtype == mx.float16
    assert mx.abs(mid).max() == mx.finfo(mx.float16).max
    assert mx.all(mx.isfinite(mid.astype(mx.float32)))
    assert mx.all(mx.isfinite(post.astype(mx.float32)))
