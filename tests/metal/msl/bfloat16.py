"""bfloat16 for NumPy, which has none: arrays of uint16 that hold the upper half of a float32."""

from __future__ import annotations

import numpy as np


def pack(a: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(a), (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


def unpack(a: np.ndarray) -> np.ndarray:
    """bfloat16 bits to float32, exact."""
    return (np.ascontiguousarray(a, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
