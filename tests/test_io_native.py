"""The native format: round trips, SAELens' layout, atomicity, damaged files."""

from __future__ import annotations

import errno
import json
import resource
import signal
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxsae.io import arrays, atomic, load, save
from mlxsae.sae import SAE, BatchTopK, Crosscoder, CrossLayerTranscoder, JumpReLU, Rule

FILES = ("cfg.json", "metadata.json", "sae_weights.safetensors")


def random_sae(d_out: int | None = None, dtype: mx.Dtype = mx.float32) -> SAE:
    sae = SAE(8, 24, k=3, d_out=d_out, dtype=dtype, seed=0)
    sae.b_enc = mx.random.normal((24,), key=mx.random.key(1)).astype(dtype)
    sae.b_dec = mx.random.normal((sae.d_out,), key=mx.random.key(2)).astype(dtype)
    return sae


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and mx.array_equal(a, b).item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("d_out", [None, 5, 8])
def test_round_trip_keeps_every_bit(tmp_path: Path, dtype: mx.Dtype, d_out: int | None) -> None:
    sae = random_sae(d_out, dtype)
    sae.metadata = {"hook_name": "blocks.2.hook_resid_post", "metrics": {"fvu": 0.03}, "model_name": "tiny"}
    save(sae, tmp_path / "new" / "sae", metadata={"note": "mine"})
    again = load(tmp_path / "new" / "sae")
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert same(getattr(again, name), getattr(sae, name)), name
    assert again.apply_b_dec_to_input == sae.apply_b_dec_to_input
    assert again.transcoder == sae.transcoder == (d_out is not None)  # also where both have one width
    assert again.rule.k == 3
    assert again.metadata == sae.metadata | {"note": "mine"}
    x = mx.random.normal((4, 8), key=mx.random.key(3))
    assert same(again(x), sae(x))
    assert sorted(p.name for p in (tmp_path / "new" / "sae").iterdir()) == sorted(FILES)


def test_layout_is_saelens(tmp_path: Path) -> None:
    """Keys and shapes as sae_lens 6.54 writes and wants them, read by the safetensors library."""
    sae = random_sae()
    sae.metadata = {"hook_name": "blocks.1.hook_mlp_out", "prepend_bos": True, "metrics": {"l0": 3.0}}
    save(sae, tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    assert {n: (w.shape, w.dtype.name) for n, w in weights.items()} == {
        "W_enc": ((8, 24), "float32"),
        "W_dec": ((24, 8), "float32"),
        "b_enc": ((24,), "float32"),
        "b_dec": ((8,), "float32"),
    }
    np.testing.assert_array_equal(weights["W_enc"], np.array(sae.encoder.weight).T)
    assert weights["W_enc"].flags.c_contiguous
    config = json.loads((tmp_path / "cfg.json").read_text())
    metadata = config.pop("metadata")
    assert config == {
        "architecture": "topk",
        "d_in": 8,
        "d_sae": 24,
        "k": 3,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }
    assert int(metadata["sae_lens_version"].split(".")[0]) >= 6  # or SAELens takes it for its old format
    assert metadata["hook_name"] == "blocks.1.hook_mlp_out"
    assert "metrics" not in metadata
    assert json.loads((tmp_path / "metadata.json").read_text())["metadata"]["metrics"] == {"l0": 3.0}


def test_a_folder_from_elsewhere_without_our_metadata(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "W_enc": rng.normal(size=(6, 10)),
        "W_dec": rng.normal(size=(10, 6)),
        "b_enc": rng.normal(size=10),
        "b_dec": rng.normal(size=6),
    }
    weights = {name: w.astype(np.float32) for name, w in weights.items()}
    save_file(weights, tmp_path / "sae_weights.safetensors")
    config = {
        "architecture": "topk",
        "d_in": 6,
        "d_sae": 10,
        "k": 2,
        "dtype": "float32",
        "device": "cuda:0",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": True,
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "h"},
    }
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    sae = load(tmp_path)
    assert sae.metadata == {"hook_name": "h"}
    # Selection and decoding with the decoder's norm, as SAELens defines it, in float64.
    x = rng.normal(size=(20, 6))
    w = {name: a.astype(np.float64) for name, a in weights.items()}
    norm = np.linalg.norm(w["W_dec"], axis=1)
    pre = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norm
    keep = np.argsort(-pre, axis=1)[:, :2]
    acts = np.zeros_like(pre)
    np.put_along_axis(acts, keep, np.maximum(np.take_along_axis(pre, keep, 1), 0), 1)
    expected = acts / norm @ w["W_dec"] + w["b_dec"]
    got_acts = np.array(sae.to_dense(sae.encode(mx.array(x.astype(np.float32)))))
    np.testing.assert_allclose(got_acts, acts, atol=1e-5)
    np.testing.assert_allclose(np.array(sae(mx.array(x.astype(np.float32)))), expected, atol=1e-5)


