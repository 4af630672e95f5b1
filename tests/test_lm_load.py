"""Loading: what comes back, and one test for each way a model folder can be broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from lm_toys import LAYERS, WIDTH, write_folder
from mlxsae import lm


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "toy"))


def dtypes(model: lm.LanguageModel) -> set[mx.Dtype]:
    return {p.dtype for _, p in tree_flatten(model.model.parameters())}


def test_a_folder(whole: Path) -> None:
    toy = lm.load(whole)
    assert (toy.name, toy.n_layers, toy.d_model) == ("toy", LAYERS, WIDTH)
    assert toy.sites == tuple(lm.SITES)
    assert toy.family is lm.FAMILIES["llama"]
    assert (toy.bos_id, toy.eos_ids, toy.special_ids) == (1, {2}, {0, 1, 2})
    assert toy(mx.array([[1, 5]])).shape == (1, 2, 61)
    assert toy.hook_point("mlp", layer=3) == lm.HookPoint(3, "mlp_out")
    with pytest.raises(ValueError, match=r"layer must be in \[0, 3\]"):
        toy.hook_point("mlp", layer=4)
    assert lm.load(str(whole)).name == "toy"


def test_the_bundled_model() -> None:
    tiny = pytest.importorskip("mlxsae.lm.tiny")
    model = lm.load("tiny")
    assert model.name == "tiny"
    assert (Path(tiny.folder()) / "config.json").is_file()
    assert lm.generate(model, "the", max_tokens=4)


def test_text_round_trip(whole: Path) -> None:
    toy = lm.load(whole)
    ids = toy.encode("a Dog.")
    assert (ids[0], len(ids)) == (1, 7)
    assert toy.encode("a Dog.", bos=False) == ids[1:]
    assert toy.decode(ids[1:]) == "a Dog."
    assert toy.decode(mx.array(ids[1:])) == "a Dog."
    assert [toy.token_to_str(i) for i in ids] == ["<s>", "a", " ", "D", "o", "g", "."]
    with pytest.raises(ValueError, match="id of the vocabulary but got 999"):
        toy.token_to_str(999)


def test_a_tokenizer_without_bos(tmp_path: Path) -> None:
    toy = lm.load(write_folder(tmp_path / "toy", bos=False))
    assert toy.bos_id is None
    assert len(toy.encode("ab")) == 2


def test_a_model_alone_has_no_text(whole: Path) -> None:
    bare = lm.LanguageModel(lm.load(whole).model)
    with pytest.raises(ValueError, match="must have a tokenizer"):
        bare.encode("a")


@pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="the default is for CPU devices")
@pytest.mark.parametrize("stored", [mx.float16, mx.bfloat16, mx.float32])
def test_half_weights_become_float32_on_a_cpu(tmp_path: Path, stored: mx.Dtype) -> None:
    path = write_folder(tmp_path / "toy", dtype=stored)
    assert dtypes(lm.load(path)) == {mx.float32}
    assert dtypes(lm.load(path, dtype=mx.bfloat16)) == {mx.bfloat16}
    exact = mx.load(str(path / "model.safetensors"))
    for key, p in tree_flatten(lm.load(path).model.parameters()):
        assert mx.array_equal(p, exact[key].astype(mx.float32))


def test_quantised_weights_are_left_alone(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "toy", dtype=mx.bfloat16, quantize=True)
    toy = lm.load(path)
    assert dtypes(toy) == {mx.bfloat16, mx.uint32}
    assert lm.capture(toy, mx.array([[1, 5]]), "layers.1.mlp")[lm.HookPoint(1, "mlp_out")].shape == (
        1,
        2,
        WIDTH,
    )
    with pytest.raises(ValueError, match="dtype must be None for a quantised model"):
        lm.load(path, dtype=mx.float32)


def test_dtype_must_be_a_float(whole: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be a float type but got"):
        lm.load(whole, dtype=mx.int8)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "nowhere", "./nowhere", "a/b/c", "", "~/nowhere/x"])
def test_a_missing_folder(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="must be a folder, 'owner/name' on the hub, or 'tiny'"):
        lm.load(name)


def test_a_file_is_not_a_folder(whole: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is a file"):
        lm.load(whole / "config.json")


def test_a_hub_name_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def no(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no)
    with pytest.raises(
        OSError, match=r"'models/absent' must be a folder or a model on the hub.*no route to host"
    ):
        lm.load("models/absent")


def test_a_hub_name_that_the_hub_has(monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(whole))
    assert lm.load("someone/toy").name == "someone/toy"


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold config.json"):
        lm.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON but is damaged"),
        ("[]", "'model_type'"),
        ("{}", "'model_type'"),
        ('{"model_type": 3}', "'model_type'"),
    ],
)
def test_a_damaged_config(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        lm.load(folder)


def test_an_unknown_model_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "nonesuch"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="mlx-lm can read but it says: Model type nonesuch not supported"):
        lm.load(folder)


def test_a_config_with_missing_keys(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"mlx-lm can read but it says.*hidden_size"):
        lm.load(folder)


def test_a_config_that_does_not_fit_the_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": LAYERS + 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"mlx-lm can read but it says.*layers\.4"):
        lm.load(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold weights as model\*.safetensors"):
        lm.load(folder)


@pytest.mark.parametrize("cut", [0, 5, 100, -1, -10_000])
def test_truncated_weights(folder: Path, cut: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(
        ValueError, match=r"must be a whole safetensors file but its? ha|must be a whole .* its \d+ bytes"
    ):
        lm.load(folder)


def test_bytes_too_many(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        lm.load(folder)


def test_a_damaged_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32
    file.write_bytes(data)
    with pytest.raises(ValueError, match="its header is damaged"):
        lm.load(folder)


def test_a_missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"lacks model-00001-of-00002.safetensors"):
        lm.load(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="must map weights to files but is damaged"):
        lm.load(folder)


def test_a_missing_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="must be a model that mlx-lm can read but it says"):
        lm.load(folder)


def test_importing_the_room_does_not_load_mlx_lm() -> None:
    package = str(Path(lm.__file__).parents[2])
    code = f"""
import sys
sys.path.insert(0, {package!r})
import mlxsae.lm
sys.exit(any(name in sys.modules for name in ("mlx_lm", "transformers", "datasets", "huggingface_hub")))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
