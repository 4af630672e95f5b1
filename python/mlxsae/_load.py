"""Loads MLX and the compiled module, and turns whatever can go wrong into a sentence that says what to install."""

from __future__ import annotations

import importlib.metadata
import os
import sys

MLX_VERSION = "0.32.4"
_EXTRAS = 'pip install "mlxsae[cpu]" (or "mlxsae[cuda13]" on a machine with an NVIDIA GPU; never both)'


def _mlx_advice() -> str:
    return (
        f"Install it: pip install mlx=={MLX_VERSION}"
        if sys.platform == "darwin"
        else f"Install one: {_EXTRAS}"
    )


def _import_mlx() -> None:
    try:
        import mlx.core  # noqa: F401  registers mlx.core.array, and loads the libmlx that _ext links to
    except ImportError as e:
        if sys.platform == "linux":
            have = {
                d.metadata["Name"].lower() for d in importlib.metadata.distributions() if d.metadata["Name"]
            }
            if not have & {"mlx-cpu", "mlx-cuda-12", "mlx-cuda-13"}:
                raise ImportError(f"On Linux, MLX has no backend of its own. {_EXTRAS}.") from e
        raise ImportError(
            f"mlxsae needs mlx {MLX_VERSION}, which does not import: {e}. {_mlx_advice()}."
        ) from e


def _installed() -> str:
    import mlx.core as mx

    return vars(mx)["__version__"]  # which its stubs do not know


def _check_version() -> None:
    """MLX has no stable C++ ABI: a patch release may change a signature that _ext links to."""
    if _installed() != MLX_VERSION:
        raise ImportError(
            f"This mlxsae was built against mlx {MLX_VERSION}, but mlx {_installed()} is installed. {_mlx_advice()}."
        )


def _import_ext() -> None:
    import mlx.core as mx

    try:
        from . import _ext
    except ImportError as e:
        raise ImportError(
            f"mlxsae's compiled module does not load with the installed mlx {_installed()}: {e}. "
            "Reinstall both: pip install --force-reinstall mlxsae."
        ) from e
    if _ext.built_mlx_version != _installed():
        raise ImportError(
            f"mlxsae's compiled module was built against mlx {_ext.built_mlx_version}, but mlx {_installed()} is "
            "installed. Rebuild it: pip install --force-reinstall --no-deps mlxsae."
        )
    try:
        _ext.probe(mx.array(0.0))
    except TypeError as e:
        raise ImportError(
            "mlxsae's compiled module does not recognise mlx.core.array: it was built with a nanobind whose internals "
            "are not those of this mlx wheel. Rebuild it with nanobind 3.1.0: "
            "pip install --force-reinstall --no-deps --no-binary mlxsae mlxsae."
        ) from e


def _check_environment() -> None:
    """Here, as the compiled module is asked for its threads where it cannot raise."""
    wanted = os.environ.get("MLXSAE_NUM_THREADS")
    if wanted and not (wanted.isascii() and wanted.isdigit() and 1 <= int(wanted) < 2**31):
        raise ImportError(f"MLXSAE_NUM_THREADS must be a whole number of at least 1 but got {wanted}.")


def load() -> None:
    """Imports MLX and ``_ext``, checked."""
    _check_environment()
    _import_mlx()
    _check_version()
    _import_ext()
