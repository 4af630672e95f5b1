"""Counted work of launches: what moved, in which pieces. Counts of several launches add up with `+`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, fields

LINE = 128
_TRAFFIC = (
    "read_bytes",
    "write_bytes",
    "read_transactions",
    "write_transactions",
    "scalar_accesses",
    "scalar_bytes",
    "group_lines",
    "read_lines",
    "written_lines",
    "atomics",
)
_COUNTS = (
    "threadgroup_read_bytes",
    "threadgroup_write_bytes",
    "threadgroup_cycles",
    "threadgroup_ideal_cycles",
    "threadgroup_atomics",
    "threadgroup_barriers",
    "simdgroup_barriers",
    "simd_operations",
    "matrix_multiplies",
    "threadgroups",
    "threads",
)


class _RawTraffic(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint64) for n in _TRAFFIC]


class RawCounts(ctypes.Structure):
    _fields_ = [("buffers", _RawTraffic * 31), *((n, ctypes.c_uint64) for n in _COUNTS)]


def _sum(a, b):
    return type(a)(*(getattr(a, f.name) + getattr(b, f.name) for f in fields(a)))


@dataclass(frozen=True)
class Traffic:
    """Traffic of one device buffer. Bytes and transactions are of simdgroup accesses, before any cache.

    A transaction is a 128-byte line that one access of a simdgroup touches. Accesses of all lanes to one address are scalar:
    their bytes are in `read_bytes` or `write_bytes` and in `scalar_bytes`, their lines in no transaction.
    `group_lines`: distinct lines of each threadgroup, summed; `read_lines`, `written_lines`: of the dispatch.
    """

    read_bytes: int = 0
    write_bytes: int = 0
    read_transactions: int = 0
    write_transactions: int = 0
    scalar_accesses: int = 0
    scalar_bytes: int = 0
    group_lines: int = 0
    read_lines: int = 0
    written_lines: int = 0
    atomics: int = 0

    __add__ = _sum

    @property
    def bytes(self) -> int:
        """Bytes that simdgroups asked for: what moves where no cache helps."""
        return self.read_bytes + self.write_bytes

    @property
    def transactions(self) -> int:
        return self.read_transactions + self.write_transactions

    @property
    def unique_bytes(self) -> int:
        """Bytes of the distinct lines read plus those written: what moves where a cache keeps everything."""
        return LINE * (self.read_lines + self.written_lines)

    @property
    def group_bytes(self) -> int:
        """Bytes of each threadgroup's distinct lines: what moves where a cache serves one threadgroup at a time."""
        return LINE * self.group_lines

    @property
    def efficiency(self) -> float:
        """Share of the transactions' bytes that was asked for, scalar accesses apart; 1 where there is none."""
        return (self.bytes - self.scalar_bytes) / (LINE * self.transactions) if self.transactions else 1.0


@dataclass(frozen=True)
class Counts:
    """Work of one or more launches. `buffers` maps parameter names to their traffic.

    `threadgroup_cycles`: turns that threadgroup accesses take on 32 banks of 4 bytes, one word a bank and turn, equal words
    served together; `threadgroup_ideal_cycles`: without conflicts. (Apple documents no banks; 32 of 4 bytes is the field's guess.)
    Barriers are counted once a threadgroup (or simdgroup), simd operations and 8x8 matrix products once a simdgroup.
    """

    buffers: dict[str, Traffic] = field(default_factory=dict)
    threadgroup_read_bytes: int = 0
    threadgroup_write_bytes: int = 0
    threadgroup_cycles: int = 0
    threadgroup_ideal_cycles: int = 0
    threadgroup_atomics: int = 0
    threadgroup_barriers: int = 0
    simdgroup_barriers: int = 0
    simd_operations: int = 0
    matrix_multiplies: int = 0
    threadgroups: int = 0
    threads: int = 0
    dispatches: int = 0

    @classmethod
    def of(cls, raw: RawCounts, names: dict[int, str]) -> Counts:
        buffers = {n: Traffic(*(getattr(raw.buffers[i], f) for f in _TRAFFIC)) for i, n in names.items()}
        return cls(buffers, *(getattr(raw, f) for f in _COUNTS), dispatches=1)

    def __add__(self, other: Counts) -> Counts:
        names = self.buffers | other.buffers
        buffers = {n: self.buffers.get(n, Traffic()) + other.buffers.get(n, Traffic()) for n in names}
        rest = (f.name for f in fields(self) if f.name != "buffers")
        return Counts(buffers, *(getattr(self, n) + getattr(other, n) for n in rest))

    @property
    def traffic(self) -> Traffic:
        """All buffers together."""
        total = Traffic()
        for t in self.buffers.values():
            total += t
        return total

    @property
    def bytes(self) -> int:
        return self.traffic.bytes

    @property
    def unique_bytes(self) -> int:
        return self.traffic.unique_bytes

    @property
    def group_bytes(self) -> int:
        return self.traffic.group_bytes

    @property
    def efficiency(self) -> float:
        """Coalescing efficiency over all device buffers."""
        return self.traffic.efficiency

    @property
    def atomics(self) -> int:
        """Atomic operations on device memory, counted once a thread."""
        return self.traffic.atomics

    @property
    def bank_conflicts(self) -> float:
        """Turns lost to bank conflicts over the turns without: 0 where there is none."""
        ideal = self.threadgroup_ideal_cycles
        return (self.threadgroup_cycles - ideal) / ideal if ideal else 0.0
