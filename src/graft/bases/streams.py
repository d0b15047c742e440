"""Reversible bases by their configuration: `base.reversible` and `base.anchor_every`."""

from __future__ import annotations

from typing import Any

from graft.config.base import BaseConfig
from graft.reversible.making import make_reversible


def with_coupling(model: Any, config: BaseConfig) -> Any:
    """Return the loaded model, made reversible in place if the configuration asks for it. Raises `GraftError` as `make_reversible` does."""
    if config.reversible is None:
        return model
    return make_reversible(model, config.reversible, anchor_every=config.anchor_every)
