"""Virtual tokens before the sequence of an encoder, where every token sees every other, so the prompt is put before each row for real.

The module that owns the blocks gets [prompt; tokens; filler] in each row with a mask to match, and its outputs per token are cut so that
the caller sees its own tokens only. The output that an encoder hands to a decoder stays whole, and the decoder's mask for it is extended. A
pooler inside the owner reads the first position, which is the prompt's (as in PEFT). An example with three rows of 3 tokens:

    rows                 french, with 2 virtual tokens     german, with 1           bare base
    tokens and prompts   [t0 t1 t2  p0 p1]                 [t0 t1 t2  q0 -]         [t0 t1 t2  - -]
    order                3 4 0 1 2                         3 0 1 2 4                0 1 2 3 4
    the blocks get       p0 p1 t0 t1 t2                    q0 t0 t1 t2 -            t0 t1 t2 - -
    mask                 1 1 1 1 1                         1 1 1 1 0                1 1 1 0 0

Legend: B rows, L length, P virtual tokens of the row with the most, S = P + L, D features, N adapters.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graft.attention.virtual import compiled_choice
from graft.errors import GraftError
from graft.injection.arguments import given_to
from graft.injection.container import AdapterContainer
from graft.injection.state import State
from graft.injection.substitution import register_mixin
from graft.routing.context import ForwardContext

POSITIONS_OF_IDS = "create_position_ids_from_input_ids"
"""The method by which the embeddings of RoBERTa and its relatives compute positions."""


@dataclass(frozen=True)
class Placement:
    """Where each row's virtual tokens and own tokens go."""

    prompts: Tensor
    """[B, P, D] the virtual tokens, padded by zeros."""
    counts: Tensor
    """[B] how many virtual tokens the row has."""
    order: Tensor
    """[B, S] indices into [tokens; prompts]."""
    length: int
    """Tokens per row of the caller, L."""
    after_positions: bool = False
    """Whether the prompts are joined after the position embeddings have been added."""

    def joined(self, tokens: Tensor, prompts: Tensor) -> Tensor:
        """Join [B, L, ...] and [B or 1, P, ...] to [B, S, ...]."""
        both = torch.cat([tokens, prompts.to(tokens).expand(len(tokens), *prompts.shape[1:])], 1)
        order = self.order.view(*self.order.shape, *(1 for _ in both.shape[2:]))
        return both.gather(1, order.expand(-1, -1, *both.shape[2:]))

    def mask(self, mask: Tensor | None) -> Tensor:
        """Extend a mask [B, L], or None, to [B, S], with 1 at real tokens and at the row's virtual tokens."""
        if mask is None:
            mask = torch.ones(len(self.counts), self.length, dtype=torch.long, device=self.counts.device)
        if mask.dim() != 2:
            raise GraftError(
                f"virtual tokens before an encoder's input need an attention mask of shape (rows, length), not {tuple(mask.shape)}"
            )
        return self.joined(mask, torch.arange(self.prompts.shape[1], device=mask.device) < self.counts[:, None])

    def cut(self, output: Any) -> Any:
        """Keep the caller's tokens of an output: [B, S, ...] -> [B, L, ...], and attention weights [B, H, S, S] -> [B, H, L, L].

        Tensors of other shapes pass unchanged; tuples, lists and model outputs are cut item by item.
        """
        if isinstance(output, tuple | list):
            return type(output)(self.cut(each) for each in output)
        if isinstance(output, dict):
            return type(output)(**{key: self.cut(each) for key, each in output.items()})
        if not isinstance(output, Tensor) or output.dim() < 3:
            return output
        own_BL = self.counts[:, None] + torch.arange(self.length, device=output.device)
        size = self.order.shape[1]
        dims: tuple[int, ...] = ()
        if output.dim() == 4 and output.shape[2:] == (size, size):
            dims = (2, 3)
        elif output.shape[1] == size:
            dims = (1,)
        for dim in dims:
            shape = [1] * output.dim()
            shape[0], shape[dim] = own_BL.shape
            output = output.gather(dim, own_BL.view(shape).expand(*output.shape[:dim], -1, *output.shape[dim + 1 :]))
        return output


def placement_of(container: AdapterContainer, state: State, num_rows: int, length: int) -> Placement | None:
    """Return the placement of a batch under the current forward context, None if no row has virtual tokens.

    Raises `GraftError` if some prompts enter before the position embeddings and others after them.
    """
    chosen = chosen_prompts(container, state, num_rows)
    if chosen is None:
        return None
    behind = {each.after_positions for name in chosen.names for each in container.hooks.prompts[name]}
    if len(behind) > 1:
        raise GraftError(
            "prompts that enter at the embedding and prompts that enter at the blocks cannot share a batch"
        )
    most, counts_B = chosen.prompts_BPD.shape[1], chosen.counts_B
    # First the row's virtual tokens, then its own tokens, then whatever of the padded prompt is left over.
    place, first = torch.arange(most + length, device=counts_B.device)[None], counts_B[:, None]
    order = torch.where(place < first, place + length, torch.where(place < first + length, place - first, place))
    return Placement(chosen.prompts_BPD, counts_B, order, length, behind.pop())


class ChosenPrompts(NamedTuple):
    """The virtual tokens of each row of a batch."""

    names: list[str]
    """The adapters in use that have some."""
    prompts_BPD: Tensor
    counts_B: Tensor


