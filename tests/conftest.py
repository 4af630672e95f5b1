"""Fixtures shared by all tests."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
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
    """`-m gpu` runs these on a GPU, where there is one."""
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


@pytest.fixture(autouse=True)
def no_lost_tasks() -> Iterator[None]:
    """Set MLX's count of running CPU tasks back to 0 after each test.

    Tasks that a stream drops after one of them raised are never counted as done (MLX 0.32.4), and an evaluation that later
    waits for one of them waits for ever. Tests that provoke errors would stop others.
    """
    yield
    if sys.platform == "linux":
        mx.synchronize()
        library = next((Path(mx.__file__).parent / "lib").glob("libmlx.so"))
        scheduler = ctypes.CDLL(str(library))._ZN3mlx4core9scheduler9schedulerEv
        scheduler.restype = ctypes.c_void_p
        ctypes.c_int.from_address(scheduler()).value = 0  # n_active_tasks_, its first member
