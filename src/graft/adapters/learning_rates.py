"""A learning rate to start from, by kind: what `graft init` writes.

Kinds differ by a factor of a thousand. Factors that start at one, and vectors that stand before a sequence, hardly move at the rate that
suits a low-rank update; a copy of the base's own weights is spoilt by it. The values are those of the papers and of common practice,
for AdamW, and each was tried on the embedded base: tests/adapters/test_learning_rates.py asks that a kind learns at its own.
"""

from __future__ import annotations

from graft.adapters.base import AdapterConfig
from graft.adapters.nesting import every_config
from graft.adapters.presets import Preset

LEARNING_RATES = {
    "lora": 3e-4,
    "dora": 3e-4,
    "pissa": 1e-4,
    "vera": 1e-2,
    "adalora": 2e-3,
    "loha": 1e-3,
    "lokr": 1e-3,
    "miss": 3e-4,
    "hira": 1e-3,
    "shira": 1e-3,
    "oft": 1e-3,
    "series": 1e-3,
    "parallel": 1e-3,
    "compacter": 3e-3,
    "loretta-adp": 3e-3,
    "loretta-rep": 3e-3,
    "prefix": 1e-2,
    "llama-adapter": 1e-2,
    "prompt": 3e-2,
    "p-tuning": 1e-3,
    "reft": 1e-3,
    "ia3": 1e-2,
    "bitfit": 1e-3,
    "hadamard": 3e-3,
    "llama-adapter-v2": 1e-3,
    "invertible": 1e-3,
    "full": 3e-5,
    "head": 1e-3,
}
OTHERWISE = 3e-4
"""For kinds of other packages."""


def learning_rate(adapter: AdapterConfig | Preset) -> float:
    """Return the rate to start from; of a kind made of others, the smallest of theirs, which spoils none."""
    config = adapter.resolve(frozenset()) if isinstance(adapter, Preset) else adapter
    return min(LEARNING_RATES.get(part.kind, OTHERWISE) for part in every_config(config) if not part.inner())
