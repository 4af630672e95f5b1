"""Mutation tests: a kernel without one of its barriers must fail its checks, or nothing proves that the barrier is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .errors import MSLError
from .frontend import Program, rewrite
from .library import Library, compile_program, expand
from .tokens import Tokens, spell

BARRIERS = ("threadgroup_barrier", "simdgroup_barrier")


@dataclass(frozen=True)
class Mutant:
    """A source without one barrier: the `text` that stood at `file`:`line`."""

    file: str
    line: int
    text: str
    program: Program

    def load(
        self, mode: str = "checked", kernels: Sequence[str] | None = None, compiler: str | None = None
    ) -> Library:
        return compile_program(self.program, mode=mode, compiler=compiler, kernels=kernels)

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line} without {self.text}"


def mutants(
    path_or_text: str | os.PathLike,
    *,
    include: Sequence[str | os.PathLike] = (),
    defines: Mapping[str, object] | None = None,
    compiler: str | None = None,
) -> Iterator[Mutant]:
    """The source once for each barrier in it or in its headers, with that barrier taken out."""
    text = expand(path_or_text, include=include, defines=defines, compiler=compiler)
    original = Tokens(text)
    for i, t in enumerate(original.list):
        if t.text not in BARRIERS or original.text(i + 1) != "(":
            continue
        end = original.match[i + 1] + 1
        mutated = Tokens(text)
        mutated.blank(i, end)
        yield Mutant(t.file, t.line, spell(original.list[i:end]), rewrite(mutated))


def survivors(
    path_or_text: str | os.PathLike,
    check: Callable[[Library], object],
    *,
    kernels: Sequence[str] | None = None,
    **options,
) -> list[Mutant]:
    """The mutants, loaded in checked mode, that `check` accepts: it must raise a KernelError or an AssertionError.

    `check` launches kernels and compares results; `kernels` limits what is compiled; `options` are those of `mutants`.
    Raises ValueError where the source has no barrier.
    """
    alive, count = [], 0
    for mutant in mutants(path_or_text, **options):
        count += 1
        try:
            check(mutant.load(kernels=kernels, compiler=options.get("compiler")))
        except (MSLError, AssertionError):
            continue
        alive.append(mutant)
    if not count:
        raise ValueError("[survivors] the source must have a barrier but has none.")
    return alive
