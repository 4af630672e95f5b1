"""What can go wrong with a kernel. Every message of a KernelError names the kernel and `file.metal:line`."""

from __future__ import annotations


class MSLError(Exception):
    """Base of all errors of this package."""


class FrontEndError(MSLError):
    """The source is not MSL that this tool understands."""


class CompileError(MSLError):
    """The compiler refused the kernel; the text is the compiler's."""


class ToolMissing(MSLError):
    """A compiler that an operation needs is not on this machine."""


class LaunchError(MSLError):
    """The bindings, sizes or constants of a launch do not fit the kernel's signature."""


class KernelError(MSLError):
    """A kernel did what a GPU does not define. `places` are its (file, line) pairs, the offending one first."""

    def __init__(self, message: str, places: tuple[tuple[str, int], ...] = ()) -> None:
        super().__init__(message)
        self.places = places

    @property
    def file(self) -> str | None:
        return self.places[0][0] if self.places else None

    @property
    def line(self) -> int | None:
        return self.places[0][1] if self.places else None


class OutOfBounds(KernelError):
    """Access outside of every bound buffer and threadgroup variable, or through a buffer that is not bound."""


class DataRace(KernelError):
    """Two accesses of which one writes, not both atomic, and no barrier orders them."""


class Uninitialised(KernelError):
    """Read of threadgroup memory, or of an output declared undefined, that nobody has written."""


class Divergence(KernelError):
    """Threads wait at different barriers or simd operations, or for a thread that has exited."""


class ReadOnlyWrite(KernelError):
    """Write to a `const device` or `constant` buffer or to program memory."""


class Misaligned(KernelError):
    """Access whose address is no multiple of what its type needs."""


class ThreadgroupMemory(KernelError):
    """More than 32 KiB of threadgroup memory."""


class Misuse(KernelError):
    """A simd operation reads an inactive lane, or a simdgroup matrix lacks lanes."""


class Hang(KernelError):
    """The launch ran into its time limit."""


BY_KIND: dict[str, type[KernelError]] = {
    "out_of_bounds": OutOfBounds,
    "data_race": DataRace,
    "uninitialised": Uninitialised,
    "divergence": Divergence,
    "read_only": ReadOnlyWrite,
    "misaligned": Misaligned,
    "threadgroup_memory": ThreadgroupMemory,
    "misuse": Misuse,
    "hang": Hang,
}
