"""The field's libraries as oracles. They live in an environment of their own: ``make test-peers``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from peers_case import D_IN, D_SAE, Case, N

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read when sparsify is imported


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "peers: compares with SAELens, dictionary_learning, sparsify, transformers (make test-peers)",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Only a run that names the marker collects these: they need torch, which the project does not."""
    return None if "peers" in (config.getoption("markexpr") or "") else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.peers)


@pytest.fixture(params=[0, 1], ids=["gaussian", "offset"])
def case(request: pytest.FixtureRequest) -> Case:
    """Gaussian activations, and ones with a large common mean, as residual streams have; 30 % of the latents dead."""
    rng = np.random.default_rng(request.param)

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size, dtype=np.float32)

    w_dec = normal(D_SAE, D_IN)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    x = normal(N, D_IN) + request.param * 5 * normal(D_IN)
    b_dec = x.mean(axis=0) + 0.1 * normal(D_IN)
    w_enc = w_dec.T + 0.1 * normal(D_IN, D_SAE)
    return Case(np.ascontiguousarray(w_enc), 0.1 * normal(D_SAE), w_dec, b_dec, x, rng.random(D_SAE) < 0.3)