# ---- the earlier files survive -----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    save(random_sae(), tmp_path)
    return tmp_path, {name: (tmp_path / name).read_bytes() for name in FILES}


def unchanged(directory: Path, before: dict[str, bytes]) -> bool:
    """Every file as it was, and nothing left over."""
    return {p.name: p.read_bytes() for p in directory.iterdir()} == before


def other_sae() -> SAE:
    return SAE(64, 512, k=3, seed=9)


def test_full_disk(saved: tuple) -> None:
    """A real refusal by the kernel half-way through the weights: the process may not write beyond 64 KiB a
    file.
    """
    directory, before = saved
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
        with pytest.raises(OSError) as error:
            save(other_sae(), directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG
    assert unchanged(directory, before)


def test_no_space_at_sync(saved: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, before = saved

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(other_sae(), directory)
    assert unchanged(directory, before)


def test_metadata_that_json_cannot_hold(saved: tuple) -> None:
    directory, before = saved
    for value in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            save(other_sae(), directory, metadata={"x": value})
        assert unchanged(directory, before)
    with pytest.raises(ValueError, match=r"\[save\] metadata must be what JSON can hold but .*float32"):
        save(other_sae(), directory, metadata={"fvu": np.float32(0.5)})


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        save(random_sae(), tmp_path / "file" / "sae")
    assert (tmp_path / "file").read_text() == "in the way"


def test_new_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "thing"

    def half_written() -> None:
        with atomic.new_directory(target) as directory:
            (directory / "a").write_text("1")
            (directory / "missing").read_text()

    with pytest.raises(FileNotFoundError):
        half_written()
    assert list(tmp_path.iterdir()) == []
    for text in ("1", "2"):
        with atomic.new_directory(target) as directory:
            (directory / "a").write_text(text)
            assert not target.exists() or (target / "a").read_text() == "1"
        assert (target / "a").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_several_threads_save_into_one_folder(tmp_path: Path) -> None:
    """Each writer has temporary files of its own: no write fails, and what stays is one writer's."""
    saes = [SAE(64, 256, k=3, seed=seed) for seed in range(3)]
    mx.eval([sae.parameters() for sae in saes])
    writers = [arrays.writer({"w": sae.W_dec}) for sae in saes]

    def write(writer: atomic.Writer) -> None:
        for _ in range(30):
            atomic.write_files(tmp_path, {"a": writer, "b": writer})

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, writers))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    for name in ("a", "b"):
        assert any(same(arrays.read(tmp_path / name)["w"], sae.W_dec) for sae in saes)


def test_files_of_others_stay(tmp_path: Path) -> None:
    """A ``config.yaml`` in the folder of a run is somebody's, unless it is a cross-layer transcoder's."""
    mine = {"config.yaml": b"seed: 1\n", "my_W_enc_0.safetensors": b"mine"}
    for name, text in mine.items():
        (tmp_path / name).write_bytes(text)
    save(random_sae(), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in mine} == mine
    (tmp_path / "config.yaml").write_text("model_kind: cross_layer_transcoder\n")
    (tmp_path / "topk_W_dec_3.safetensors").write_bytes(b"of an earlier one")
    save(random_sae(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*FILES, "my_W_enc_0.safetensors"])


