"""A base without its weights, on torch's meta device: its shapes are known before memory is spent."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from graft.bases.loading import CLASSES, explained, source_of
from graft.bases.streams import with_coupling
from graft.config.base import BaseConfig


def load_skeleton(config: BaseConfig, task: str = "causal") -> Any:
    """Build the model without its weights: only its config is read. Raises `GraftError` for a config that cannot be read."""
    source, options = source_of(config)
    with explained(config, source), torch.device("meta"):
        model = CLASSES[task].from_config(AutoConfig.from_pretrained(source, **options)).requires_grad_(False).eval()
        return with_coupling(model, config)
