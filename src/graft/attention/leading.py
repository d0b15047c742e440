"""Virtual tokens before the sequence of a causal model that keeps a state from token to token (Mamba, RWKV, hybrids).

There the prompt changes the state that the sequence starts from, so it is put before each row for real, and the outputs are cut to the
caller's own tokens. Every row gets P slots in front, where P is the number of virtual tokens of the row with the most. Slots that a row
does not need come first and are masked; then come the row's padding on the left, its virtual tokens and its own tokens. With P = 2:

    rows                 french, with 2 virtual tokens     german, with 1           bare base, padded on the left
    tokens               t0 t1 t2                          t0 t1 t2                 .  t0 t1
    the blocks get       p0 p1 t0 t1 t2                    .  q0 t0 t1 t2           .  .  .  t0 t1
    mask                 1  1  1  1  1                     0  1  1  1  1            0  0  0  1  1

The cache then holds the slots too: later passes get a longer mask and later positions, and no prompt. Models that do not mask padding are
right only without masked slots, so there rows with other numbers of virtual tokens are refused.

Legend: B rows, L tokens per row of the caller, P slots, D features.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.walk import own_class
from graft.attention.prepending import chosen_prompts, longer
from graft.errors import GraftError
from graft.injection.arguments import CACHE_NAMES, cache_name, cache_of, cached_tokens, given_to
from graft.injection.substitution import register_mixin

SLOTS = "graft_slots"
"""The attribute of a cache that says how many slots it holds before the first token of each row."""


@register_mixin
class LeadsWithPrompts:
    """Mixin for the module that owns the blocks."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = given_to(self, args, kwargs)
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        found = None if tokens is None else self._prompts(len(tokens))
        if tokens is None or found is None:
            return super().forward(*args, **kwargs)  # pyright: ignore
        prompts_BPD, counts_B = found
        cache = cache_of(given)
        slots = getattr(cache, SLOTS, None)
        if slots is not None or given.get("state") is not None:  # RWKV's cache is a list of tensors
            return super().forward(**self._later(given, counts_B, slots or 0, tokens.shape[1]))  # pyright: ignore
        if cache is not None and getattr(cache, "is_compileable", False):
            raise GraftError(
                f"virtual tokens before the input of {type(self).__name__} need a dynamic cache: use --cache dynamic"
            )
        first, mask_BS = self._first(given, prompts_BPD, counts_B, tokens)
        state = self.__dict__["graft_state"]
        with state.carrying(longer(state.current, counts_B, None if state.current.mask is None else mask_BS)):
            output = super().forward(**first)  # pyright: ignore
        slots = prompts_BPD.shape[1]
        made = (
            cache
            if cache is not None
            else next((each for name in CACHE_NAMES if (each := getattr(output, name, None)) is not None), None)
        )
        if made is not None and not isinstance(made, list | tuple):
            setattr(made, SLOTS, slots)
        return _cut(output, slots, tokens.shape[1])

    def _prompts(self: Any, num_rows: int) -> tuple[Tensor, Tensor] | None:
        """Return the virtual tokens of each row [B, P, D], at the end of its slots, and their numbers [B]; None if no row has any."""
        state, compiling = self.__dict__["graft_state"], torch.compiler.is_compiling()
        chosen = chosen_prompts(self._modules["graft"], state, num_rows, pad_first=True)
        if chosen is None:
            return None
        if not compiling and state.current.flat:
            raise GraftError(
                "virtual tokens before the input of a model that keeps a state do not run in padding-free batches"
            )
        if not compiling and not self.__dict__["graft_masks"] and len(set(chosen.counts_B.tolist())) > 1:
            raise GraftError(
                f"{type(self).__name__} does not mask padding, so rows with other numbers of virtual tokens cannot share a batch: run "
                "each adapter in batches of its own (a token budget of 1 takes one row at a time)"
            )
        return chosen.prompts_BPD, chosen.counts_B

    def _first(
        self: Any, given: dict[str, Any], prompts_BPD: Tensor, counts_B: Tensor, tokens: Tensor
    ) -> tuple[dict[str, Any], Tensor]:
        """Return the arguments with the prompts in front, and the mask [B, P + L]."""
        length, slots, given = tokens.shape[1], prompts_BPD.shape[1], dict(given)
        mask, device = given.get("attention_mask"), tokens.device
        if mask is not None and mask.dim() != 2:
            raise GraftError(
                f"virtual tokens before the input need an attention mask of shape (rows, length), not {tuple(mask.shape)}"
            )
        own_BL = (
            torch.ones(tokens.shape[:2], dtype=torch.long, device=device) if mask is None else mask[:, :length].long()
        )
        start_B1 = (own_BL.cumsum(1) == 0).sum(1, keepdim=True) + slots  # the slot of a row's first token
        slot = torch.arange(slots + length, device=device)[None]
        virtual_BS = (slot >= start_B1 - counts_B[:, None]) & (slot < start_B1)
        real_BS = torch.cat([own_BL.new_zeros(len(own_BL), slots), own_BL], 1)
        mask_BS = real_BS.masked_fill(virtual_BS, 1)
        embedded = given.get("inputs_embeds")
        if embedded is None:
            embedded = self.get_input_embeddings()(given.pop("input_ids"))
        padded_BSD = nn.functional.pad(embedded, (0, 0, slots, 0))
        # The virtual token of a slot: the last of a row's P is in the slot before its first token.
        place_BS = (slot - start_B1 + slots).clamp(0, slots - 1)[..., None].expand(-1, -1, embedded.shape[-1])
        virtual_BSD = prompts_BPD.to(embedded).gather(1, place_BS)
        given["inputs_embeds"] = torch.where(virtual_BS[..., None], virtual_BSD, padded_BSD)
        takes = inspect.signature(own_class(self).forward).parameters
        if "attention_mask" in takes and (mask is not None or bool((counts_B != slots).any())):
            given["attention_mask"] = mask_BS
        if "position_ids" in takes and (given.get("position_ids") is not None or bool((counts_B != slots).any())):
            positions = given.get("position_ids")
            own = torch.arange(length, device=device)[None] if positions is None else positions
            before = nn.functional.pad(own + counts_B[:, None], (slots, 0))
            given["position_ids"] = torch.where(virtual_BS, slot - start_B1 + counts_B[:, None], before)
        return given, mask_BS

    def _later(self: Any, given: dict[str, Any], counts_B: Tensor, slots: int, length: int) -> dict[str, Any]:
        """Return the arguments of a pass with a cache: its mask covers the slots, and its positions come after the virtual tokens."""
        mask, given = given.get("attention_mask"), dict(given)
        uneven = bool((counts_B != slots).any()) and slots > 0
        if mask is not None and mask.dim() == 2 and slots:
            own_BL = mask.long()
            start_B1 = (own_BL.cumsum(1) == 0).sum(1, keepdim=True) + slots
            slot = torch.arange(slots + own_BL.shape[1], device=mask.device)[None]
            virtual_BS = (slot >= start_B1 - counts_B[:, None]) & (slot < start_B1)
            given["attention_mask"] = torch.cat([own_BL.new_zeros(len(own_BL), slots), own_BL], 1).masked_fill(
                virtual_BS, 1
            )
        elif mask is None and uneven:
            raise GraftError(
                "rows with other numbers of virtual tokens need an attention mask in every pass with a cache"
            )
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + counts_B[:, None]
        elif uneven and "position_ids" in inspect.signature(own_class(self).forward).parameters:
            seen = cached_tokens(given) - slots
            given["position_ids"] = torch.arange(seen, seen + length, device=counts_B.device)[None] + counts_B[:, None]
        return given


