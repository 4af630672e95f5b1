"""What takes part in a contest: one protocol, one registry. Each contestant lives in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from benchmarks.shapes import Shape, Weights


class Contestant(Protocol):
    """Made from a shape and a start; ``timed`` names what can be timed."""

    timed: dict[str, Callable[[Any], Any]]
    """Name -> function of a native batch. A step returns its loss; a matrix product returns nothing."""

    def batch(self, x: np.ndarray) -> Any:
        """The batch as the library takes it; not timed."""
        ...


class Peer(NamedTuple):
    title: str
    make: Callable[[Shape, Weights], Any]
    packages: tuple[str, ...]
    exact_by_design: bool
    """False where the selection is not on float32 products."""
    loss: str = "mse"
    note: str = ""
    env: Mapping[str, str] = MappingProxyType({})


def _mlx(kind: str, **options: Any) -> Callable[[Shape, Weights], Any]:
    def make(shape: Shape, start: Weights) -> Any:
        from benchmarks.peers import ours

        return getattr(ours, kind)(shape, start, **options)

    return make


def _torch(module: str, name: str, **options: Any) -> Callable[[Shape, Weights], Any]:
    def make(shape: Shape, start: Weights) -> Any:
        from importlib import import_module

        return getattr(import_module(f"benchmarks.peers.{module}"), name)(shape, start, **options)

    return make


_QUIET_MALLOC = {
    # Large temporaries come back from the heap instead of fresh pages each step, on 2 MiB pages: it is worth 10-20 %.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "THP_MEM_ALLOC_ENABLE": "1",
}

_OURS = ("mlxsae", "mlx", "scipy-openblas32")
CONTESTANTS: dict[str, Peer] = {
    "ours": Peer("mlxsae, composed of ops", _mlx("Ours"), _OURS, True),
    "trainer": Peer("mlxsae, its trainer's step", _mlx("Trainer"), _OURS, True),
    "large": Peer(
        "mlxsae, its trainer's step beside NumPy's product", _mlx("Large"), (*_OURS, "numpy"), True
    ),
    "ours-certified": Peer("mlxsae, composed of ops, certified", _mlx("Ours", certified=True), _OURS, True),
    "trainer-certified": Peer("mlxsae, certified", _mlx("Trainer", precision="certified"), _OURS, True),
    "trainer-batchtopk": Peer("mlxsae, BatchTopK", _mlx("batchtopk"), _OURS, True, loss="mse of BatchTopK"),
    "trainer-batchtopk-certified": Peer(
        "mlxsae, BatchTopK, certified",
        _mlx("batchtopk", precision="certified"),
        _OURS,
        True,
        loss="mse of BatchTopK",
    ),
    "trainer-avx2": Peer("mlxsae, AVX2 only", _mlx("Trainer"), _OURS, True, env={"MLXSAE_CPU_ISA": "avx2"}),
    "trainer-one-thread": Peer(
        "mlxsae, one thread", _mlx("Trainer"), _OURS, True, env={"MLXSAE_NUM_THREADS": "1"}
    ),
    "mlx-dense": Peer(
        "plain MLX ops, dense decode", _mlx("PlainDense"), ("mlx",), True, note="MLX over mlxsae's BLAS"
    ),
    "mlx-gather": Peer(
        "plain MLX ops, gathered decode", _mlx("PlainGather"), ("mlx",), True, note="MLX over mlxsae's BLAS"
    ),
    "best-torch": Peer(
        "hand-tuned PyTorch",
        _torch("best_torch", "BestTorch"),
        ("torch",),
        True,
        note="oneDNN float32 product, torch.topk over group maxima, embedding_bag for decode and weight gradients, fused Adam by "
        "chunks that fit the cache, huge pages and a heap that keeps its pages",
        env=_QUIET_MALLOC,
    ),
    "best-torch-whole": Peer(
        "hand-tuned PyTorch, whole arrays",
        _torch("best_torch", "BestTorch", whole=True),
        ("torch",),
        True,
        note="as hand-tuned PyTorch, without chunks for the cache and with torch.topk over all features",
        env=_QUIET_MALLOC,
    ),
    "sparsify": Peer(
        "sparsify",
        _torch("sparsify_step", "Sparsify"),
        ("eai-sparsify", "torch"),
        True,
        loss="fvu",
        note="eager decode, torch.optim.Adam",
        env={"SPARSIFY_DISABLE_TRITON": "1"},
    ),
    "saelens": Peer(
        "SAELens float32",
        _torch("saelens_step", "SAELens"),
        ("sae-lens", "torch"),
        True,
        note="rescale_acts_by_decoder_norm=False, which is its faster setting; clips gradients",
    ),
    "saelens-bf16": Peer(
        "SAELens bf16 autocast",
        _torch("saelens_step", "SAELens", autocast=True),
        ("sae-lens", "torch"),
        False,
        note="rescale_acts_by_decoder_norm=False, which is its faster setting; clips gradients",
    ),
    "dictionary_learning": Peer(
        "dictionary_learning TopK",
        _torch("dictionary_learning_step", "TopK"),
        ("dictionary-learning", "torch"),
        True,
        note="clips gradients",
    ),
    "dictionary_learning-batchtopk": Peer(
        "dictionary_learning BatchTopK",
        _torch("dictionary_learning_step", "BatchTopK"),
        ("dictionary-learning", "torch"),
        True,
        loss="mse of BatchTopK",
        note="clips gradients; another selection, so its loss is not compared",
    ),
    "torch": Peer("PyTorch's matmul", _torch("floors", "TorchProducts"), ("torch",), True),
    "numpy": Peer("NumPy's OpenBLAS", _torch("floors", "NumPyProduct"), ("numpy",), True),
    "probe": Peer("bandwidth probe", _torch("floors", "Probe"), (), True),
}
OURS = ("ours", "trainer")
LARGE = "large"
MODES = tuple(name for name in CONTESTANTS if name.startswith(tuple(f"{own}-" for own in OURS)))
"""Our own step in its other ways: precision, rule, instruction set, threads."""
FLOORS = ("torch", "numpy", "probe")
PEERS = tuple(name for name in CONTESTANTS if name not in (*OURS, *MODES, *FLOORS, LARGE))
