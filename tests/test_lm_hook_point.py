"""Every spelling of a hook point, and what is refused."""

from __future__ import annotations

import pytest

from mlxsae.lm import SITES, ByPoint, HookPoint, ModulePoint
from mlxsae.lm.hook_point import listed


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", [0, 10])
def test_a_hook_point_is_its_own_name(site: str, layer: int) -> None:
    point = HookPoint(layer, site)
    assert HookPoint.parse(str(point)) == point
    assert HookPoint.parse(point) is point
    assert HookPoint.parse(site, layer=layer) == point
    assert HookPoint.parse((site, layer)) == point == HookPoint.parse((layer, site))


def test_the_name_is_transformer_lens() -> None:
    names = [str(HookPoint(3, site)) for site in SITES]
    assert names == [
        "blocks.3.hook_resid_pre",
        "blocks.3.attn.hook_pattern",
        "blocks.3.attn.hook_z",
        "blocks.3.hook_attn_out",
        "blocks.3.hook_resid_mid",
        "blocks.3.mlp.hook_in",
        "blocks.3.mlp.hook_post",
        "blocks.3.hook_mlp_out",
        "blocks.3.hook_resid_post",
    ]


@pytest.mark.parametrize(
    ("component", "site"),
    [
        ("mlp", "mlp_out"),
        ("attn", "attn_out"),
        ("resid", "resid_post"),
        ("residual", "resid_post"),
        ("output", "resid_post"),
        ("hook_resid_mid", "resid_mid"),
    ],
)
def test_components(component: str, site: str) -> None:
    assert HookPoint.parse(component, layer=7) == HookPoint(7, site)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("layers.10.mlp", HookPoint(10, "mlp_out")),
        ("model.layers.10.mlp", HookPoint(10, "mlp_out")),
        ("model.model.layers.10.mlp", HookPoint(10, "mlp_out")),
        ("language_model.model.layers.2.self_attn", HookPoint(2, "attn_out")),
        ("transformer.h.3.attn", HookPoint(3, "attn_out")),
        ("model.h.3.attention", HookPoint(3, "attn_out")),
        ("model.layers.0.block_sparse_moe", HookPoint(0, "mlp_out")),
        ("backbone.layers.4", HookPoint(4, "resid_post")),
        ("layers.4.output", HookPoint(4, "resid_post")),
        ("layers.4.resid_mid", HookPoint(4, "resid_mid")),
        ("blocks.10.hook_resid_post", HookPoint(10, "resid_post")),
        ("blocks.10.mlp_in", HookPoint(10, "mlp_in")),
    ],
)
def test_paths(path: str, expected: HookPoint) -> None:
    assert HookPoint.parse(path) == expected
    assert HookPoint.parse(path, layer=expected.layer) == expected


@pytest.mark.parametrize("spec", ["mpl", "layers.2.norm", "blocks.1.hook_q", "", ("nose", 1), "layers.x.mlp"])
def test_an_unknown_component_lists_what_there_is(spec: object) -> None:
    with pytest.raises(ValueError, match=r"must be one of resid_pre, attn_pattern, .*resid_post"):
        HookPoint.parse(spec, layer=None if not isinstance(spec, str) or "." in spec else 1)  # type: ignore[arg-type]


def test_mlp_in_of_transformer_lens_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="the residual before the norm"):
        HookPoint.parse("blocks.1.hook_mlp_in")


@pytest.mark.parametrize(
    ("spec", "layer", "message"),
    [
        ("mlp", None, "layer must be given"),
        ("layers.3.mlp", 4, "names layer 3 but layer=4"),
        (("mlp", -1), None, "layer must be an int >= 0"),
        ("mlp", -1, "layer must be an int >= 0"),
        (("mlp", "2"), None, "pair must be"),
        (3, None, "must be a HookPoint"),
    ],
)
def test_layers_are_checked(spec: object, layer: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HookPoint.parse(spec, layer=layer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="site must be one of"):
        HookPoint(1, "mlp")


def test_one_spelling_or_several() -> None:
    for one in ("layers.2.mlp", ("mlp", 2), (2, "mlp"), HookPoint(2, "mlp_out"), ModulePoint("fc")):
        assert listed(one) == [one]
    assert listed([("mlp", 2), "layers.2.attn"]) == [("mlp", 2), "layers.2.attn"]
    assert listed(("layers.2.mlp", "layers.2.attn")) == ["layers.2.mlp", "layers.2.attn"]


def test_a_dict_by_point_takes_every_spelling() -> None:
    found = ByPoint({HookPoint(2, "mlp_out"): 1, HookPoint(3, "resid_post"): 2, ModulePoint("a.fc"): 3})
    for key in ("layers.2.mlp", "model.model.layers.2.mlp", "blocks.2.hook_mlp_out", ("mlp", 2), "mlp"):
        assert found[key] == 1
        assert key in found
    assert found["layers.3"] == found["residual"] == found[HookPoint(3, "resid_post")] == 2
    assert found["a.fc"] == found["a.fc.output"] == found[ModulePoint("a.fc")] == 3
    assert found.get("layers.3.mlp") is None
    assert "a.fc.input" not in found
    assert 7 not in found
    with pytest.raises(
        KeyError, match=r"there is blocks.2.hook_mlp_out, blocks.3.hook_resid_post, a.fc.output"
    ):
        found["layers.3.mlp"]
    found[HookPoint(4, "mlp_out")] = 4
    with pytest.raises(KeyError, match="at mlp"):  # of which layer?
        found["mlp"]


def test_a_module_point_has_two_ends() -> None:
    assert str(ModulePoint("a.b")) == "a.b.output"
    with pytest.raises(ValueError, match="end must be 'output' or 'input'"):
        ModulePoint("a.b", "middle")