def _cut(output: Any, slots: int, length: int) -> Any:
    """Drop the slots of an output: [B, P + L, ...] -> [B, L, ...], and attention weights [B, H, P + L, P + L] -> [B, H, L, L]."""
    if isinstance(output, tuple | list):
        return type(output)(_cut(each, slots, length) for each in output)
    if isinstance(output, dict):
        return type(output)(
            **{
                key: each if key in (*CACHE_NAMES, "state") else _cut(each, slots, length)
                for key, each in output.items()
            }
        )
    if not isinstance(output, Tensor) or output.dim() < 3:
        return output
    if output.dim() == 4 and output.shape[2:] == (slots + length, slots + length):
        return output[:, :, slots:, slots:]
    return output[:, slots:] if output.shape[1] == slots + length else output


def masks_padding(root: Any, owner: nn.Module) -> bool:
    """Whether a row's output is the same behind masked padding on its left, with a cache too. A few tokens are tried."""
    weight = root.get_input_embeddings().weight
    if weight.device.type == "meta" or "attention_mask" not in inspect.signature(own_class(owner).forward).parameters:
        return weight.device.type == "meta"
    ids = torch.arange(1, 7, device=weight.device)[None] % len(weight)
    padded, mask = nn.functional.pad(ids, (2, 0)), nn.functional.pad(torch.ones_like(ids), (2, 0))
    with torch.no_grad():
        alone = owner(input_ids=ids, use_cache=False)[0]
        beside = owner(input_ids=padded, attention_mask=mask, use_cache=False)[0][:, 2:]
        cached = _stepwise(root, owner, padded, mask)
    found = [(beside, alone)] if cached is None else [(beside, alone), (cached, alone[:, -1:])]
    return all(bool((one - other).abs().max() <= 1e-2 * (other.abs().max() + 1e-6)) for one, other in found)


def _stepwise(root: Any, owner: nn.Module, ids: Tensor, mask: Tensor) -> Tensor | None:
    """Return the output at the last token, which runs with a cache of those before it; None if the model takes no cache like that."""
    name = cache_name(own_class(owner).forward)
    try:
        cache = cache_of(owner(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True))
        given = {} if name is None or cache is None else {name: cache}
        return owner(input_ids=ids[:, -1:], attention_mask=mask, use_cache=True, **given)[0] if given else None
    except Exception:  # a model that cannot do this alone cannot do it with a prompt either
        return None
