"""mlxsae: sparse autoencoders on Apple's MLX."""

from __future__ import annotations

from pathlib import Path as _Path

from . import _load

_load.load()

from . import ops  # noqa: E402
from ._ext import version as __version__  # noqa: E402
from .code import SparseCode, SparseCodeCSR, to_dense  # noqa: E402
from .ops import backends  # noqa: E402


def cmake_dir() -> _Path:
    """The folder of the CMake package: ``cmake -Dmlxsae_DIR=$(python -c "import mlxsae; print(mlxsae.cmake_dir())")``."""
    from . import _ext

    return _Path(_ext.__file__).parent / "share" / "cmake" / "mlxsae"


__all__ = ["SparseCode", "SparseCodeCSR", "__version__", "backends", "cmake_dir", "ops", "to_dense"]
