"""Put the attention mask of a call into the forward context, for the kinds that must know where sequences begin and end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from graft.injection.arguments import cached_tokens, given_to
from graft.injection.state import State
from graft.injection.substitution import register_mixin


@register_mixin
class RecordsMask:
    """Mixin for the root: puts a mask [B, S] into the context, with 1 at real tokens, and the number of cached ones, which S includes.

    Without an attention mask all tokens are real: 4 new tokens after a cache of 5 give a mask of 9 ones.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: State = self.__dict__["graft_state"]
        if state.current.rows is None or state.current.flat or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # pyright: ignore
        given = given_to(self, args, kwargs)
        mask = given.get("attention_mask")
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        cached = cached_tokens(given)
        if tokens is not None:
            length = cached + tokens.shape[1]
            if mask is None:
                mask = torch.ones(tokens.shape[0], length, device=tokens.device)
            elif mask.dim() == 2:  # under a static cache it is as long as the cache, with zeros for tokens to come
                mask = mask[:, :length]
        with state.entered(replace(state.current, mask=mask, cached=cached, _groups={})):
            return super().forward(*args, **kwargs)  # pyright: ignore
