"""Predictions follow from counts: the linear carrying is right, the formula is the documented one, the document is theirs."""

from __future__ import annotations

import predictions
import pytest
from predictions import DEVICES, DOC, OPS, SHAPES, Shape

CHEAP = [op for op in OPS if not op.chunked]


@pytest.mark.parametrize("op", CHEAP, ids=lambda op: op.name)
def test_counts_carried_to_another_size_are_those_counted_there(op):
    s = Shape(n=48, d_in=256, d_sae=640, k=16)
    predicted = op.predict(s, DEVICES[0])
    asked, counts = op.count(s, DEVICES[0])
    assert predicted.asked == pytest.approx(sum(asked.values()), rel=0.05)
    assert predicted.efficiency == pytest.approx(counts.efficiency, abs=0.05)
    assert predicted.least <= 1.05 * predicted.asked


def test_times_are_the_documented_roofline():
    (op,) = (op for op in OPS if op.name == "sparse_decode")
    s, device = SHAPES["S1"], DEVICES[0]
    work = op.predict(s, device)
    assert work.slowest == pytest.approx(work.asked / 400e9)
    weights = 4 * s.n * s.k * s.d_in  # read from a matrix larger than the cache
    assert weights / 400e9 < work.fastest <= work.slowest
    assert (work.products, work.launches) == (0, 1)


def test_a_product_takes_the_longer_of_arithmetic_and_traffic():
    (op,) = (op for op in OPS if op.name == "topk_encode")
    s, device = Shape(n=64, d_in=128, d_sae=1024, k=8), DEVICES[2]
    arithmetic, traffic = (
        2 * 64 * 128 * 1024 / device.flops,
        4 * (64 * 128 + 1024 * 128 + 64 * 1024) / device.bandwidth,
    )
    products = op.predict(s, device).products
    assert products >= 0.99 * max(arithmetic, traffic)


def test_the_document_holds_the_predictions():
    text = DOC.read_text().replace("\n", " ")
    (op,) = (op for op in OPS if op.name == "sparse_decode")
    for shape in ("S1", "S2"):
        work = op.predict(SHAPES[shape], DEVICES[0])
        assert f"{predictions._scaled(work.asked, 'B', 'kB', 'MB', 'GB')} |" in text
        assert predictions._scaled(1e6 * work.slowest, "µs", "ms", "s") in text
