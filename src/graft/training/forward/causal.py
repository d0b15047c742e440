"""One forward pass: a batch through the model to the loss of each supervised token.

The head runs on supervised tokens only. Where its result is proved equal to the model's own logits, the body's hidden states go through
the head a chunk at a time (`linear_cross_entropy`); else the model's own forward makes the logits, of the kept tokens where it takes
`logits_to_keep`, of all tokens where it does not. The model never sees labels.

Legend: B rows, L padded length, T tokens of a flat batch, N supervised tokens, D hidden features, V vocabulary.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graft.attaching.active import running
from graft.data.batches import Batch
from graft.errors import GraftError
from graft.injection.state import unwrapped
from graft.ops.cross_entropy import LogitTransform, cross_entropy, linear_cross_entropy
from graft.routing.context import ForwardContext

HeadMode = Literal["chunks", "kept", "whole"]
"""Head in chunks on hidden states; the model's own logits of kept tokens; the model's own logits of all tokens."""
BUILD_OWN_MASK = frozenset({"bloom", "falcon"})
"""Families that build ALiBi or their own causal mask from the mask argument, and so get none in a flat pass."""


class Forward:
    """Runs batches through a model. `prove_head` chooses how logits are made; until then the model's own forward makes them."""

    runs_flat: ClassVar[bool] = True
    """Whether token-flat batches may be tried."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.root: Any = unwrapped(model)
        self.body: Any = getattr(self.root, "base_model", self.root)
        self.head: Any = self.root.get_output_embeddings() if hasattr(self.root, "get_output_embeddings") else None
        if self.head is None:
            raise GraftError(f"{type(self.root).__name__} has no language-model head: load a causal language model")
        taken = inspect.signature(self.root.forward).parameters
        self.takes = {
            name for name in ("position_ids", "attention_mask", "use_cache", "logits_to_keep") if name in taken
        }
        self.head_mode: HeadMode = (
            "whole" if "graft" in self.head._modules else "kept"
        )  # an adapted head sees every row whole
        self.logit_transform = LogitTransform()

    @property
    def device(self) -> torch.device:
        """Where batches have to be."""
        return self.root.get_input_embeddings().weight.device

    def _running(self, batch: Batch, context: ForwardContext) -> AbstractContextManager[None]:
        """The pass with the mask in it, which the model's root notes for calls of its own, and the body is called without."""
        return running(self.model, replace(context, mask=batch.attention_mask))

    def losses(self, batch: Batch, context: ForwardContext) -> Tensor:
        """The loss of each supervised token [N] in the batch's order of targets, in float32 or wider."""
        with self._running(batch, context):
            if self.head_mode == "chunks":
                hidden = self._hidden(batch).flatten(0, 1).index_select(0, batch.target_index)
                return linear_cross_entropy(
                    hidden, self.head.weight, self.head.bias, batch.target_ids, self.logit_transform
                )
            return cross_entropy(self._own_logits(batch), batch.target_ids)

    def _hidden(self, batch: Batch) -> Tensor:
        """What the head reads: [B, L, D], or [1, T, D] flat."""
        return self.body(**self._inputs(batch))[0]

    def _own_logits(self, batch: Batch) -> Tensor:
        """[N, V] by the model's own forward."""
        inputs = self._inputs(batch)
        if "logits_to_keep" in self.takes and self.head_mode != "whole" and len(batch.input_ids) == 1:
            return self.model(**inputs, logits_to_keep=batch.target_index).logits[0]
        return self.model(**inputs).logits.flatten(0, 1).index_select(0, batch.target_index)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        if "position_ids" in self.takes:
            inputs["position_ids"] = batch.position_ids
        if "use_cache" in self.takes:
            inputs["use_cache"] = False
        if "attention_mask" in self.takes:
            inputs["attention_mask"] = batch.attention_mask if batch.layout == "padded" else self._flat_mask()
        return inputs

    def _flat_mask(self) -> Tensor | None:
        """A mask that says nothing, so that transformers builds none of its own (T x T): segments are kept apart by our attention."""
        if self.root.config.model_type in BUILD_OWN_MASK:
            return None
        return torch.zeros(1, 1, 1, 1, dtype=self.root.dtype, device=self.device)

    @torch.no_grad()
    def prove_head(self, batch: Batch, context: ForwardContext) -> HeadMode:
        """Compare head(body(x)) with the model's own logits, scaled and capped as the config says; choose chunks where they agree."""
        plain = type(self.head) is nn.Linear and "forward" not in self.head.__dict__
        if self.head_mode == "whole" or not plain or self.head.weight.requires_grad:
            return self.head_mode
        with self._running(batch, context):
            own = self._own_logits(batch).double()
            hidden = self._hidden(batch)
        if hidden.shape[-1] != self.head.weight.shape[1]:
            return self.head_mode
        logits = self.head(hidden.flatten(0, 1).index_select(0, batch.target_index))
        allowed = (1e-5 if logits.dtype in (torch.float32, torch.float64) else 2e-2) * (1.0 + float(own.abs().max()))
        for logit_transform in _tails(self.root.config):
            if float((logit_transform.apply_(logits.double()) - own).abs().max()) <= allowed:
                self.head_mode, self.logit_transform = "chunks", logit_transform
                break
        return self.head_mode


def _tails(config: Any) -> list[LogitTransform]:
    """What the config's fields may mean for the logits; the proof decides."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    tails = [LogitTransform()]
    if cap := getattr(text, "final_logit_softcapping", None):
        tails.append(LogitTransform(cap=float(cap)))
    if scale := getattr(text, "logit_scale", None):
        tails.append(LogitTransform(scale=float(scale)))
    if scale := getattr(text, "logits_scaling", None):
        tails.append(LogitTransform(scale=1.0 / float(scale)))
    if width := getattr(text, "d_model", None):  # T5 scales what its head reads, and the head has no bias
        tails.append(LogitTransform(scale=float(width) ** -0.5))
    return tails
