"""Make the attention modules of a model call the attention function, and undo it.

A module that uses transformers' attention interface gets a view of its config. In GPT-J (up to transformers 5.23), BLOOM, Falcon and
DeBERTa it gets a forward of Graft's by class substitution. Any other module is refused, because nothing would call the function.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graft.architectures.positions import first_position
from graft.architectures.sites import SiteTable
from graft.architectures.source import forward_names
from graft.architectures.walk import own_class
from graft.attention.bloom import BloomForward
from graft.attention.deberta import DebertaForward, DebertaV2Forward
from graft.attention.falcon import FalconForward
from graft.attention.functions import BACKENDS, attention_view
from graft.attention.gptj import GPTJForward
from graft.attention.proof import prove_forwards
from graft.attention.relative import TABLE
from graft.attention.virtual import position_shifts
from graft.errors import GraftError
from graft.injection.arguments import cached_tokens, given_to
from graft.injection.config_view import ConfigView
from graft.injection.state import State, site_table_of, unwrapped
from graft.injection.substitution import register_mixin, restore, substitute

OWN_FORWARDS: dict[tuple[str, str], type] = {
    ("bloom", "BloomAttention"): BloomForward,
    ("gptj", "GPTJAttention"): GPTJForward,
    ("falcon", "FalconAttention"): FalconForward,
    ("deberta", "DisentangledSelfAttention"): DebertaForward,
    ("deberta_v2", "DisentangledSelfAttention"): DebertaV2Forward,
}
"""Graft's forwards, by the model file in transformers and the class of the attention module."""


@register_mixin
class ShiftsPositions:
    """Mixin for the module that owns the blocks: lets the sequence's positions start after an adapter's virtual tokens.

    E.g. with a prefix of 3 tokens and `positions: after_prefix`, the sequence is at positions 3, 4, 5, ... instead of 0, 1, 2, ...
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: State = self.__dict__["graft_state"]
        table: dict[str, int] = self.__dict__["graft_shifts"]
        given = given_to(self, args, kwargs)
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        assert tokens is not None
        shift = position_shifts(table, state, state.current, tokens.shape[0], tokens.device)
        if isinstance(shift, int) and shift == 0:
            return super().forward(*args, **kwargs)  # pyright: ignore
        positions = given.get("position_ids")
        if positions is None:
            positions = self._own_positions(tokens, given)
        return super().forward(**{**given, "position_ids": positions + shift})  # pyright: ignore

    def _own_positions(self: Any, tokens: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        """Return the positions that the model itself would use.

        They depend on the family: `mask` counts the tokens that the mask allows, `padding` (RoBERTa) counts those that are not padding from
        the padding id + 1 on, and all others count every token. A cache of 5 tokens makes the next one the sixth.
        """
        seen = cached_tokens(given)
        mask = given.get("attention_mask")
        if self.__dict__["graft_positions"] == "mask" and mask is not None and mask.dim() == 2:
            return ((mask.cumsum(1) - 1) * mask)[:, seen:].long()
        if self.__dict__["graft_positions"] == "padding":
            padding = self.config.pad_token_id
            real = tokens.ne(padding) if tokens.dim() == 2 else tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
            return (real.cumsum(1) + seen) * real + padding
        return torch.arange(seen, seen + tokens.shape[1], device=tokens.device)[None]


def install(module: nn.Module, state: State, path: str) -> None:
    """Make one attention module call the attention function. Raises `GraftError` if it has no way to, or an unknown backend."""
    if "graft_attention" in module.__dict__:
        return
    name, config = type(module).__name__, getattr(module, "config", None)
    own = _own_forward(module)
    if config is not None and _uses_interface(module):
        backend = getattr(config, "_attn_implementation", None) or "eager"
        if backend not in BACKENDS:
            raise GraftError(
                f"prefix adapters and padding-free batches do not support attention '{backend}': load the base with one of "
                f"{', '.join(BACKENDS)}"
            )
        module.config = attention_view(config)
    elif own is not None:
        substitute(module, own)
    else:
        raise GraftError(
            f"'{path}' ({name}) does not use transformers' attention interface, so prefix adapters and padding-free "
            "batches cannot run in it"
        )
    module.__dict__["graft_state"] = state
    module.__dict__["graft_attention"] = True


def can_call(module: nn.Module) -> bool:
    """Whether an attention module can be made to call the attention function."""
    return getattr(module, "config", None) is not None and _uses_interface(module) or _own_forward(module) is not None


def _own_forward(module: nn.Module) -> type | None:
    cls = own_class(module)
    return OWN_FORWARDS.get((cls.__module__.rpartition(".modeling_")[2], cls.__name__))


def _uses_interface(module: nn.Module) -> bool:
    """Whether the module's own forward calls the attention function that its config names. GPT-J's does from transformers 5.24 on."""
    return forward_names(module, "ALL_ATTENTION_FUNCTIONS")


def uninstall(module: nn.Module, path: str) -> None:
    """Undo `install`, except for the module's class, which the caller restores."""
    if module.__dict__.pop("graft_attention", None) is None:
        return
    module.__dict__.pop("graft_relative", None)
    if isinstance(config := module.config if hasattr(module, "config") else None, ConfigView):
        module.config = config.graft_original


