"""Benchmarks: ops and steps against floors that the machine sets, and against the field (``benchmarks.peers``)."""