def test_home_is_where_the_tilde_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    sae = random_sae()
    save(sae, "~/kept/sae")
    assert sorted(p.name for p in (tmp_path / "home/kept/sae").iterdir()) == sorted(FILES)
    assert same(load("~/kept/sae").W_dec, sae.W_dec)
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_ranked_latents_that_write_nothing(tmp_path: Path) -> None:
    """Files have the norms of decoder rows folded in: a row of zeros stays one, where 0 / 0 is NaN."""
    sae = SAE(8, 24, k=3, rank_by_decoder_norm=True, seed=0)
    w_dec = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)
    w_dec[5] = 0
    sae.W_dec = mx.array(w_dec)
    save(sae, tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    norms = np.linalg.norm(w_dec, axis=1)
    for name, a in weights.items():
        assert np.isfinite(a).all(), name
    np.testing.assert_allclose(np.linalg.norm(weights["W_dec"], axis=1), norms > 0, atol=1e-6)
    x = np.random.default_rng(1).normal(size=(20, 8))
    pre = x @ np.array(sae.W_enc, np.float64)
    kept = pre * norms >= np.sort(pre * norms, axis=1)[:, -3, None]
    want = np.where(kept, np.maximum(pre, 0), 0) @ w_dec
    np.testing.assert_allclose(load(tmp_path)(mx.array(x.astype(np.float32))), want, atol=1e-5)


# ---- bad files ---------------------------------------------------------------------------------------------


def edit(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "cfg.json").read_text())
    for key, value in changes.items():
        if value is ...:
            del config[key]
        else:
            config[key] = value
    (directory / "cfg.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": ...}, r"\[load\] cfg\.json must have the keys .* but lacks \['k'\]"),
        ({"d_sae": ...}, r"lacks \['d_sae'\]"),
        ({"metadata": ...}, r"lacks \['metadata'\]"),
        (
            {"activation_fn": "relu"},
            r"\[load\] cfg\.json must have only known keys but has \['activation_fn'\]",
        ),
        ({"architecture": "vq"}, r"\[load\] architecture must be one of .*topk.* but got 'vq'"),
        ({"architecture": ["topk"]}, r"\[load\] architecture must be one of"),
        ({"d_in": 9}, r"\[load\] W_enc must have shape \(9, 24\) by cfg\.json but got \(8, 24\)"),
        ({"d_in": "8"}, r"\[load\] d_in must be a positive integer but got '8'"),
        ({"d_sae": -1}, r"\[load\] d_sae must be a positive integer but got -1"),
        ({"k": 25}, r"\[SAE\] k must be in \(0, d_sae\] but got k=25 with d_sae=24"),
        ({"dtype": "float8"}, r"\[load\] dtype must be one of .* but got 'float8'"),
        (
            {"normalize_activations": "constant_norm_rescale"},
            r"\[load\] normalize_activations must be one of \['none', 'layer_norm'\]",
        ),
        ({"apply_b_dec_to_input": "yes"}, r"\[load\] apply_b_dec_to_input must be one of"),
        ({"metadata": []}, r"\[load\] metadata must be an object"),
    ],
)
def test_bad_configuration(saved: tuple, changes: dict, message: str) -> None:
    edit(saved[0], **changes)
    with pytest.raises(ValueError, match=message):
        load(saved[0])


