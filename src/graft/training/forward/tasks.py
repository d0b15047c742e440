"""The forward pass of other tasks than causal: labels of whole samples (a class or a value), and answers that a decoder writes.

Both run padded. A sample with a label has one loss: the cross entropy of its class, or the squared error of its value; a step averages it
over rows. An answer has a loss per token, as in a causal model; the head runs on these tokens alone, a chunk at a time, where that is
proved equal to the model's own logits.

Legend: B rows, C classes, M longest answer, N targets, D hidden features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.attaching.active import running
from graft.bases.inputs import inputs_of
from graft.data.batches import Batch
from graft.injection.state import unwrapped
from graft.ops.cross_entropy import LogitTransform
from graft.routing.context import ForwardContext
from graft.training.forward.causal import Forward, HeadMode
from graft.training.forward.company import in_passes
from graft.training.forward.targets import target_losses

STAGED = "graft_stage"
"""Attribute of a model that is cut into stages: the forward pass of this rank's stage."""


class LabelForward(Forward):
    """Runs batches of samples with a label through a sequence classification model, which has a head for classes or a value."""

    runs_flat = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.root: Any = unwrapped(model)
        self.head_mode: HeadMode = "whole"
        self.logit_transform = LogitTransform()

    def logits(self, batch: Batch, context: ForwardContext) -> Tensor:
        """The model's logits: [B, C] for classes, [B, 1] for values."""
        return in_passes(self._logits, self.root, batch, context, by_row=True)

    def _logits(self, batch: Batch, context: ForwardContext) -> Tensor:
        with running(self.model, context):
            return self.model(**inputs_of(self.root, batch)).logits

    def losses(self, batch: Batch, context: ForwardContext) -> Tensor:
        return self.losses_of(self.logits(batch, context), batch)

    def losses_of(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of each sample [B], from its logits."""
        if not batch.target_ids.is_floating_point():
            return target_losses(logits, batch)
        exact = torch.promote_types(logits.dtype, torch.float32)
        return (logits[:, 0].to(exact) - batch.target_ids.to(exact)).square()

    def prove_head(self, batch: Batch, context: ForwardContext) -> HeadMode:
        """Return "whole": a sample has few logits, so the model's own forward makes them."""
        return self.head_mode


class AnswerForward(Forward):
    """Runs prompts through an encoder and answers through its decoder."""

    runs_flat = False

    def _hidden(self, batch: Batch) -> Tensor:
        """The decoder's hidden states [B, M, D]."""
        inputs = inputs_of(self.root, batch)
        encoded = self.root.get_encoder()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
        return self.root.get_decoder()(
            input_ids=inputs["decoder_input_ids"],
            attention_mask=inputs["decoder_attention_mask"],
            encoder_hidden_states=encoded,
            encoder_attention_mask=inputs["attention_mask"],
            use_cache=False,
        )[0]

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return inputs_of(self.root, batch)


def forward_of(model: nn.Module) -> Forward:
    """Make the forward pass for a model, by its class. Raises `GraftError` for a model without a head."""
    root: Any = unwrapped(model)
    if (staged := root.__dict__.get(STAGED)) is not None:
        return staged
    if "ForSequenceClassification" in type(root).__name__:
        return LabelForward(model)
    encodes = getattr(getattr(root, "config", None), "is_encoder_decoder", False)
    return AnswerForward(model) if encodes else Forward(model)
