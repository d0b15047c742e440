"""Compute the loss of samples in padded batches in which each row has its own adapter.

The loss of a sample is summed, not averaged, over its supervised tokens, so that a caller can weigh tokens as training does.

Legend: N supervised tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from graft.architectures.positions import first_position
from graft.architectures.rope import forget_lengths
from graft.bases.context import classes_of
from graft.bases.inputs import inputs_of
from graft.data.batches import micro_batches, padded
from graft.data.samples import Example
from graft.distributed.group import ALONE, Group
from graft.generation.batching import routed
from graft.injection.modes import evaluation_mode
from graft.injection.state import unwrapped


def sample_losses(
    model: nn.Module,
    examples: Sequence[Example],
    adapters: Sequence[str | None],
    *,
    token_budget: int = 4096,
    group: Group = ALONE,
) -> list[float]:
    """Return the loss of examples[i] under adapters[i] (None: the bare base), in nats, summed over its supervised tokens.

    token_budget: most tokens of a batch, padding counted. group: the ranks that share the batches, with the same arguments on all.
    Every example must fit into the model's context.
    """
    root: Any = unwrapped(model)
    takes = inspect.signature(root.forward).parameters
    padding = getattr(root.config.get_text_config(), "pad_token_id", None) or 0
    losses = torch.zeros(len(examples), dtype=torch.float64)
    widths = np.array([example.widths for example in examples]).reshape(-1, 2)
    classes = classes_of(model, [len(example) for example in examples], adapters)
    with group.agreed():
        for rows in group.turns(micro_batches(widths, range(len(examples)), token_budget, "padded", classes)):
            forget_lengths(root)
            # Rows of one adapter next to each other are a slice of the batch and need not be gathered.
            rows.sort(key=lambda row: (adapters[row] is not None, adapters[row] or ""))
            batch = padded([examples[row] for row in rows], rows, padding).to(root.device)
            inputs = inputs_of(root, batch)
            if batch.answer_ids is None and "position_ids" in takes:
                inputs["position_ids"] = batch.position_ids + first_position(root)
            who = [adapters[row] for row in rows]
            # The mask of an encoder-decoder's batch is the encoder's and would not fit the decoder's tokens.
            mask = batch.attention_mask if batch.answer_ids is None else None
            with torch.no_grad(), evaluation_mode(model), routed(model, who, mask):
                out = model(**inputs)
            logits_NV = out.logits.flatten(0, 1).index_select(0, batch.target_index).float()
            losses_N = F.cross_entropy(logits_NV, batch.target_ids, reduction="none").double().cpu()
            counts = [examples[row].num_targets for row in rows]
            for row, part in zip(rows, losses_N.split(counts), strict=True):
                losses[row] = part.sum()
    return group.sum_(losses).tolist()
