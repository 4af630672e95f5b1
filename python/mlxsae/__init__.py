"""mlxsae: sparse autoencoders on Apple's MLX.

On Linux this import also puts a real BLAS under MLX's own matrix products: see :mod:`mlxsae.blas`.
"""

from __future__ import annotations

import importlib as _importlib
from pathlib import Path as _Path
from typing import Any as _Any

from . import _load

_load.load()

from . import blas, ops  # noqa: E402
from ._ext import version as __version__  # noqa: E402
from .code import SparseCode, SparseCodeCSR, to_dense  # noqa: E402
from .ops import backends  # noqa: E402

blas.enable()

# Imported on first use: name -> the module that holds it. `lm` imports mlx-lm only when a model is loaded.
_LAZY = {
    **{room: f"mlxsae.{room}" for room in ("data", "io", "lm", "loss", "metrics", "sae", "train")},
    "InterpretableModel": "mlxsae.model",
    "load_saes": "mlxsae.io",
    "interventions": "mlxsae.lm",
    "SAE": "mlxsae.sae",
    "TopK": "mlxsae.sae",
    **dict.fromkeys(
        (
            "CrosscoderConfig",
            "Experiment",
            "Job",
            "ProfiSAETrainer",
            "SAEConfig",
            "SAETrainer",
            "TrainConfig",
            "TranscoderConfig",
            "diagnose",
            "fit",
            "fit_many",
        ),
        "mlxsae.train",
    ),
    "train_sae_from_activations": "mlxsae.train",
}


def __getattr__(name: str) -> _Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mlxsae' has no attribute {name!r}")
    module = _importlib.import_module(_LAZY[name])
    value = module if _LAZY[name] == f"mlxsae.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))


def cmake_dir() -> _Path:
    """The folder of the CMake package: ``cmake -Dmlxsae_DIR=$(python -c "import mlxsae; print(mlxsae.cmake_dir())")``."""
    from . import _ext

    return _Path(_ext.__file__).parent / "share" / "cmake" / "mlxsae"


__all__ = ["SparseCode", "SparseCodeCSR", "__version__", "backends", "blas", "cmake_dir", "ops", "to_dense"]
