"""What a compiled graph cannot do as eager code does it: it knows neither segments nor seeds of dropout nor recomputation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graft.config.schema import RunConfig

COMPILED_TASKS = ("causal", "preference")


def why_not_compiled(config: RunConfig) -> str | None:
    """What of a run's settings `train.compile` does not go with, and what to do; None where nothing stands against it."""
    from graft.adapters import Preset

    if config.data.task not in COMPILED_TASKS:
        return f"data.task {config.data.task}: it is for {' and '.join(COMPILED_TASKS)}"
    if config.train.layout == "flat":
        return "train.layout flat: a graph cannot keep segments apart. Use layout: auto or padded"
    if config.train.gradient_checkpointing:
        return "train.gradient_checkpointing: choose one of them"
    if config.train.kernels == "liger":
        return "train.kernels liger: a graph fuses these operations itself. Use kernels: auto or off"
    if config.base.dropout:
        return "base.dropout: a graph draws other numbers than eager code"
    adapter = config.adapter.resolve(frozenset()) if isinstance(config.adapter, Preset) else config.adapter
    rate = max(getattr(part, "dropout", 0.0) for part in adapter.parts())
    if rate > 0.0:
        return f"an adapter's dropout of {rate}, whose masks come from seeds that a graph does not know: set dropout: 0"
    return None
