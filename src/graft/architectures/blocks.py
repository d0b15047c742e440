"""The transformer blocks of a model, and the stack that each belongs to: encoder, decoder, a tower, or the only stack."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from graft.architectures.family import Family
from graft.architectures.layers import is_linear
from graft.architectures.table import family_of
from graft.architectures.transformers_internals import is_checkpointed_layer
from graft.architectures.walk import base_modules
from graft.errors import GraftError

TOWERS = {"vision": "vision", "visual": "vision", "image": "vision", "img": "vision", "audio": "audio"}


@dataclass(frozen=True)
class Block:
    """One transformer block: its path, its number in its stack, its module and its family."""

    path: str
    number: int
    module: nn.Module
    family: Family
    stack: str = ""
    hidden: int = 0
    """The width of the residual stream in the model's config, 0 if the config has none."""

    def at(self, relative: str) -> str:
        """Return the full path of a module of this block."""
        return f"{self.path}.{relative}"


def text_config_of(model: nn.Module) -> Any:
    """Return the config of the text model, which may be a part of the model's config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def blocks_of(model: nn.Module) -> list[Block]:
    """Return all blocks in the model's order. Lists of modules inside a block (experts) hold no blocks."""
    config = text_config_of(model)
    model_type, hidden = getattr(config, "model_type", None), getattr(config, "hidden_size", None) or 0
    found: list[Block] = []
    for path, module in base_modules(model):
        if (
            not isinstance(module, nn.ModuleList)
            or not len(module)
            or any(path.startswith(f"{b.path}.") for b in found)
        ):
            continue
        blocks = [(number, block, family_of(model_type, block)) for number, block in enumerate(module)]
        if any(_is_layer(block, family) for _, block, family in blocks):
            found += [
                Block(f"{path}.{number}", number, block, family, stack_of(path), hidden)
                for number, block, family in blocks
            ]
    return found


def _is_layer(module: nn.Module, family: Family) -> bool:
    """Whether a member of a list of modules is a block: it has linear layers, and sublayers or the class of a layer or attention."""
    named = is_checkpointed_layer(module) or "Attention" in type(module).__name__
    return any(is_linear(each) for _, each in base_modules(module)) and (named or bool(family.sublayers))


def stack_of(path: str) -> str:
    """Return the stack that a module belongs to, by the names of the modules around it. The only stack of most models is ""."""
    parts = path.split(".")
    tower = next((name for part in parts for key, name in TOWERS.items() if key in part), "")
    return tower or next((part for part in parts if part in ("encoder", "decoder")), "")


def bidirectional(root: nn.Module, block: Block) -> bool:
    """Whether the tokens of a block see those after them too."""
    if "attn" not in block.family.attentions:
        return False
    attention = root.get_submodule(block.at(block.family.attentions["attn"]))
    causal = getattr(attention, "is_causal", None)
    return not (getattr(attention, "is_decoder", True) if causal is None else causal)


def layers_in(span: str, count: int, limit: int, name: str) -> set[int]:
    """Return the numbers of the layers that a span means in a stack of `count` layers.

    The spans are "3", "0-15", "0,4-7", "first4", "last4" and their combinations: of 8 layers, "0,last2" means 0, 6 and 7.
    limit: the number of layers of the deepest stack. Raises `GraftError` for a layer that no stack has.
    """
    chosen: set[int] = set()
    for piece in span.split(","):
        if match := re.fullmatch(r"(first|last)0*([1-9]\d*)", piece):
            number = min(int(match[2]), count)
            chosen |= set(range(number)) if match[1] == "first" else set(range(count - number, count))
        elif match := re.fullmatch(r"(\d+)(?:-(\d+))?", piece):
            start, stop = int(match[1]), int(match[2] or match[1])
            if stop >= limit or start > stop:
                raise GraftError(f"'{name}': layers {piece} do not exist; this model has layers 0 to {limit - 1}")
            chosen |= set(range(start, stop + 1))
        else:
            raise GraftError(f"'{name}': '{piece}' is not a layer range; write 3, 0-15, 0,4-7, first4 or last4")
    return chosen
