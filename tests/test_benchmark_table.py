"""README's benchmark numbers are generated: the block between its markers is what stored results render to."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import table  # noqa: E402


def contest() -> dict:
    """Two blocks in which everything takes a round number of seconds."""

    def block(peer: str, seconds: float) -> dict:
        turns = {turn: [0.1] * 3 for turns in table.PRODUCTS.values() for turn in turns}
        turns |= {
            f"ours: {w}": [0.12] * 3
            for w in ("step", "step without the b_dec path", "step with clipping", "step with AuxK", "encode")
        }
        return {
            "rounds": 3,
            "versions": {peer: "1.0"},
            "samples": turns
            | {"torch: oneDNN": [0.08] * 3, "trainer: step": [0.1, 0.2, 0.4], f"{peer}: step": [seconds] * 3}
            | {"ours: phases": [{"update": 0.01}] * 3, "probe: bandwidth": [100.0] * 3},
            "memory": {"trainer": {"extra": 2**20}, peer: {"extra": 2**21}},
        }

    return {
        "machine": {"cpu": "a processor", "threads": 2, "date": "2026-01-01T00:00:00"},
        "gate": {
            "peers": {
                "trainer": {"selection": {"wrong_rows": 0}, "deterministic": True},
                "saelens-bf16": {"selection": {"wrong_rows": 3}, "deterministic": False},
            }
        },
        "shapes": {
            "S1": {
                "shape": {"n": 1024, "d_in": 1024, "d_sae": 16384, "k": 32},
                "blocks": {"sparsify": block("sparsify", 1.0), "saelens-bf16": block("saelens-bf16", 2.0)},
            }
        },
    }


def test_ratios_are_medians_over_rounds_and_floors_are_the_fastest_product():
    results = contest()
    bars = {bar.what: bar for bar in table.bars(results, "S1")}
    assert bars["sparsify / step"].value == pytest.approx(5.0)  # of 10, 5 and 2.5
    assert bars["SAELens bf16 autocast / step"].value == pytest.approx(10.0)
    assert bars["SAELens float32 / step"].holds is None
    assert bars["encode with selection / fastest float32 matmul alone"].value == pytest.approx(1.5)
    assert bars["encode with selection / fastest float32 matmul alone"].holds is False
    assert bars["step / PyTorch's float32 matmul alone"].value == pytest.approx(2.0)
    bandwidth = bars["update: 48 d_sae d_in bytes / time / probe's bandwidth"].value
    assert bandwidth == pytest.approx(48 * 16384 * 1024 / 0.01 / 100e9)


def test_rendering_names_every_contestant_with_its_gate():
    text = table.render([contest()])
    assert "| **mlxsae** | 200 ms | 2.50 | 1 | 1 MiB | yes | yes |" in text
    assert "| sparsify | 1,000 ms | 12.50 | 5.0 | 2 MiB |  |  |" in text
    assert "| SAELens bf16 autocast | 2,000 ms | 25.00 | 10.0 | 2 MiB | no | no |" in text
    other = copy.deepcopy(contest())
    other["shapes"]["S1"]["blocks"]["sparsify"]["samples"]["sparsify: step"] = [3.0] * 3
    assert table.render([other]) != text


def test_readme_block_is_found_only_between_its_markers():
    assert table.readme_block("no markers") is None
    assert table.readme_block(f"a\n{table.BEGIN}\nb\n{table.END}\nc") == "b"


def test_readme_holds_what_stored_results_render_to():
    block, results = table.readme_block((ROOT / "README.md").read_text()), table.load()
    if block is None:
        pytest.skip("README.md has no benchmark markers")
    assert results, "README.md has a benchmark table but no results are stored"
    assert block == table.render(results), "run python -m benchmarks.table --write"


def test_stored_results_are_whole():
    for path in table.RESULTS.glob("step-cpu-*.json"):
        results = json.loads(path.read_text())
        for name, entry in results["shapes"].items():
            assert table.bars(results, name)
            for peer, block in entry["blocks"].items():
                assert {len(v) for v in block["samples"].values()} == {block["rounds"]}, (name, peer)
