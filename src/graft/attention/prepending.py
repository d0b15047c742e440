"""Virtual tokens before the sequence of an encoder, where every token sees every other: they are put there for real, row by row.

The module that owns the blocks gets [prompt; tokens; filler] in each row with a mask to match, and its per-token outputs are cut so that
the caller sees its own tokens. What an encoder hands to a decoder stays whole, and the decoder's mask of it is extended. A pooler
inside the owner reads the first position, which is the prompt's (as in PEFT).

Legend: B rows, L length, P virtual tokens of the row that has most, S = P + L, D features, N adapters.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from graft.attention.virtual import compiled_choice
from graft.errors import GraftError
from graft.injection.arguments import given_to
from graft.injection.container import AdapterContainer
from graft.injection.state import State
from graft.injection.substitution import register_mixin
from graft.routing.context import ForwardContext

OF_IDS = "create_position_ids_from_input_ids"
"""Of the embeddings of RoBERTa and its kin."""


@dataclass(frozen=True)
class Layout:
    """Where each row's virtual tokens and own tokens lie. prompts [B, P, D], counts [B], order [B, S] into [tokens; prompts]."""

    prompts: Tensor
    counts: Tensor
    order: Tensor
    length: int
    behind_positions: bool = False
    """Whether the prompts join behind the position embeddings."""

    def joined(self, tokens: Tensor, prompts: Tensor) -> Tensor:
        """[B, L, ...] and [B, P, ...] as [B, S, ...]."""
        both = torch.cat([tokens, prompts.to(tokens).expand(len(tokens), *prompts.shape[1:])], 1)
        order = self.order.view(*self.order.shape, *(1 for _ in both.shape[2:]))
        return both.gather(1, order.expand(-1, -1, *both.shape[2:]))

    def mask(self, mask: Tensor | None) -> Tensor:
        """[B, L] or None as [B, S], 1 at real tokens."""
        if mask is None:
            mask = torch.ones(len(self.counts), self.length, dtype=torch.long, device=self.counts.device)
        if mask.dim() != 2:
            raise GraftError(
                f"virtual tokens before an encoder's input need a mask of shape (rows, length), not {tuple(mask.shape)}"
            )
        return self.joined(mask, torch.arange(self.prompts.shape[1], device=mask.device) < self.counts[:, None])

    def cut(self, output: Any) -> Any:
        """Per-token outputs with the caller's tokens only: [B, S, ...] -> [B, L, ...] and weights [B, H, S, S] -> [B, H, L, L]."""
        if isinstance(output, tuple | list):
            return type(output)(self.cut(each) for each in output)
        if isinstance(output, dict):
            return type(output)(**{key: self.cut(each) for key, each in output.items()})
        if not isinstance(output, Tensor) or output.dim() < 3:
            return output
        own_BL = self.counts[:, None] + torch.arange(self.length, device=output.device)
        size = self.order.shape[1]
        dims = (
            (2, 3)
            if output.dim() == 4 and output.shape[2:] == (size, size)
            else (1,)
            if output.shape[1] == size
            else ()
        )
        for dim in dims:
            shape = [1] * output.dim()
            shape[0], shape[dim] = own_BL.shape
            output = output.gather(dim, own_BL.view(shape).expand(*output.shape[:dim], -1, *output.shape[dim + 1 :]))
        return output


def layout_of(container: AdapterContainer, state: State, num_rows: int, length: int) -> Layout | None:
    """The layout of a batch under the pass in effect; None where no row has virtual tokens."""
    compiling = torch.compiler.is_compiling()
    context = ForwardContext() if compiling else state.current
    names = [name for name in container.hooks.prompts if compiling or name in context.names]
    if not names or state.merged is not None:
        return None
    if state.reached is not None:
        state.reached.add(id(container))
    if len(behind := {each.behind_positions for name in names for each in container.hooks.prompts[name]}) > 1:
        raise GraftError(
            "prompts that enter at the embedding and prompts that enter at the blocks cannot share a batch"
        )
    found = [torch.cat([each.prompt() for each in container.hooks.prompts[name]]) for name in names]
    most, device = max(len(each) for each in found), found[0].device
    prompts_N = torch.stack([nn.functional.pad(each, (0, 0, 0, most - len(each))) for each in (*found, found[0][:0])])
    counts_N = torch.tensor([*(len(each) for each in found), 0], device=device)
    if compiling:
        choice_B = compiled_choice(state, names, num_rows)
    else:
        rows = context.row_names(num_rows)
        choice_B = torch.tensor([names.index(name) if name in names else len(names) for name in rows], device=device)
    counts_B = counts_N[choice_B]
    place, first = torch.arange(most + length, device=device)[None], counts_B[:, None]
    order = torch.where(place < first, place + length, torch.where(place < first + length, place - first, place))
    return Layout(prompts_N[choice_B], counts_B, order, length, behind.pop())


