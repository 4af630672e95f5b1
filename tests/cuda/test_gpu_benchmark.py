"""The benchmark that a GPU will run once: every contestant makes its step here, and the bars follow from the stored numbers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import cuda_text
import numpy as np
import pytest

sys.path.insert(0, str(cuda_text.ROOT))
from benchmarks.gpu import run
from benchmarks.shapes import SHAPES

MLX = [name for name, room in run.CONTESTANTS.items() if room == "mlx_steps"]
TORCH = ["torch-dense", "sparsify"]  # compiling takes a minute, OpenAI's kernels a GPU


@pytest.mark.parametrize("name", [*MLX, *TORCH])
def test_every_contestant_makes_its_step(name: str) -> None:
    needs = "sparsify" if name == "sparsify" else "torch" if name in TORCH else "mlx"
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    found = run.measure(name, run.DRY, warmup=1, steps=2)
    things = {"bfloat16 product", "float32 product", "copy"} if name == "floors" else {"step"}
    assert things <= set(found["seconds"])
    assert name.startswith("ours") == ("encode" in found["seconds"])
    assert all(len(s) == 2 and min(s) > 0 for s in found["seconds"].values())
    assert json.loads(json.dumps(found)) == found
    if name != "floors":
        assert np.isfinite(found["losses"]).all()
        if name != "sparsify":
            first = run.measure("ours-float32", run.DRY, warmup=0, steps=1)["losses"][0]
            # bfloat16 rounds pre-activations to 8 bits, and others than the exact ones may win.
            assert found["losses"][0] == pytest.approx(first, rel=2e-2 if "float32" not in name else 1e-6)


def test_a_dry_run_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cuda_text.ROOT)
    run.main(["--dry-run", "--out", str(tmp_path), "--contestants", "floors", "openai"])
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("step-")
    report = json.loads(path.read_text())
    assert {"device", "driver", "date", "versions", "MLX_ENABLE_TF32"} <= report.keys()
    assert report["device"] != "unknown"
    dry = report["shapes"]["dry"]
    assert dry["sizes"] == run.DRY._asdict()
    assert dry["summary"]["floor, seconds"] > 0
    assert dry["results"]["openai"]["failed"]  # there is no GPU, or it is not installed
    assert {row["met"] for row in dry["bars"]} == {None}


def test_the_bars_are_those_of_the_design() -> None:
    shape = SHAPES["S3"]
    copied, adam = run.copied_bytes(shape), 48 * shape.d_sae * shape.d_in
    assert copied == 2 << 30
    assert adam == 48 * 131072 * 4096

    def timed(memory: float, **seconds: float) -> dict:
        steps = {"losses": [1.0, 0.9], "peak_memory": round(memory * 12 * shape.n_params)}
        return {"seconds": {what: [9.0, s, 0.0] for what, s in seconds.items()}} | steps  # a median

    # A product of 6 ms and 4 TB/s: the floor is 6 ms + 6.44 ms.
    results = {
        "floors": {"seconds": {"bfloat16 product": [6e-3] * 3, "copy": [2 * copied / 4e12] * 3}},
        "ours-bfloat16": timed(1.1, step=15e-3, encode=6.6e-3),
        "ours-certified": timed(1.2, step=20e-3, encode=10.2e-3),
        "torch-dense": timed(3.0, step=60e-3),
        "torch-dense-compiled": timed(3.0, step=45e-3),
        "sparsify": timed(3.0, step=31e-3),
        "openai": {"failed": "No module named 'sparse_autoencoder'"},
    }
    found = run.summary(shape, results)
    assert found["floor, seconds"] == pytest.approx(6e-3 + adam / 4e12)
    rows = {row["what"]: row for row in run.bars("S3", found, results)}
    ratios = {what: row["found"] for what, row in rows.items()}
    assert ratios == {
        "encode in bfloat16 over the bare product": pytest.approx(1.1),
        "certified encode over the bare bfloat16 product": pytest.approx(1.7),
        "the faster dense PyTorch step over ours": pytest.approx(3.0),
        "sparsify's step over ours": pytest.approx(31 / 15),
        "our step over the floor": pytest.approx(15e-3 / (6e-3 + adam / 4e12)),
        "our memory over parameters and moments": pytest.approx(1.1),
        "every loss of ours is finite": 1.0,
    }
    assert [row["met"] for row in rows.values()] == [True, False, False, True, True, True, True]
    results["ours-bfloat16"]["losses"].append(float("nan"))
    assert run.bars("S3", found, results)[-1]["met"] is False
    del results["sparsify"], results["ours-certified"]
    rows = {row["what"]: row for row in run.bars("S3", run.summary(shape, results), results)}
    assert rows["sparsify's step over ours"]["met"] is None