def test_sizes_that_do_not_divide(tmp_path: Path) -> None:
    save(Crosscoder(4, 2, 24, k=3), tmp_path)
    edit(tmp_path, n_sources=3)
    with pytest.raises(ValueError, match=r"\[load\] n_sources=3 must divide d_in=8 in cfg\.json"):
        load(tmp_path)
    save(CrossLayerTranscoder(4, 2, 24, k=3), tmp_path)
    for size, value in (("d_in", 9), ("d_sae", 49)):
        save(CrossLayerTranscoder(4, 2, 24, k=3), tmp_path)
        edit(tmp_path, **{size: value})
        with pytest.raises(ValueError, match=rf"\[load\] n_layers=2 must divide {size}={value} in cfg\.json"):
            load(tmp_path)


def test_json_that_is_none(saved: tuple) -> None:
    (saved[0] / "cfg.json").write_text('{"architecture": "to')
    with pytest.raises(ValueError, match=r"cfg\.json must be JSON but is damaged"):
        load(saved[0])
    (saved[0] / "cfg.json").write_text("[]")
    with pytest.raises(ValueError, match=r"cfg\.json must be a JSON object but is a list"):
        load(saved[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": 5}, r"rule an object but got 1 and 5 in metadata\.json"),
        ({"format_version": "one"}, "format_version must be an integer"),
        ({"rule": {"architecture": []}}, None),
        ({"rule": {"architecture": "relu"}}, "must be one of topk but is relu"),
    ],
)
def test_damaged_metadata(saved: tuple, changes: dict, message: str | None) -> None:
    path = saved[0] / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if message is None:
        load(saved[0])
        return
    with pytest.raises(ValueError, match=message):
        load(saved[0])


@pytest.mark.parametrize("k", ["8", 8.0, None, True])
def test_a_rule_of_other_types(saved: tuple, k: object) -> None:
    edit(saved[0], k=k)
    with pytest.raises(ValueError, match=r"must fit the rule topk but \[TopK\] k must be an int"):
        load(saved[0])


def test_metadata_of_a_newer_format(saved: tuple) -> None:
    (saved[0] / "metadata.json").write_text('{"format": "mlxsae", "format_version": 99, "metadata": {}}')
    with pytest.raises(ValueError, match=r"format_version must be at most 1 but got 99; update mlxsae"):
        load(saved[0])