def shift_positions(root: nn.Module, site_table: SiteTable, state: State, name: str, host: Any) -> None:
    """Give the virtual tokens of an adapter in an attention module the positions before the sequence, in the way of the model's family.

    Position ids are shifted in the module that owns the blocks. With ALiBi and with T5's relative positions there are none, and the bias of
    the virtual tokens' columns does it. Raises `GraftError` for `moved_keys` outside T5, and if no module takes position ids.
    """
    shift = sum(adapter.position_shift for adapter in host._modules["graft"].hooks.keys_values[name])
    block, sublayer = next(
        (block, sublayer)
        for block in site_table.blocks
        for sublayer, path in block.family.attentions.items()
        if root.get_submodule(block.at(path)) is host
    )
    if sublayer == "cross":
        return  # attention over the encoder has no positions
    first = next(each for each in site_table.blocks if each.stack == block.stack)
    table = root.get_submodule(first.at(first.family.attentions[sublayer]))
    relative = block.family.positions == "none" and hasattr(table, TABLE)
    if shift < 0 and not relative:
        raise GraftError(
            f"positions: moved_keys is for biases by relative position (T5), which {type(root).__name__} does not have"
        )
    if block.family.positions == "none":
        if relative:
            host.__dict__["graft_relative"] = (table,)  # a tuple, so that the table does not become a child of the host
        return
    owner = _owner_of_positions(root, block.path)
    shifts = owner.__dict__.setdefault("graft_shifts", {})
    shifts[name] = max(shift, shifts.get(name, 0))
    owner.__dict__["graft_state"] = state
    owner.__dict__["graft_positions"] = "padding" if first_position(root) else block.family.positions
    substitute(owner, ShiftsPositions)


def _owner_of_positions(root: nn.Module, block: str) -> nn.Module:
    """Return the innermost module around a list of blocks that takes position ids."""
    parts = block.split(".")[:-2]
    for count in range(len(parts), -1, -1):
        owner = root.get_submodule(".".join(parts[:count]))
        if "position_ids" in inspect.signature(own_class(owner).forward).parameters:
            return owner
    raise GraftError(
        f"{type(root).__name__} takes no position ids, so positions cannot start after a prefix: use positions: zero"
    )


@contextmanager
def flat_attention(model: nn.Module) -> Iterator[None]:
    """Let padding-free batches run in a block of code: every attention module keeps the segments of a batch apart.

    Raises `GraftError` for a family with another kind of attention.
    """
    root = unwrapped(model)
    state: State = root.__dict__["graft_state"]
    fresh: list[tuple[str, nn.Module]] = []
    try:
        for path in (
            block.at(each) for block in site_table_of(root).blocks for each in block.family.attentions.values()
        ):
            module = root.get_submodule(path)
            if "graft_attention" not in module.__dict__:
                install(module, state, path)
                fresh.append((path, module))
        prove_forwards(root, state)
        yield
    finally:
        for path, module in fresh:
            uninstall(module, path)
            if "graft" not in module._modules:  # a module that hosts an adapter keeps its class, and what that reads
                restore(module, path)
                module.__dict__.pop("graft_state", None)
