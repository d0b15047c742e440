"""The forward pass of tasks other than causal: classes and values of whole samples, and answers that a decoder writes.

Both run padded. The loss of a sample with a label is one number: cross entropy of its class, or the squared error of its value; a step
averages it over rows. An answer's loss is that of its tokens, as in a causal model; its head runs on them alone, a chunk at a time, where
that is proved equal to the model's own logits.

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
from graft.ops.cross_entropy import LogitTransform, cross_entropy
from graft.routing.context import ForwardContext
from graft.training.forward.causal import Forward, HeadMode


class LabelForward(Forward):
    """Runs batches of samples with a class or value through a model with a head for them."""

    runs_flat = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.root: Any = unwrapped(model)
        self.head_mode: HeadMode = "whole"
        self.logit_transform = LogitTransform()

    def logits(self, batch: Batch, context: ForwardContext) -> Tensor:
        """[B, C] for classes, [B, 1] for values."""
        with running(self.model, context):
            return self.model(**inputs_of(self.root, batch)).logits

    def losses(self, batch: Batch, context: ForwardContext) -> Tensor:
        return self.losses_of(self.logits(batch, context), batch)

    def losses_of(self, logits: Tensor, batch: Batch) -> Tensor:
        """The same of logits that are there already."""
        if not batch.target_ids.is_floating_point():
            return cross_entropy(logits, batch.target_ids)
        exact = torch.promote_types(logits.dtype, torch.float32)
        return (logits[:, 0].to(exact) - batch.target_ids.to(exact)).square()

    def prove_head(self, batch: Batch, context: ForwardContext) -> HeadMode:
        """The model's own forward makes the logits: a row has few."""
        return self.head_mode


class AnswerForward(Forward):
    """Runs questions through an encoder and answers through its decoder."""

    runs_flat = False

    def _hidden(self, batch: Batch) -> Tensor:
        """[B, M, D] of the decoder."""
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
    """The forward pass that a model's head and make ask for."""
    root: Any = unwrapped(model)
    if "ForSequenceClassification" in type(root).__name__:
        return LabelForward(model)
    encodes = getattr(getattr(root, "config", None), "is_encoder_decoder", False)
    return AnswerForward(model) if encodes else Forward(model)
