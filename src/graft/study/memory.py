"""How much memory a trial would take, before it is run: a trial that would not fit is told to the sampler, not tried.

    peak = the base + what the job holds + the activations of its fullest micro-batch (+ on a CPU, the process)

The base and the job are counted on a skeleton without weights. Activations are an upper estimate: per token and block, what the
backward pass of a block keeps. The joint run itself then goes by measured peaks (`graft.training.scheduling.memory`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from graft.attaching.attach import attach
from graft.attaching.parameters import parameters
from graft.bases.skeleton import load_skeleton
from graft.config import RunConfig
from graft.errors import GraftError
from graft.training.updates.optimizers import update_bytes, weight_bytes

VALUES_PER_TOKEN = 16
"""Hidden-sized activations that a block keeps per token for its backward pass, attention and MLP together."""


class MemoryPredictor:
    """Predicts the peak of trials of one study, in bytes. Skeletons are built once per base, adapters counted once each."""

    def __init__(self) -> None:
        self._process = process_bytes()
        self._own: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self._base: dict[str, tuple[int, int]] = {}

    def own_bytes(self, config: RunConfig) -> int:
        """Return what a trial's job holds: parameters, gradients, the state of its optimiser.

        Raises `GraftError` for an adapter that this base cannot have.
        """
        key = _key_of(config)
        if key not in self._own:
            model = load_skeleton(config.base, config.data.base_task)
            if config.adapter is None:
                held = list(model.parameters())
            else:
                attach(model, {"adapter": config.adapter})
                held = [parameter for _, parameter in parameters(model, "adapter")]
            self._counts[key] = sum(each.numel() for each in held)
            self._own[key] = weight_bytes(held, config.train) + update_bytes(held, config.train)
        return self._own[key]

    def trained(self, config: RunConfig) -> int | None:
        """Return how many values a trial trains; None where a skeleton cannot tell. A file may hold more: PiSSA saves its start too."""
        try:
            self.own_bytes(config)
        except (GraftError, NotImplementedError, RuntimeError):
            return None
        return self._counts[_key_of(config)]

    def base_bytes(self, config: RunConfig) -> int:
        """Return what the base and the activations of one micro-batch take."""
        weights, per_token = self._of_base(config)
        if _on_cpu(config):  # there a run's peak is that of its process
            weights += self._process
        tokens = min(config.train.token_budget, config.train.batch_size * config.data.max_length)
        return weights + per_token * tokens

    def peak(self, config: RunConfig) -> int:
        """Return the predicted peak of a trial that runs alone."""
        return self.base_bytes(config) + self.own_bytes(config)

    def _of_base(self, config: RunConfig) -> tuple[int, int]:
        key = json.dumps(config.model_dump(mode="json")["base"])
        if key not in self._base:
            model: Any = load_skeleton(config.base, config.data.base_task)
            text = model.config.get_text_config()
            size = 2 if config.base.dtype == "bfloat16" else 4
            kept = VALUES_PER_TOKEN * text.hidden_size + 2 * (
                getattr(text, "intermediate_size", None) or 4 * text.hidden_size
            )
            blocks = 1 if config.train.activations == "recompute" else text.num_hidden_layers
            self._base[key] = size * sum(p.numel() for p in model.parameters()), size * kept * blocks
        return self._base[key]


def _key_of(config: RunConfig) -> str:
    dump = config.model_dump(mode="json")
    return json.dumps([dump["base"], dump["adapter"], dump["train"]["method"], dump["train"]["optimizer"]])


def process_bytes() -> int:
    """Return what this process holds now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _on_cpu(config: RunConfig) -> bool:
    return config.base.device == "cpu" or (config.base.device == "auto" and not torch.cuda.is_available())


def obstacle(predictor: MemoryPredictor, config: RunConfig, limit: float | None) -> str | None:
    """Return why a trial cannot be tried, in a sentence: its adapter does not suit the base, or it would not fit. None if it can."""
    if limit is None:
        return None
    peak = predictor.peak(config)
    return (
        None
        if peak <= limit * 1e9
        else f"it would take about {peak / 1e9:.2f} GB, above the {limit:g} GB that the study may use"
    )


def check_adapters(predictor: MemoryPredictor, configs: list[RunConfig]) -> None:
    """Raise `GraftError` for adapters that the base cannot have, before anything trains."""
    mistakes = []
    for config in configs:
        try:
            predictor.own_bytes(config)
        except GraftError as error:
            mistakes.append(str(error))
        except (NotImplementedError, RuntimeError):  # a start that needs the base's weights, which a skeleton has not
            continue
    if mistakes:
        raise GraftError("\n".join(dict.fromkeys(mistakes)))
