"""The noise of a key, written a second time: by numpy's unsigned integers and Python's normal distribution."""

from __future__ import annotations

import functools
from statistics import NormalDist

import numpy as np


def drawn(key: int, index: int, count: int) -> np.ndarray:
    """The noise of a tensor with this number as it is added, [count] in float32."""
    start = mixed(key, index)
    other = mixed(start, 0x4E4F4953)
    with np.errstate(over="ignore"):
        z = np.arange(-(-count // 4), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9) ^ np.uint64(other)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    quarters = z.astype("<u8").view("<u2")[:count]
    return _quantiles()[quarters ^ np.uint16(0x8000)]  # the lowest number belongs to the lowest signed one


def mixed(a: int, b: int) -> int:
    """The 63-bit hash of two whole numbers by splitmix64."""
    whole = (1 << 64) - 1
    z = a * 0x9E3779B97F4A7C15 + b * 0xBF58476D1CE4E5B9 + 1 & whole
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & whole
    z = (z ^ z >> 27) * 0x94D049BB133111EB & whole
    return (z ^ z >> 31) & whole >> 1


@functools.cache
def _quantiles() -> np.ndarray:
    normal = NormalDist()
    values = np.array([normal.inv_cdf((at + 0.5) / 65536) for at in range(65536)])
    return (values / np.sqrt(np.mean(values**2))).astype(np.float32)