def chosen_prompts(
    container: AdapterContainer, state: State, num_rows: int, pad_first: bool = False
) -> ChosenPrompts | None:
    """Return the virtual tokens of each row under the current forward context, None if no row has any.

    pad_first: whether what pads the prompt of a row to P comes before its virtual tokens, and not after them.
    """
    compiling = torch.compiler.is_compiling()
    context = ForwardContext() if compiling else state.current
    names = [name for name in container.hooks.prompts if compiling or name in context.names]
    if not names or state.merged is not None:
        return None
    if state.reached is not None:
        state.reached.add(id(container))
    # Stack the prompts of all adapters, and no tokens for the bare base at the end, padded to the longest.
    found = [torch.cat([each.prompt() for each in container.hooks.prompts[name]]) for name in names]
    most, device = max(len(each) for each in found), found[0].device
    sides = [(most - len(each), 0) if pad_first else (0, most - len(each)) for each in (*found, found[0][:0])]
    prompts_N = torch.stack(
        [nn.functional.pad(each, (0, 0, *side)) for each, side in zip((*found, found[0][:0]), sides, strict=True)]
    )
    counts_N = torch.tensor([*(len(each) for each in found), 0], device=device)
    if compiling:
        choice_B = compiled_choice(state, names, num_rows)
    else:
        rows = context.row_names(num_rows)
        choice_B = torch.tensor([names.index(name) if name in names else len(names) for name in rows], device=device)
    return ChosenPrompts(names, prompts_N[choice_B], counts_N[choice_B])


@register_mixin
class PrependsPrompts:
    """Mixin for the module that owns an encoder's blocks."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = given_to(self, args, kwargs)
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        container, state = self._modules["graft"], self.__dict__["graft_state"]
        placement = None if tokens is None else placement_of(container, state, *tokens.shape[:2])
        if placement is None:
            return super().forward(*args, **kwargs)  # pyright: ignore
        given["attention_mask"] = placement.mask(given.get("attention_mask"))
        with nullcontext() if torch.compiler.is_compiling() else state.carrying(_longer(state.current, placement)):
            output = (
                self._run_after_embeddings(given, placement)
                if placement.after_positions
                else self._run_embedded(given, placement)
            )
        return output if self.__dict__["graft_feeds_decoder"] else placement.cut(output)

    def _run_after_embeddings(self: Any, given: dict[str, Any], placement: Placement) -> Any:
        """Run with the prompts joined to the output of the embeddings."""
        handle = self.embeddings.register_forward_hook(
            lambda _module, _args, out: placement.joined(out, placement.prompts)
        )
        try:
            return super().forward(**given)  # pyright: ignore
        finally:
            handle.remove()

    def _run_embedded(self: Any, given: dict[str, Any], placement: Placement) -> Any:
        """Run with the prompts joined to the embedded tokens, so that they get positions like these."""
        embedded = given.get("inputs_embeds")
        prompt_positions = torch.arange(placement.prompts.shape[1], device=placement.order.device)[None]
        if embedded is None:
            ids = given.pop("input_ids")
            embedded = self.get_input_embeddings()(ids)
            if given.get("position_ids") is None and hasattr(getattr(self, "embeddings", None), POSITIONS_OF_IDS):
                # RoBERTa counts the ids that are not padding, from the padding id + 1 on. Embeddings do not show which these are.
                given["position_ids"] = getattr(self.embeddings, POSITIONS_OF_IDS)(ids, self.embeddings.padding_idx)
                prompt_positions = prompt_positions + self.embeddings.padding_idx + 1
        given["inputs_embeds"] = placement.joined(embedded, placement.prompts)
        if given.get("token_type_ids") is not None:
            given["token_type_ids"] = placement.joined(
                given["token_type_ids"], placement.order.new_zeros(1, placement.prompts.shape[1])
            )
        if given.get("position_ids") is not None:
            given["position_ids"] = placement.joined(
                given["position_ids"] + placement.counts[:, None], prompt_positions
            )
        return super().forward(**given)  # pyright: ignore


@register_mixin
class SeesLongerEncoder:
    """Mixin for the module that owns the blocks of a decoder that reads such an encoder's output."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = given_to(self, args, kwargs)
        encoded, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        container, state = self._modules["graft"], self.__dict__["graft_state"]
        if encoded is None:
            return super().forward(**given)  # pyright: ignore
        placement = placement_of(container, state, len(encoded), encoded.shape[1])
        if placement is not None:
            # The encoder's output has P + L positions, so the length before the prompt is P less.
            placement = placement_of(container, state, len(encoded), encoded.shape[1] - placement.prompts.shape[1])
            assert placement is not None
            if mask is not None and mask.shape[1] != placement.length:
                raise GraftError(
                    f"the encoder's output of {encoded.shape[1]} positions was computed without the virtual tokens of the adapters in use: "
                    "run the encoder with the same adapters"
                )
            given["encoder_attention_mask"] = placement.mask(mask)
        return super().forward(**given)  # pyright: ignore


def _longer(context: ForwardContext, placement: Placement) -> ForwardContext:
    return longer(context, placement.counts, None if context.mask is None else placement.mask(context.mask))


def longer(context: ForwardContext, counts: Tensor, mask: Tensor | None) -> ForwardContext:
    """Return the context as the blocks must see it: rows are longer by their virtual tokens. counts: [B] of them. mask: [B, S]."""
    lengths = context.lengths
    if lengths is not None:
        lengths = tuple(length + count for length, count in zip(lengths, counts.tolist(), strict=True))
    return replace(context, lengths=lengths, mask=mask, _groups={})
