"""Runs Metal Shading Language on a CPU: the very `.metal` files, executed, checked and counted, without a GPU.

    lib = msl.load("kernel.metal", mode="checked")
    lib.launch("scale", {"x": x, "y": y, "n": np.uint32(x.size)}, grid=(x.size,), threadgroup=(256,))

See README.md beside this file.
"""

from __future__ import annotations

from . import bfloat16
from .counts import Counts
from .errors import (
    CompileError,
    DataRace,
    Divergence,
    FrontEndError,
    Hang,
    KernelError,
    LaunchError,
    Misaligned,
    Misuse,
    MSLError,
    OutOfBounds,
    ReadOnlyWrite,
    ThreadgroupMemory,
    ToolMissing,
    Uninitialised,
)
from .library import Argument, Library, Report, Signature, load
from .lint import Finding, lint
from .mutate import Mutant, mutants, survivors
from .strict import strict

__all__ = [
    "Argument",
    "CompileError",
    "Counts",
    "DataRace",
    "Divergence",
    "Finding",
    "FrontEndError",
    "Hang",
    "KernelError",
    "LaunchError",
    "Library",
    "MSLError",
    "Misaligned",
    "Misuse",
    "Mutant",
    "OutOfBounds",
    "ReadOnlyWrite",
    "Report",
    "Signature",
    "ThreadgroupMemory",
    "ToolMissing",
    "Uninitialised",
    "bfloat16",
    "lint",
    "load",
    "mutants",
    "strict",
    "survivors",
]
