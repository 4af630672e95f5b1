"""Activations on disk and back: formats, order, positions, statistics, damage."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxsae import data, io, ops
from mlxsae.data import ActivationDataset, reader
from mlxsae.data.encoding import DTYPES, Stream, decode, encode, to_float32
from mlxsae.data.shards import ShardSet, ShardWriter
from mlxsae.io import arrays as array_files

ROWS = 1000


def numbered(rows: int = ROWS, d: int = 8, seed: int = 0) -> np.ndarray:
    """Random rows that begin with their number."""
    x = np.random.default_rng(seed).standard_normal((rows, d)).astype(np.float32)
    x[:, 0] = np.arange(rows)
    return x


def numbers(batches: list[mx.array]) -> list[int]:
    return [int(i) for batch in batches for i in np.array(batch[:, 0])]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> ActivationDataset:
    """Two streams that belong together, in eight shards of 128 rows; the last is shorter."""
    x = numbered()
    return ActivationDataset.from_arrays(
        {"a": x, "b": np.concatenate([x, -x], axis=1)},
        cache_dir=tmp_path_factory.mktemp("stored"),
        shard_bytes=128 * (8 + 16) * 4,
    )


# ---- formats


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 100, 128, 300])
def test_stored_types_are_as_precise_as_they_say(dtype: str, d: int) -> None:
    x = mx.random.normal((50, d)) * mx.exp(3 * mx.random.normal((50, 1)))
    x[3] = 0
    stream = Stream(d, dtype)
    fields = encode("x", stream, x)
    assert {f: (a.shape[1] if a.ndim > 1 else 0) for f, a in fields.items()} == {
        f: width for f, (_, width) in stream.fields("x").items()
    }
    assert sum(a.nbytes for a in fields.values()) == 50 * stream.row_bytes
    back = to_float32("x", stream, fields)
    error = np.abs(back - np.array(x))
    if dtype == "int8":
        scale = np.repeat(fields["x.scales"], 128, axis=1)[:, :d]
        assert (error <= 0.501 * scale).all()
        assert (np.abs(back).max(axis=1) > 0.99 * np.abs(np.array(x)).max(axis=1))[np.arange(50) != 3].all()
    else:
        assert (
            error <= {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}[dtype] * np.abs(np.array(x)) + 1e-7
        ).all()
    types = stream.fields("x")
    raw = {
        f: mx.array(a) if types[f][0] not in (mx.float16, mx.bfloat16) else mx.array(a).view(types[f][0])
        for f, a in fields.items()
    }
    decoded = decode("x", stream, raw)
    assert decoded.dtype == (mx.float32 if dtype == "int8" else DTYPES[dtype])
    assert np.array_equal(np.array(decoded.astype(mx.float32)), back)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_visible(dtype: str) -> None:
    x = mx.ones((3, 130))
    x[0, 2], x[1, 129], x[2, 0] = float("nan"), float("inf"), -float("inf")
    back = to_float32("x", Stream(130, dtype), encode("x", Stream(130, dtype), x))
    assert not np.isfinite(back).all(axis=1).any()


def test_float16_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"float16 ends at 65,504"):
        encode("x", Stream(4, "float16"), mx.full((2, 4), 1e5))


def test_a_shard_is_an_ordinary_safetensors_file(stored: ActivationDataset) -> None:
    from safetensors.numpy import load_file

    assert stored.directory is not None
    found = load_file(stored.directory / "shard_00000.safetensors")
    assert {name: a.shape for name, a in found.items()} == {
        "a": (128, 8),
        "b": (128, 16),
        **{f"{n}.{m}": (d,) for n, d in (("a", 8), ("b", 16)) for m in ("mean", "scatter")},
        "a.norms": (2,),
        "b.norms": (2,),
    }
    assert np.array_equal(found["b"], np.concatenate([found["a"], -found["a"]], axis=1))
    store = ShardSet(stored.directory)
    mapped = store.map(0, "a")
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, found["a"])


# ---- order


def test_rows_on_disk_are_strangers(stored: ActivationDataset) -> None:
    rows = numbers(list(stored.batches(100, hook_points="a", shuffle=False)))
    assert sorted(rows) == list(range(ROWS))
    for begin in range(0, ROWS, 128):
        shard = rows[begin : begin + 128]
        assert sorted(shard) == list(range(begin, min(begin + 128, ROWS)))
        assert np.abs(np.diff(shard)).mean() > 20  # 43 expected of a random order, 1 of none


@settings(max_examples=40, deadline=None)
@given(
    batch_size=st.integers(1, 400),
    block_rows=st.integers(1, 200),
    seed=st.integers(0, 5),
    epochs=st.sampled_from([0.5, 1, 2.3]),
    part=st.tuples(st.integers(0, 400), st.integers(500, ROWS)) | st.none(),
)
def test_every_row_comes_once_an_epoch(
    stored: ActivationDataset,
    batch_size: int,
    block_rows: int,
    seed: int,
    epochs: float,
    part: tuple[int, int] | None,
) -> None:
    whole = stored if part is None else stored[slice(*part)]
    n = len(whole)
    options = {"seed": seed, "epochs": epochs, "block_rows": block_rows}
    batches = whole.batches(batch_size, hook_points=["a", "b"], **options)
    pairs = [(np.array(batch["a"]), np.array(batch["b"])) for batch in batches]
    assert all(len(a) == batch_size for a, _ in pairs[:-1])
    a, b = map(np.concatenate, zip(*pairs, strict=True))
    assert np.array_equal(b, np.concatenate([a, -a], axis=1))
    rows = a[:, 0].astype(int).tolist()
    assert len(rows) == int(round(epochs * n, 3))  # 2.3 of 880 are 2024, as a product 2023.99...
    on_disk = numbers(list(whole.batches(1000, hook_points="a", shuffle=False)))
    for epoch in range(int(epochs)):
        assert sorted(rows[epoch * n : (epoch + 1) * n]) == sorted(on_disk)
    assert len(set(rows[int(epochs) * n :])) == len(rows) - int(epochs) * n
    if epochs > 2 and n > 3 * block_rows:
        assert rows[:n] != rows[n : 2 * n]


def test_same_seed_same_batches(stored: ActivationDataset) -> None:
    def run(seed: int) -> list[int]:
        return numbers(list(stored.batches(64, hook_points="a", seed=seed, block_rows=16)))

    assert run(3) == run(3) != run(4)


def test_a_batch_is_a_sample_of_all_shards(tmp_path: Path) -> None:
    """Neighbours in the text, 50 rows to a context, must not stay together: as many contexts meet in a batch as in
    one drawn from all rows, less what a block of 8 costs."""
    context, rows, batch = 50, 20_000, 256
    x = np.repeat(np.arange(rows // context, dtype=np.float32), context)[:, None]
    stored = ActivationDataset.from_arrays({"x": x}, cache_dir=tmp_path / "x", shard_bytes=4 * 1000)
    got = [len(set(numbers([b]))) for b in stored.batches(batch, block_rows=8) if len(b) == batch]
    rng = np.random.default_rng(0)
    ideal = [len(set(rng.choice(x[:, 0], batch, replace=False))) for _ in range(50)]
    assert np.mean(got) > 0.85 * np.mean(ideal)
    in_memory = [
        len(set(numbers([b]))) for b in ActivationDataset.from_arrays(x).batches(batch) if len(b) == batch
    ]
    assert np.mean(in_memory) == pytest.approx(np.mean(ideal), rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_and_their_shards_hold_the_same(tmp_path: Path, dtype: str) -> None:
    x = mx.random.normal((300, 40))
    made = ActivationDataset.from_arrays(x, cache_dir=tmp_path / "x", dtype=dtype, shard_bytes=4000)
    back = mx.concatenate(list(made.batches(7, shuffle=False))).astype(mx.float32)
    assert made.metadata["complete"]
    assert len(made) == 300
    order = np.argsort(np.array(back)[:, 0])
    tolerance = {"float32": 0, "float16": 1e-3, "bfloat16": 1e-2, "int8": 2e-2}[dtype]
    expected = np.array(x)[np.argsort(np.array(x)[:, 0])]
    if dtype == "float32":
        assert np.array_equal(np.array(back)[order], expected)
    assert np.abs(np.sort(np.array(back), axis=0) - np.sort(np.array(x), axis=0)).max() <= 3 * tolerance
    again = ActivationDataset.from_arrays(x, cache_dir=tmp_path / "x", dtype=dtype, shard_bytes=4000)
    assert mx.array_equal(back, mx.concatenate(list(again.batches(7, shuffle=False))).astype(mx.float32))


@pytest.mark.parametrize("kind", [mx.float32, mx.float16, mx.bfloat16, np.float32, np.float16, np.float64])
def test_arrays_in_memory_keep_their_type(kind: object) -> None:
    values = np.random.default_rng(0).standard_normal((20, 3))
    x = mx.array(values).astype(kind) if isinstance(kind, mx.Dtype) else values.astype(kind)
    dataset = ActivationDataset.from_arrays(x)
    (batch,) = dataset.batches(20, shuffle=False)
    assert batch.dtype == (
        kind if isinstance(kind, mx.Dtype) else mx.float16 if kind is np.float16 else mx.float32
    )
    expected = np.array(mx.array(x).astype(mx.float32)) if isinstance(x, mx.array) else x.astype(np.float32)
    assert np.array_equal(np.array(batch.astype(mx.float32)), expected)


def test_memory_mapped_arrays_are_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", numbered())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    dataset = ActivationDataset.from_arrays(mapped)
    assert sorted(numbers(list(dataset.batches(64)))) == list(range(ROWS))


# ---- positions


@settings(max_examples=30, deadline=None)
@given(
    batch_size=st.integers(1, 300), taken=st.integers(0, 12), ahead=st.integers(0, 4), seed=st.integers(0, 3)
)
def test_a_saved_position_gives_the_same_batches(
    stored: ActivationDataset, batch_size: int, taken: int, ahead: int, seed: int
) -> None:
    def make() -> data.DatasetSource:
        return stored.source(batch_size, hook_points=("a", "b"), seed=seed, epochs=3, block_rows=16)

    whole = make()
    for _ in range(taken):
        whole.next_batch()
    position, arrays = whole.state()
    assert arrays == {}
    assert json.loads(json.dumps(position)) == position
    assert len(json.dumps(position)) < 300
    other = make()
    for _ in range(ahead):  # a source that has been used goes back as well as on
        other.next_batch()
    other.restore(json.loads(json.dumps(position)), {})
    for _ in range(5):
        a, b = whole.next_batch(), other.next_batch()
        if a is None or b is None:
            assert a is b
            break
        assert all(mx.array_equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("where", ["reading", "waiting"])
def test_an_interrupt_loses_no_batch(
    stored: ActivationDataset, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Ctrl-C while a batch is read, or waited for: whoever goes on gets that batch, and the position is that of it."""
    plain, source = (stored.source(64, hook_points="a", block_rows=8, epochs=2) for _ in range(2))
    expected = [np.array(x) for (x,) in iter(plain.next_batch, None)]
    main, left = threading.current_thread(), [0]

    def strikes(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is main:
                left[0] += 1
                if left[0] % 3 == 0:
                    raise KeyboardInterrupt
            elif where == "reading":
                time.sleep(0.01)  # so that whoever asks reads too
            return real(*args, **kwargs)

        return call

    if where == "reading":
        monkeypatch.setattr(stored._store, "read", strikes(stored._store.read))
    else:
        monkeypatch.setattr(reader.Future, "result", strikes(reader.Future.result))
    found, struck = [], 0
    while True:
        try:
            batch = source.next_batch()
        except KeyboardInterrupt:
            struck += 1
            assert source.cursor["taken"] == sum(map(len, found))
            continue
        if batch is None:
            break
        found.append(np.array(batch[0]))
    assert struck > 3
    assert len(found) == len(expected)
    assert all(map(np.array_equal, found, expected))


def test_sampling_disturbs_nothing(stored: ActivationDataset) -> None:
    plain, sampled = (stored.source(64, hook_points="a", block_rows=8) for _ in range(2))
    assert isinstance(sampled, data.ActivationSource)
    for step in range(5):
        (x,) = sampled.sample(100 * step + 1)
        assert x.shape == (100 * step + 1, 8)
        assert len(set(numbers([x]))) == len(x)
        assert mx.array_equal(sampled.next_batch()[0], plain.next_batch()[0])  # type: ignore[index]
    assert sampled.sample(10**9)[0].shape == (ROWS, 8)


def test_positions_of_another_source_are_refused(stored: ActivationDataset) -> None:
    position = stored.source(64, hook_points="a").cursor
    for other, message in (
        (stored.source(64, hook_points="b"), r"streams must be \['a'\]"),
        (stored.source(64, hook_points="a", seed=1), r"seed must be 0 but got 1"),
        (stored.source(64, hook_points="a", block_rows=3), "block_rows"),
        (stored[10:].source(64, hook_points="a"), "rows"),
    ):
        with pytest.raises(ValueError, match=message):
            other.cursor = position


def test_unwritten_memory_is_an_array_like_any_other() -> None:
    for dtype in (mx.float32, mx.uint16, mx.int8):
        x = ops.unwritten((3, 5), dtype)
        np.array(x, copy=False)[:] = 7
        assert x.shape == (3, 5)
        assert x.dtype == dtype
        assert mx.all(x == 7).item()
    assert ops.unwritten((0, 4), mx.float32).shape == (0, 4)
    with pytest.raises(ValueError, match="no negative length"):
        ops.unwritten((-2, 3), mx.float32)  # which would take 48 GiB


def test_a_batch_kept_is_never_overwritten(stored: ActivationDataset) -> None:
    """Readers fill the memory of arrays: what was handed out must stay as it was."""
    source = stored.source(64, hook_points="a")
    kept = [source.next_batch()[0] for _ in range(40)]  # type: ignore[index]
    before = [np.array(x) for x in kept]
    for _ in range(40):
        source.next_batch()
    assert all(np.array_equal(np.array(x), b) for x, b in zip(kept, before, strict=True))


def test_what_cannot_be_read_is_never_handed_out(fresh: Path) -> None:
    """Whoever reads a batch, the thread or the one that asks for it, and however often it is asked for."""
    made = ActivationDataset.open(fresh)
    with open(fresh / "shard_00001.safetensors", "r+b") as file:
        file.truncate(1000)
    source = made.source(32, block_rows=16)
    good = failed = 0
    for _ in range(4 * ROWS // 32):
        try:
            (x,) = source.next_batch() or (None,)
        except (OSError, ValueError) as e:
            failed += "shard_00001.safetensors" in str(e)
        else:
            assert set(numbers([x])) <= set(range(ROWS))
            assert mx.all(mx.abs(x[:, 1:]) < 10).item()
            good += 1
    assert good > 10
    assert failed > 10


def test_many_threads_may_read(stored: ActivationDataset) -> None:
    expected = numbers(list(stored.batches(64, hook_points="a")))
    found: list[list[int]] = []
    threads = [
        threading.Thread(
            target=lambda: found.append([int(i) for i in read_numpy(stored.directory)])  # type: ignore[arg-type]
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(sorted(rows) == sorted(expected) for rows in found)


def read_numpy(directory: Path) -> np.ndarray:
    store = ShardSet(directory)
    out = np.empty((store.rows, 8), np.float32)
    runs = np.stack([np.arange(store.rows), np.ones(store.rows, np.int64)], axis=1)
    store.read("a", runs, out)
    return out[:, 0]


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """64 MiB read three times over: anonymous memory stays below the batches in flight and 32 MiB."""
    script = f"""
import re, numpy as np, mlx.core as mx
from mlxsae.data import ActivationDataset
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
path = {str(tmp_path / "x")!r}
rng = np.random.default_rng(0)
np.save({str(tmp_path / "x.npy")!r}, rng.standard_normal((65536, 256), dtype=np.float32))
made = ActivationDataset.from_arrays(np.load({str(tmp_path / "x.npy")!r}, mmap_mode="r"), cache_dir=path, shard_bytes=4 << 20)
read = ActivationDataset.open(path)
list(read.batches(512, epochs=0.1))
before, most = anonymous(), 0
for batch in read.batches(512, epochs=3):
    mx.eval(batch)
    most = max(most, anonymous())
print((most - before) >> 20)
"""
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32


# ---- statistics


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_those_of_the_stored_rows(tmp_path: Path, dtype: str) -> None:
    x = (100 + np.random.default_rng(0).standard_normal((3000, 20)) * np.arange(1, 21)).astype(np.float32)
    made = ActivationDataset.from_arrays(x, cache_dir=tmp_path / "x", dtype=dtype, shard_bytes=20 * 4 * 700)
    rows = np.concatenate([np.array(b.astype(mx.float32)) for b in made.batches(100, shuffle=False)]).astype(
        np.float64
    )
    norms = np.linalg.norm(rows, axis=1)
    for found in (
        made.statistics(),
        made[0:3000].statistics(),
        ActivationDataset.from_arrays(rows).statistics(),
    ):
        assert found.rows == 3000
        np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(found.variance, rows.var(axis=0), rtol=1e-5)
        assert found.mean_norm == pytest.approx(norms.mean(), rel=1e-6)
        assert found.mean_square_norm == pytest.approx((norms**2).mean(), rel=1e-6)
        assert found.scale == pytest.approx(np.sqrt(20) / norms.mean(), rel=1e-6)
    part = made[100:900]
    np.testing.assert_allclose(part.statistics().mean, rows[100:900].mean(axis=0), rtol=1e-6)


# ---- training


def test_fit_takes_a_dataset(stored: ActivationDataset) -> None:
    import mlxsae

    sae = mlxsae.SAE(d_in=8, d_sae=32, k=4, seed=0)
    config = mlxsae.TrainConfig(total_tokens=4000, batch_size=200, sample_size=500)
    result = mlxsae.fit(sae, stored.source(200, hook_points="a"), config)
    assert result.state.tokens == 4000
    assert np.isfinite([r["loss"] for r in result.history]).all()
    config = mlxsae.TrainConfig(epochs=3, batch_size=100, sample_size=500)
    source = stored.source(100, hook_points="a")
    assert source.rows == ROWS
    assert mlxsae.fit(sae, source, config).state.tokens == 3 * ROWS


def test_several_saes_train_on_one_stream(stored: ActivationDataset, tmp_path: Path) -> None:
    """One on each stream and a transcoder between them; broken off and resumed, the same bits; alone, the same."""
    import mlxsae
    from mlxsae.train import Job, fit_many

    config = mlxsae.TrainConfig(total_tokens=2000, batch_size=100, sample_size=500, checkpoint_every=7)

    def jobs() -> list[Job]:
        shapes = ((8, 8, (0,)), (16, 16, (1,)), (8, 16, (0, 1)))
        return [
            Job(mlxsae.SAE(d_in=a, d_out=b, d_sae=32, k=4, seed=0), config, fields=fields, name=f"job{i}")
            for i, (a, b, fields) in enumerate(shapes)
        ]

    def source() -> data.DatasetSource:
        return stored.source(100, hook_points=("a", "b"), seed=3)

    whole = fit_many(jobs(), source(), checkpoint_dir=tmp_path / "whole")

    class Broken(data.DatasetSource):
        def next_batch(self) -> tuple[mx.array, ...] | None:
            if self.cursor["taken"] == 1100:
                raise RuntimeError("broken off")
            return super().next_batch()

    with pytest.raises(RuntimeError, match="broken off"):
        fit_many(jobs(), Broken(source()._reader, ("a", "b")), checkpoint_dir=tmp_path / "broken")
    resumed = fit_many(jobs(), source(), checkpoint_dir=tmp_path / "broken", resume=True)
    alone = mlxsae.fit(jobs()[0].sae, stored.source(100, hook_points="a", seed=3), config)
    for a, b in zip([*whole, whole[0]], [*resumed, alone], strict=True):
        assert mx.array_equal(a.sae.W_enc, b.sae.W_enc)
        assert mx.array_equal(a.sae.W_dec, b.sae.W_dec)


# ---- damage


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    ActivationDataset.from_arrays(numbered(), cache_dir=tmp_path / "set", shard_bytes=100 * 32)
    return tmp_path / "set"


def test_a_changed_byte_is_found(fresh: Path) -> None:
    ActivationDataset.open(fresh).verify()
    path = fresh / "shard_00003.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard_00003.*SHA-256"):
        ActivationDataset.open(fresh).verify()


def test_truncated_missing_and_foreign_files(fresh: Path, tmp_path: Path) -> None:
    path = fresh / "shard_00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"shard_00002.safetensors must have \d+ bytes"):
        ActivationDataset.open(fresh)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard_00002.safetensors must exist"):
        ActivationDataset.open(fresh)
    with pytest.raises(FileNotFoundError, match=r"must hold dataset.json"):
        ActivationDataset.open(tmp_path)
    index = fresh / "dataset.json"
    index.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        ActivationDataset.open(fresh)
    index.write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="written by mlxsae"):
        ActivationDataset.open(fresh)
    index.write_text('{"format": "mlxsae-activations", "format_version": 99}')
    with pytest.raises(ValueError, match="update mlxsae"):
        ActivationDataset.open(fresh)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("streams"), "streams of the index is None, not dict"),
        (lambda index: index.pop("shards"), "shards of the index is None, not list"),
        (lambda index: index.update(complete="no"), "complete of the index is 'no', not bool"),
        (lambda index: index.update(origin=None), "origin of the index is None"),
        (lambda index: index.update(format_version="x"), "format_version of the index is 'x'"),
        (lambda index: index.update(streams={"a": 5}), "d of a is None, not int"),
        (lambda index: index["shards"][1].pop("rows"), "rows of shard 1 is None, not int"),
        (lambda index: index["shards"][1].update(rows="x"), "rows of shard 1 is 'x', not int"),
        (lambda index: index["shards"][1].update(rows=-5), "rows of shard 1 is -5"),
    ],
)
def test_damaged_index(fresh: Path, change, message: str) -> None:
    path = fresh / "dataset.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"dataset.json must be whole but {message}"):
        ActivationDataset.open(fresh)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"must be empty or a dataset but holds thesis.tex"):
        ActivationDataset.from_arrays(numbered(), cache_dir=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_set_is_not_taken_for_ours(fresh: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe.arrays must be .*; choose another folder"):
        ActivationDataset.from_arrays(numbered(seed=1), cache_dir=fresh, shard_bytes=100 * 32)
    with pytest.raises(ValueError, match=r"shard_rows must be 100 but got 50"):
        ActivationDataset.from_arrays(numbered(), cache_dir=fresh, shard_bytes=50 * 32)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_damaged_header_never_gives_other_rows(tmp_path: Path, dtype: str) -> None:
    """Every byte of a shard's header is changed in turn: one sentence that names the file, or the rows themselves."""
    ActivationDataset.from_arrays(
        {"a": numbered(30), "b": numbered(30)}, cache_dir=tmp_path / "x", dtype=dtype, shard_bytes=10**6
    )
    file = tmp_path / "x" / "shard_00000.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")

    def read() -> list[np.ndarray]:
        made = ActivationDataset.open(tmp_path / "x")
        rows = [np.array(x) for x in next(made.batches(30, hook_points=["a", "b"], shuffle=False)).values()]
        return [*rows, made.statistics("a").mean, made.statistics("b").variance]

    whole, said = read(), []
    for at in range(8, 8 + length):
        file.write_bytes(raw[:at] + b"9" + raw[at + 1 :])
        try:
            found = read()
        except ValueError as error:
            said.append(str(error))
        else:
            assert all(map(np.array_equal, found, whole))
    assert len(said) > 0.8 * length
    assert all(str(file) in sentence for sentence in said)


def test_home_and_a_working_directory_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.arange(60, dtype=np.float32).reshape(20, 3)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(work)
    ActivationDataset.from_arrays(x, cache_dir="~/stored", shard_bytes=60)
    ActivationDataset.from_arrays(x, cache_dir="stored", shard_bytes=60)
    assert (tmp_path / "stored" / "dataset.json").exists()
    opened = [ActivationDataset.open("~/stored"), ActivationDataset.open("stored")]
    assert sorted(path.name for path in work.iterdir()) == ["stored"]
    monkeypatch.chdir("/")
    for made in opened:
        rows = np.array(next(made.batches(20)))
        assert np.array_equal(rows[np.argsort(rows[:, 0])], x)
        made.verify()


def test_one_writer_a_folder(tmp_path: Path) -> None:
    streams = {"x": Stream(4, "float32")}
    with (
        ShardWriter(tmp_path / "x", streams, shard_rows=10),
        pytest.raises(RuntimeError, match="one writer"),
        ShardWriter(tmp_path / "x", streams, shard_rows=10),
    ):
        pass
    with ShardWriter(tmp_path / "x", streams, shard_rows=10):
        pass


def test_rows_are_not_to_be_had_one_by_one() -> None:
    made = ActivationDataset.from_arrays(numbered(9))
    with pytest.raises(TypeError, match=r"slice of rows but got int; batches\(\) gives the rows"):
        made[3]  # type: ignore[index]
    with pytest.raises(TypeError, match="slice of rows"):
        list(made)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("make_bad", "message"),
    [
        (lambda: ActivationDataset.from_arrays({}), "at least one row"),
        (lambda: ActivationDataset.from_arrays(np.zeros((0, 4), np.float32)), "at least one row"),
        (lambda: ActivationDataset.from_arrays(np.zeros(4, np.float32)), r"\[n, d\]"),
        (lambda: ActivationDataset.from_arrays(np.zeros((4, 4), np.int64)), "floating point"),
        (lambda: ActivationDataset.from_arrays({"a": numbered(3), "b": numbered(4)}), "n=3"),
        (lambda: ActivationDataset.from_arrays(numbered(9))[5:5], "at least one"),
        (lambda: ActivationDataset.from_arrays(numbered(9))[::2], "neighbouring"),
        (lambda: next(ActivationDataset.from_arrays(numbered(9)).batches(0)), "batch_size"),
        *(
            (
                lambda epochs=e: next(ActivationDataset.from_arrays(numbered(9)).batches(3, epochs=epochs)),
                "epochs must be",
            )
            for e in (0, -1, float("nan"), float("-inf"))
        ),
        (
            lambda: data.ArraySource(numbered(9), batch_size=3, epochs=float("-inf")),
            "epochs must be positive",
        ),
        (lambda: ActivationDataset.from_arrays(numbered(9)).d("z"), "must be one of x but got 'z'"),
        (lambda: ActivationDataset.from_arrays({"a": numbered(9), "b": numbered(9)}).d(), "one of a, b"),
        (lambda: next(ActivationDataset.from_arrays(numbered(9)).batches(3, tokens=True)), "tokens"),
        (lambda: next(ActivationDataset.from_arrays(numbered(9)).batches(3, hook_points=["x", "x"])), "once"),
        (
            lambda: next(
                ActivationDataset.from_arrays({"a": numbered(9), "b": numbered(9)}).batches(
                    3, hook_points=["a", ("a", "b")]
                )
            ),
            "input of each pair must be given once but got a, a",
        ),
        (lambda: Stream(4, "int4"), "dtype must be one of"),
        (lambda: ShardWriter("x", {"tokens": Stream(4, "int8")}, shard_rows=4), "must not be called"),
    ],
)
def test_bad_arguments(make_bad, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make_bad()


def test_io_still_reads_what_it_writes(tmp_path: Path) -> None:
    x = {"a": mx.arange(6, dtype=mx.bfloat16).reshape(2, 3), "b": mx.array(3)}
    io.atomic.write_files(tmp_path, {"x.safetensors": array_files.writer(x)})  # type: ignore[attr-defined]
    assert all(mx.array_equal(x[n], a) for n, a in array_files.read(tmp_path / "x.safetensors").items())
    entry = array_files.entries(tmp_path / "x.safetensors")["a"]
    assert (entry.dtype, entry.shape) == (mx.bfloat16, (2, 3))