@register_mixin
class PrependsPrompts:
    """Mixin for the module that owns an encoder's blocks."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = given_to(self, args, kwargs)
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        container, state = self._modules["graft"], self.__dict__["graft_state"]
        layout = None if tokens is None else layout_of(container, state, *tokens.shape[:2])
        if layout is None:
            return super().forward(*args, **kwargs)  # pyright: ignore
        given["attention_mask"] = layout.mask(given.get("attention_mask"))
        with nullcontext() if torch.compiler.is_compiling() else state.carrying(_longer(state.current, layout)):
            output = self._run_behind(given, layout) if layout.behind_positions else self._run_embedded(given, layout)
        return output if self.__dict__["graft_feeds_decoder"] else layout.cut(output)

    def _run_behind(self: Any, given: dict[str, Any], layout: Layout) -> Any:
        """The prompts join what the embeddings make of the tokens."""
        handle = self.embeddings.register_forward_hook(lambda _module, _args, out: layout.joined(out, layout.prompts))
        try:
            return super().forward(**given)  # pyright: ignore
        finally:
            handle.remove()

    def _run_embedded(self: Any, given: dict[str, Any], layout: Layout) -> Any:
        """The prompts join the embedded tokens, and get positions as these do."""
        embedded, places = (
            given.get("inputs_embeds"),
            torch.arange(layout.prompts.shape[1], device=layout.order.device)[None],
        )
        if embedded is None:
            ids = given.pop("input_ids")
            embedded = self.get_input_embeddings()(ids)
            if given.get("position_ids") is None and hasattr(getattr(self, "embeddings", None), OF_IDS):
                # RoBERTa counts the ids that are no padding, from behind the padding's own position
                given["position_ids"] = getattr(self.embeddings, OF_IDS)(ids, self.embeddings.padding_idx)
                places = places + self.embeddings.padding_idx + 1
        given["inputs_embeds"] = layout.joined(embedded, layout.prompts)
        if given.get("token_type_ids") is not None:
            given["token_type_ids"] = layout.joined(
                given["token_type_ids"], layout.order.new_zeros(1, layout.prompts.shape[1])
            )
        if given.get("position_ids") is not None:
            given["position_ids"] = layout.joined(given["position_ids"] + layout.counts[:, None], places)
        return super().forward(**given)  # pyright: ignore


@register_mixin
class SeesLongerEncoder:
    """Mixin for the module that owns the blocks of a decoder behind such an encoder."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = given_to(self, args, kwargs)
        encoded, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        container, state = self._modules["graft"], self.__dict__["graft_state"]
        if encoded is None:
            return super().forward(**given)  # pyright: ignore
        layout = layout_of(container, state, len(encoded), encoded.shape[1])
        if layout is not None:
            layout = layout_of(container, state, len(encoded), encoded.shape[1] - layout.prompts.shape[1])
            assert layout is not None
            if mask is not None and mask.shape[1] != layout.length:
                raise GraftError(
                    f"the encoder's output of {encoded.shape[1]} positions was made without the virtual tokens of the adapters in use: "
                    "let the model run its encoder under the same choice of adapters"
                )
            given["encoder_attention_mask"] = layout.mask(mask)
        return super().forward(**given)  # pyright: ignore


def _longer(context: ForwardContext, layout: Layout) -> ForwardContext:
    """The pass as the blocks see it: rows are longer by their virtual tokens."""
    lengths = context.lengths
    if lengths is not None:
        lengths = tuple(length + count for length, count in zip(lengths, layout.counts.tolist(), strict=True))
    mask = None if context.mask is None else layout.mask(context.mask)
    return replace(context, lengths=lengths, mask=mask, _groups={})
