"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


# What runs the ops on MLX's default device: on a machine with a GPU, its kernels.
ON_THE_DEFAULT_DEVICE = {
    "test_topk_encode",
    "test_csr_encode",
    "test_csr_ops",
    "test_sparse_ops",
    "test_certified",
    "test_feature_update",
    "test_sae",
    "test_train",
    "test_train_parts",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m gpu` runs these on a GPU, where there is one. The file that builds a wheel goes first, or it would end last."""
    items.sort(key=lambda item: item.path.stem != "test_package")
    if mx.default_device() == mx.gpu:
        for item in items:
            if item.path.stem in ON_THE_DEFAULT_DEVICE:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and text beside the checkout; a user does not have it."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"real models and text are not here: {SHARED.name}/data is not beside the checkout")
    return SHARED


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from one random state, in whatever order they run."""
    mx.random.seed(0)