@pytest.mark.parametrize("missing", ["cfg.json", "sae_weights.safetensors", ""])
def test_missing_files(saved: tuple, missing: str) -> None:
    directory = saved[0]
    if missing:
        (directory / missing).unlink()
    else:
        directory = directory / "nowhere"
    with pytest.raises(FileNotFoundError, match=r"\[load\] .* must exist but does not"):
        load(directory)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_weights(saved: tuple, keep: float) -> None:
    path = saved[0] / "sae_weights.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep) if 0 < keep < 1 else int(keep)])
    with pytest.raises(
        ValueError, match=r"\[load\] .*sae_weights\.safetensors must be a whole safetensors file but"
    ):
        load(saved[0])


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (with_header(b"not json"), "its header is damaged"),
        (with_header(b"[]"), "its header is damaged"),
        (with_header(b'{"a": {"dtype": "F32"}}'), "its header is damaged"),
        (struct.pack("<Q", 1 << 60) + b"{}", "its header claims"),
        (
            with_header(b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', b"0000"),
            "unknown dtype F99",
        ),
        (
            with_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"0000"),
            "a should take bytes",
        ),
        (
            with_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', b"00000000"),
            "a should take",
        ),
        (
            with_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"00000"),
            "has .* bytes where",
        ),
        *(
            (
                with_header(b'{"a": {"dtype": "F32", "shape": %s, "data_offsets": %s}}' % (shape, ends)),
                "a has the",
            )
            for shape, ends in (
                (b"[-1, -1]", b"[0, 4]"),
                (b"[1.0]", b"[0, 4]"),
                (b"[true]", b"[0, 4]"),
                (b'"1"', b"[0, 4]"),
                (b"[1]", b"[0, 4, 8]"),
                (b"[1]", b"[0, null]"),
            )
        ),
        (
            with_header(b'{"a": {"dtype": "F32", "shape": [%d], "data_offsets": [0, 4]}}' % 2**70),
            "a should take",
        ),
        (with_header(b"[" * 100_000), "its header is damaged"),
    ],
)
def test_damaged_weights(saved: tuple, raw: bytes, message: str) -> None:
    (saved[0] / "sae_weights.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        load(saved[0])


def test_wrong_arrays(saved: tuple) -> None:
    weights = load_file(saved[0] / "sae_weights.safetensors")
    weights["threshold"] = weights.pop("b_enc")
    save_file(weights, saved[0] / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=r"lacks \['b_enc'\] and has unknown \['threshold'\]"):
        load(saved[0])


def test_whole_numbers_are_no_weights(saved: tuple) -> None:
    weights = load_file(saved[0] / "sae_weights.safetensors")
    weights["b_enc"] = weights["b_enc"].astype(np.int32)
    save_file(weights, saved[0] / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=r"b_enc must be floating point but got mlx.core.int32"):
        load(saved[0])


@pytest.mark.parametrize("threshold", [None, "0.5", [0.5], 0.75])
def test_a_batch_topk_threshold_that_is_not_the_weights(tmp_path: Path, threshold: object) -> None:
    """One of metadata.json alone would rule."""
    save(SAE(8, 24, rule=BatchTopK(3, threshold=1 / 3)), tmp_path)
    assert load(tmp_path).rule.threshold == 1 / 3
    path = tmp_path / "metadata.json"
    ours = json.loads(path.read_text())
    path.write_text(json.dumps(ours | {"rule": ours["rule"] | {"threshold": threshold}}))
    with pytest.raises(
        ValueError, match=r"\[load\] the threshold in metadata.json must be that of the weights but is"
    ):
        load(tmp_path)
    path.unlink()
    np.testing.assert_array_equal(load(tmp_path).rule.threshold, np.full(24, 1 / 3, np.float32))


def test_damaged_layers_of_a_cross_layer_transcoder(tmp_path: Path) -> None:
    save(CrossLayerTranscoder(4, 2, 24, rule=JumpReLU()), tmp_path)
    layer = tmp_path / "W_dec_1.safetensors"
    whole = layer.read_bytes()
    save_file({"W_dec_1": np.zeros((24, 1, 4), np.int32)}, layer)
    with pytest.raises(
        ValueError, match=r"\[load\] W_dec must be floating point but got mlx.core.int32 in .*W_dec_1"
    ):
        load(tmp_path)
    layer.write_bytes(whole)
    (tmp_path / "cfg.json").unlink()
    assert type(load(tmp_path)) is CrossLayerTranscoder
    save_file({"W_enc_0": np.zeros(24, np.float32)}, tmp_path / "W_enc_0.safetensors")
    with pytest.raises(ValueError, match=r"\[load\] W_enc_0 must have shape \[d_layer, d\] but has \(24,\)"):
        load(tmp_path)


def test_a_rule_that_files_do_not_know(tmp_path: Path) -> None:
    class Mine(Rule):
        pass

    with pytest.raises(ValueError, match=r"\[save\] rule must be one of .*topk.* but got Mine"):
        save(SAE(4, 8, rule=Mine()), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", sorted(arrays._DTYPES))
def test_array_files_agree_with_mlx(tmp_path: Path, dtype: str) -> None:
    array = (mx.random.normal((3, 5), key=mx.random.key(0)) * 3).astype(arrays._DTYPES[dtype])
    written = {"a": array, "empty": mx.zeros((0, 4), array.dtype), "scalar": array[0, 0], "view": array.T}
    atomic.write_files(tmp_path, {"x.safetensors": arrays.writer(written, {"format": "pt"})})
    for read in (mx.load(str(tmp_path / "x.safetensors")), arrays.read(tmp_path / "x.safetensors")):
        assert read.keys() == written.keys()
        for name, value in written.items():
            assert read[name].shape == value.shape
            assert same(read[name], value), name
