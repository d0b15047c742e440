"""One forward pass of a causal model: from a batch to the loss of each supervised token.

The head runs on supervised tokens only, and the model never sees labels. There are three ways to the logits (`HeadMode`):

    chunks    the body's hidden states at supervised tokens go through the head a chunk at a time (`linear_cross_entropy`, and with adapters
              at the head `adapted_head.py`); used where a proof finds the result equal to the model's own logits
    kept      the model's own forward, for supervised tokens alone where it takes `logits_to_keep` and the batch is one row
    whole     the model's own forward on all tokens, from which the supervised ones are picked

For example, a batch has 2,000 tokens, 1,000 of them supervised, and the vocabulary has 128,256. In float32 the logits of a token take
0.5 MB: those of all tokens take 1 GB, those of the supervised tokens 513 MB. A chunk has at most 64 MiB, which is 130 tokens, so `chunks`
runs the head seven times on 130 tokens and once on 90, and never holds more than 64 MiB of float32 logits.

Legend: B rows, L padded length, T tokens of a flat batch, N supervised tokens, D hidden features, V vocabulary.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.architectures.positions import first_position
from graft.architectures.walk import plain_class
from graft.attaching.active import running
from graft.data.batches import Batch
from graft.distributed.sharded import whole
from graft.errors import GraftError
from graft.injection.state import unwrapped
from graft.ops.cross_entropy import LogitTransform
from graft.routing.context import ForwardContext
from graft.training.forward.adapted_head import AdaptedHead
from graft.training.forward.company import in_passes
from graft.training.forward.decision import Decision
from graft.training.forward.targets import target_losses

HeadMode = Literal["chunks", "kept", "whole"]
BUILD_OWN_MASK = frozenset({"bloom", "falcon"})
"""Families that compute ALiBi or a causal mask from the mask argument, and so get no mask in a flat pass."""


class Forward:
    """Runs batches through a causal model. `prove_head` chooses the head mode; before that, the model's own forward makes the logits.

    Raises `GraftError` for a model without a language-model head.
    """

    runs_flat: ClassVar[bool] = True
    """Whether the task allows token-flat batches. Whether the model does is proved."""
    proved: Decision | None = None
    """The layout of the run, where it was proved once and for all: this model runs no trial passes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.root: Any = unwrapped(model)
        self.body: Any = getattr(self.root, "base_model", self.root)
        self.head: Any = self.root.get_output_embeddings() if hasattr(self.root, "get_output_embeddings") else None
        if self.head is None:
            raise GraftError(f"{type(self.root).__name__} has no language-model head: load a causal language model")
        if isinstance(self.head, nn.ModuleList):
            raise GraftError(
                f"{type(self.root).__name__} has a list of {len(self.head)} heads, one for each stream of tokens, and none for text: "
                "Graft's training and evaluation need one. graft.attach adapts such a model for a loop of your own"
            )
        taken = inspect.signature(self.root.forward).parameters
        self.takes = {
            name for name in ("position_ids", "attention_mask", "use_cache", "logits_to_keep") if name in taken
        }
        self.first_position = first_position(self.root)
        self.head_mode: HeadMode = "kept"
        self.logit_transform = LogitTransform()
        self.adapted = AdaptedHead(model, self.head)

    @property
    def device(self) -> torch.device:
        """The device that batches have to be on."""
        return next(self.root.get_input_embeddings().parameters()).device

    def _running(self, batch: Batch, context: ForwardContext) -> AbstractContextManager[None]:
        """The context in effect for a call of the body or the model, with the batch's mask in it, which the body alone would not note."""
        return running(self.model, replace(context, mask=batch.attention_mask))

    def losses(self, batch: Batch, context: ForwardContext) -> Tensor:
        """The loss of each target, or its divergence in a second pass: [N] in the batch's order of targets, in float32 or wider."""
        return in_passes(self._losses, self.root, batch, context)

    def _losses(self, batch: Batch, context: ForwardContext) -> Tensor:
        """The loss of each target of a batch whose rows share one pass."""
        adapted = self.adapted.names(context)
        with self._running(batch, context):
            if self.head_mode == "chunks" and not self.adapted.whole(adapted, batch):
                hidden = self._hidden(batch).flatten(0, 1).index_select(0, batch.target_index)
                if not adapted:
                    with whole(self.head):  # backward does not read it: the gradient is made here
                        return target_losses(hidden, batch, self.head.weight, self.head.bias, self.logit_transform)
                found = self.adapted.losses(hidden, batch, context, adapted)
                if found is not None:
                    return found
            return target_losses(self._own_logits(batch, adapted=bool(adapted)), batch)

    def _hidden(self, batch: Batch) -> Tensor:
        """The hidden states that the head reads: [B, L, D], or [1, T, D] in a flat batch."""
        return self.body(**self._inputs(batch))[0]

    def _own_logits(self, batch: Batch, adapted: bool) -> Tensor:
        """The logits of supervised tokens [N, V] by the model's own forward. adapted: adapters at the head group tokens by row, so that
        they need whole rows."""
        inputs = self._inputs(batch)
        keeps = self.head_mode != "whole" and not adapted
        if "logits_to_keep" in self.takes and keeps and len(batch.input_ids) == 1:
            return self.model(**inputs, logits_to_keep=batch.target_index).logits[0]
        return self.model(**inputs).logits.flatten(0, 1).index_select(0, batch.target_index)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """The arguments of the model's forward, those that it takes."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        if "position_ids" in self.takes:
            inputs["position_ids"] = batch.position_ids + self.first_position
        if "use_cache" in self.takes:
            inputs["use_cache"] = False
        if "attention_mask" in self.takes:
            inputs["attention_mask"] = batch.attention_mask if batch.layout == "padded" else self._flat_mask()
        return inputs

    def _flat_mask(self) -> Tensor | None:
        """A mask of zeros, so that transformers does not build one of T x T; our attention keeps the segments apart."""
        if self.root.config.model_type in BUILD_OWN_MASK:
            return None
        return torch.zeros(1, 1, 1, 1, dtype=self.root.dtype, device=self.device)

    @torch.no_grad()
    def prove_head(self, batch: Batch, context: ForwardContext) -> HeadMode:
        """Choose chunks where head(body(x)), scaled and capped as the model's config may say, gives the model's own logits.

        A head that trains, or that is not a plain linear layer, keeps its mode.
        """
        plain = plain_class(self.head) is nn.Linear and "forward" not in self.head.__dict__
        if self.head_mode == "whole" or not plain or self.head.weight.requires_grad:
            return self.head_mode
        if self.adapted.names(context):
            context = replace(context, rows=None, _groups={})  # it is about the base
        with self._running(batch, context):
            own = self._own_logits(batch, adapted=False).double()
            hidden = self._hidden(batch)
        if hidden.shape[-1] != self.head.weight.shape[1]:
            return self.head_mode
        with whole(self.head):
            logits = F.linear(
                hidden.flatten(0, 1).index_select(0, batch.target_index), self.head.weight, self.head.bias
            )
        # Config fields mean different things in different families, so the numbers decide which transform holds, if any.
        allowed = (1e-5 if logits.dtype in (torch.float32, torch.float64) else 2e-2) * (1.0 + float(own.abs().max()))
        possible = _possible_transforms(self.root.config)
        apart = [float((each.apply_(logits.double()) - own).abs().max()) for each in possible]
        # The nearest: a cap hardly shows in small logits, and adapters may make larger ones.
        if min(apart) <= allowed:
            self.head_mode, self.logit_transform = "chunks", possible[apart.index(min(apart))]
            self.adapted = AdaptedHead(self.model, self.head, self.logit_transform)
        return self.head_mode


def _possible_transforms(config: Any) -> list[LogitTransform]:
    """The transforms of logits that the fields of a config may mean, plain ones first."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [LogitTransform()]
    if cap := getattr(text, "final_logit_softcapping", None):
        found.append(LogitTransform(cap=float(cap)))
    if scale := getattr(text, "logit_scale", None):
        found.append(LogitTransform(scale=float(scale)))
    if scale := getattr(text, "logits_scaling", None):
        found.append(LogitTransform(scale=1.0 / float(scale)))
    if width := getattr(
        text, "d_model", None
    ):  # T5 scales the hidden states; its head has no bias, so that is a scale of the logits
        found.append(LogitTransform(scale=float(width) ** -0.5))
    return found
