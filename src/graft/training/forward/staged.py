"""The forward pass of one stage of a pipeline: its blocks and, on the last rank, the losses.

Legend: N targets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.data.batches import Batch
from graft.distributed.pipeline import Stage
from graft.routing.context import ForwardContext
from graft.training.forward.causal import Forward, HeadMode


class StagedForward(Forward):
    """Runs batches through this rank's stage; all ranks run the same ones in the same order.

    whole: the pass of the whole model, from before it was cut. It has proved the way to the logits.
    """

    def __init__(self, model: nn.Module, stage: Stage, whole: Forward) -> None:
        super().__init__(model)
        self.stage = stage
        self.head_mode, self.logit_transform, self.proved = whole.head_mode, whole.logit_transform, whole.proved
        self.adapted = whole.adapted

    @property
    def device(self) -> torch.device:
        """The device of the weights that this stage has."""
        return next(each.device for each in self.root.parameters() if not each.is_meta)

    def _losses(self, batch: Batch, context: ForwardContext) -> Tensor:
        """The loss of each target [N]; before the last stage zeros, from which backward runs all the same."""
        if self.stage.last:
            return super()._losses(batch, context)
        with self._running(batch, context):
            self._hidden(batch)
        return self.stage.losses(batch.num_targets)

    def prove_head(self, batch: Batch, context: ForwardContext) -> HeadMode:
        """Return the way to the logits that was proved on the whole model."""
        return self.head_mode
