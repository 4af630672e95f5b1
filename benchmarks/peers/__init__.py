"""The step of the field's libraries, measured beside ours: ``python -m benchmarks.peers.run``."""
