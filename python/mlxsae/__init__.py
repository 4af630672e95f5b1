"""mlxsae: sparse autoencoders on Apple's MLX."""

from __future__ import annotations

from . import _load

_load.load()

from . import ops  # noqa: E402
from ._ext import version as __version__  # noqa: E402
from .code import SparseCode, SparseCodeCSR, to_dense  # noqa: E402
from .ops import backends  # noqa: E402

__all__ = ["SparseCode", "SparseCodeCSR", "__version__", "backends", "ops", "to_dense"]
