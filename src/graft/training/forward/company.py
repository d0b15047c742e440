"""Cut a batch into the passes that a model needs: rows whose results would depend on one another do not share one.

Most models need one pass. With LongRoPE and dynamic NTK (`architectures/rope.py`), rows on both sides of the original length get one
each.

Legend: R rows, N targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graft.architectures.rope import forget_lengths
from graft.bases.context import classes_of
from graft.data.batches import Batch
from graft.routing.context import ForwardContext


def in_passes(
    run: Callable[[Batch, ForwardContext], Tensor],
    root: Any,
    batch: Batch,
    context: ForwardContext,
    by_row: bool = False,
) -> Tensor:
    """Run a batch in the passes that it needs, and return the results [N, ...] of its targets in the batch's order.

    run: returns the results of one pass. by_row: whether targets belong to rows (labels), not to tokens.
    """
    adapters = context.row_names(len(batch.lengths))
    classes = classes_of(root, batch.lengths, adapters) if batch.answer_ids is None else None
    if classes is None:
        return run(batch, context)
    numbers: list[Tensor] = []
    found: list[Tensor] = []
    for each in dict.fromkeys(classes):
        forget_lengths(root)
        rows = [row for row, own in enumerate(classes) if own == each]
        own_numbers, part, part_context = _only(batch, context, adapters, rows, by_row)
        numbers, found = [*numbers, own_numbers], [*found, run(part, part_context)]
    return torch.cat(found)[torch.cat(numbers).argsort()]


def _only(
    batch: Batch, context: ForwardContext, adapters: Sequence[str | None], rows: Sequence[int], by_row: bool
) -> tuple[Tensor, Batch, ForwardContext]:
    """Return some rows of a batch, with the numbers of their targets in it."""
    flat, device = batch.layout == "flat", batch.input_ids.device
    lengths = torch.tensor(batch.lengths, device=device)
    width = batch.input_ids.shape[1]
    starts_R = lengths.cumsum(0) - lengths if flat else torch.arange(len(lengths), device=device) * width
    row_N = batch.target_index if by_row else torch.searchsorted(starts_R, batch.target_index, right=True) - 1
    chosen = torch.tensor(rows, device=device)
    numbers = torch.isin(row_N, chosen).nonzero()[:, 0]
    if flat:
        tokens = torch.cat(
            [torch.arange(int(starts_R[row]), int(starts_R[row] + lengths[row]), device=device) for row in rows]
        )
        cut: Any = lambda each: None if each is None else each[:, tokens]  # noqa: E731
        own_R = lengths[chosen].cumsum(0) - lengths[chosen]
    else:
        longest = int(lengths[chosen].max())
        cut = lambda each: None if each is None else each[chosen, :longest]  # noqa: E731
        own_R = torch.arange(len(rows), device=device) * longest
    place_N = torch.searchsorted(chosen, row_N[numbers])  # the row's number among those chosen, which are in order
    index = place_N if by_row else batch.target_index[numbers] - starts_R[row_N[numbers]] + own_R[place_N]
    part = replace(
        batch,
        input_ids=cut(batch.input_ids),
        position_ids=cut(batch.position_ids),
        attention_mask=cut(batch.attention_mask),
        token_type_ids=cut(batch.token_type_ids),
        lengths=tuple(batch.lengths[row] for row in rows),
        target_index=index,
        target_ids=batch.target_ids[numbers],
        samples=tuple(batch.samples[row] for row in rows),
        twins=None if batch.twins is None else batch.twins.among(numbers, batch.num_targets),
    )
    names = tuple(adapters[row] for row in rows)
    return numbers, part, replace(
        context,
        rows=names[0] if len(set(names)) == 1 else names,
        lengths=None if context.lengths is None else tuple(context.lengths[row] for row in rows),
        seeds=None if context.seeds is None else tuple(context.seeds[row] for row in rows),
        loss_shares=None if context.loss_shares is None else tuple(context.loss_shares[row] for row in rows),
        pass_seeds=None if context.pass_seeds is None else tuple(context.pass_seeds[row] for row in rows),
        mask=None,
        _groups={},
    )  # fmt: skip
