"""Virtual tokens as rows of the batch: a soft prompt runs through the blocks in the same pass as the rows that read it.

The prompts of the adapters in use come first, each a row of its own adapter: a segment of a padding-free batch, an entry of a padded one.
Blocks treat them as any row. In attention the rows part: prompts attend to themselves alone, and the other rows get the keys and values
that attention has just computed for the prompt of their adapter, like a prefix (`virtual.py`). So every pass calls every block once,
whatever the rows are: what shards or cuts the model sees one pass, and a block that runs again finds its keys and values in itself.

Example: rows a, b, a with 4, 2 and 3 tokens, and prompts of 3 tokens (a) and 2 (b).

    padding-free    a0 a1 a2 | b0 b1 | 4 tokens | 2 | 3        padded    a0 a1 a2 - / b0 b1 - - / 4 tokens / 2 - - / 3 -
    parts           segments 0 and 1, and the rest                       entries 0 and 1, and the rest

Legend: B rows, L length, T tokens of a padding-free batch, D features, K key-value heads, P virtual tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.hooks import EmbeddingAdapter
from graft.attention.install import ShiftsPositions
from graft.injection.arguments import cache_of
from graft.routing.context import ForwardContext, PromptCache

TAKEN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", "return_dict"}
"""Arguments of a pass with prompts as rows. With any other the prompts run before the batch."""


@dataclass(frozen=True)
class Led:
    """A batch with the rows of prompts before its own."""

    given: dict[str, Any]
    context: ForwardContext
    shape: tuple[int, int]
    """Rows and length of the whole."""
    own: tuple[slice, slice]
    """Where the batch's own rows lie in it."""

    @property
    def computed(self) -> PromptCache:
        """The keys and values of the prompts, kept where nothing trains."""
        assert self.context.parts is not None
        return self.context.parts[0].cache_to_fill or {}

    def cut(self, output: Any) -> Any:
        """Drop the rows of prompts from an output."""
        if isinstance(output, dict):
            return type(output)(**{key: self.cut(each) for key, each in output.items()})
        if isinstance(output, tuple | list):
            return type(output)(self.cut(each) for each in output)
        fits = isinstance(output, Tensor) and output.dim() >= 3 and tuple(output.shape[:2]) == self.shape
        return output[self.own] if fits else output


def led(
    owner: Any, prompts: Mapping[str, Sequence[EmbeddingAdapter]], context: ForwardContext, given: Mapping[str, Any]
) -> Led | None:
    """Put the prompts of adapters before a batch; None where they cannot be rows of it: with a cache, or with arguments of other kinds.

    owner: the module that owns the blocks. prompts: of each adapter in use, which has rows in the context.
    """
    given = {name: value for name, value in given.items() if value is not None}
    ids, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    tokens = given.get("inputs_embeds") if ids is None else ids
    plain = set(given) <= TAKEN and cache_of(given) is None and given.get("use_cache") is False
    if not plain or tokens is None or getattr(owner, "hidden_size_per_layer_input", 0):
        return None
    shifts = isinstance(owner, ShiftsPositions)
    if context.flat and shifts and positions is None or not context.flat and mask is not None and mask.dim() != 2:
        return None
    if context.mask is not None and mask is None:
        return None
    embedding: Any = next(iter(prompts.values()))[0].around.host
    embedded_BLD = tokens if ids is None else embedding(ids)
    own = [torch.cat([each.prompt().to(embedded_BLD) for each in prompts[name]]) for name in prompts]
    counts, (rows, length) = [len(each) for each in own], embedded_BLD.shape[:2]
    given.pop("input_ids", None)
    if context.flat:
        first, width = torch.cat(own)[None], sum(counts)
        given["inputs_embeds"] = torch.cat([first, embedded_BLD], 1)
        if shifts:
            before = torch.cat([torch.arange(-count, 0, device=tokens.device) for count in counts])[None]
            assert positions is not None
            given["position_ids"] = torch.cat([before, positions], 1)
        shape, place = (1, width + length), (slice(None), slice(width, None))
    else:
        width = max(length, *counts)
        wide = torch.stack([nn.functional.pad(each, (0, 0, 0, width - len(each))) for each in own])
        rest = nn.functional.pad(embedded_BLD, (0, 0, 0, width - length))
        given["inputs_embeds"] = torch.cat([wide, rest])
        if mask is not None:  # without one nothing hides what is padded here: it comes last, where nobody sees it
            real = torch.arange(width, device=tokens.device) < torch.tensor(counts, device=tokens.device)[:, None]
            given["attention_mask"] = _stacked(real, mask, width)
        if shifts:
            if positions is None:
                positions = owner._own_positions(embedded_BLD, {"attention_mask": mask})
            before = torch.arange(width, device=tokens.device) - torch.tensor(counts, device=tokens.device)[:, None]
            given["position_ids"] = _stacked(before, positions.expand(rows, length), width)
        shape, place = (len(own) + rows, width), (slice(len(own), None), slice(length))
    return Led(given, _with_prompts(context, tuple(prompts), counts, rows, given), shape, place)


def _stacked(first: Tensor, rest_BL: Tensor, width: int) -> Tensor:
    return torch.cat([first.to(rest_BL.dtype), nn.functional.pad(rest_BL, (0, width - rest_BL.shape[1]))])


def _with_prompts(
    context: ForwardContext, names: tuple[str, ...], counts: Sequence[int], entries: int, given: Mapping[str, Any]
) -> ForwardContext:
    """The context of the whole, whose `parts` are those of the prompts and of the batch's own rows."""
    count = len(context.lengths or ()) if context.flat else entries
    rows = context.row_names(count)
    known = not isinstance(context.rows, tuple) or len(context.rows) == count  # not under beams
    lengths, seeds, passes = (
        each if known and each is not None and len(each) == count else None
        for each in (context.lengths, context.seeds, context.pass_seeds)
    )
    own_seeds = None if seeds is None else tuple(context.prompt_seed(name) or 0 for name in names)
    # What adapters add to the loss is a mean over the rows of the batch: virtual tokens have no share.
    shares = context.loss_shares if known else None
    times = Counter(rows)
    shares = shares or tuple(1 / times[name] for name in rows)
    head = ForwardContext(names, tuple(counts), context.flat, own_seeds, own_seeds, cache_to_fill={})
    whole = {*names, *rows}
    return replace(
        context,
        rows=next(iter(whole)) if len(whole) == 1 else (*names, *rows),
        lengths=None if lengths is None else (*counts, *lengths),
        seeds=None if seeds is None else (*(own_seeds or ()), *seeds),
        pass_seeds=None if passes is None else (*(own_seeds or ()), *passes),
        loss_shares=(*(0.0 for _ in names), *shares),
        mask=None if context.mask is None else given.get("attention_mask"),
        parts=(head, context),
        _groups={},
    )
