"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
