"""Virtual tokens before the sequence of a causal model, which run through the model once per forward pass, not once per row.

They come first and see only one another, so their keys and values in every layer do not depend on the sequence: the module that owns the
blocks runs on the prompt alone (under the same adapter, so that a stack's other parts act on it too), each attention module notes the keys
and values, and the rows of the adapter get these as they get a prefix (`virtual.py`), with positions that start behind them. Padding on
either side, token-flat batches, mixed rows, caches and beams are then what they are without a prompt. Gradients reach the prompt
through the noted tensors. Where nothing trains, these are kept until a weight changes or learns, so that decoding costs nothing more.

Models whose tokens see each other in both directions get the prompt for real (`prepending.py`).

Legend: P virtual tokens, D features.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.hooks import EmbeddingAdapter
from graft.architectures.blocks import Block
from graft.architectures.sites import SiteTable
from graft.attention.install import ShiftsPositions, install, shift_positions
from graft.attention.prepending import PrependsPrompts, SeesLongerEncoder
from graft.attention.virtual import CachedPrompt
from graft.errors import GraftError
from graft.injection.container import AdapterContainer, container_of
from graft.injection.state import State
from graft.injection.substitution import ORDER, Substituted, substitute
from graft.routing.context import ForwardContext, PromptCache

KEY = "recorded"
"""Of the module that hands out what was noted, in an attention module's container."""


class CachesPrompts:
    """Mixin for the module that owns the blocks: runs the prompts of the adapters in the pass before the batch."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        container, state = self._modules["graft"], self.__dict__["graft_state"]
        if torch.compiler.is_compiling():
            return self._forward_in_graph(container, state, args, kwargs)
        context: ForwardContext = state.current
        names = [name for name in container.hooks.prompts if name in context.names]
        if not names or context.recording is not None or state.merged is not None:
            return super().forward(*args, **kwargs)  # pyright: ignore
        if state.reached is not None:
            state.reached.add(id(container))
        cached_kv: PromptCache = {}
        for name in names:
            cached_kv |= self._recorded(container, state, name, context)
        with state.carrying(replace(context, cached_kv=cached_kv)):
            return super().forward(*args, **kwargs)  # pyright: ignore

    def _recorded(
        self: Any, container: AdapterContainer, state: State, name: str, context: ForwardContext
    ) -> PromptCache:
        """Keys and values of one adapter's prompt: noted now, or kept from before where neither gradients nor dropout are at work."""
        weights = [*self.parameters(), *(p for each in container.hooks.prompts[name] for p in each.parameters())]
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in weights)
        if learns or self.training:
            state.prompt_caches.pop(name, None)  # torch's fused optimisers change weights and not their versions
            return self._cache_kv(container, state, name, context)
        versions = _versions(weights)
        kept = state.prompt_caches.get(name)
        if kept is not None and versions is not None and kept[1] == versions:
            return kept[2]
        with torch.inference_mode(False), torch.no_grad():  # what is kept serves later passes too, which may train
            recording = self._cache_kv(container, state, name, context)
        if versions is not None:
            state.prompt_caches[name] = weights, versions, recording
        return recording

    def _cache_kv(
        self: Any, container: AdapterContainer, state: State, name: str, context: ForwardContext
    ) -> PromptCache:
        recording: PromptCache = {}
        seed = context.prompt_seed(name)
        with state.carrying(ForwardContext(name, seeds=None if seed is None else (seed,), recording=recording)):
            super().forward(**_alone(self, container.hooks.prompts[name]))  # pyright: ignore
        return recording

    def _forward_in_graph(self: Any, container: AdapterContainer, state: State, args: Any, kwargs: Any) -> Any:
        """For compiled graphs: every adapter's prompt is run, and rows pick theirs by slot number."""
        slots, everything = state.slots, {}
        for name, prompts in container.hooks.prompts.items():
            if state.adapters[name].offloaded:
                continue
            recording: PromptCache = {}
            state.recording_in_graph, state.slots = (name, recording), torch.full_like(slots, state.adapters[name].slot)
            super().forward(**_alone(self, prompts))  # pyright: ignore
            everything |= recording
        state.recording_in_graph, state.slots = None, slots
        for adapter, pair in everything.items():
            adapter.in_graph = pair
        output = super().forward(*args, **kwargs)  # pyright: ignore
        for adapter in everything:
            adapter.in_graph = None
        return output


ORDER.insert(
    ORDER.index(ShiftsPositions), CachesPrompts
)  # outside, so that the prompt's own pass has its positions moved too


def _alone(owner: Any, prompts: Sequence[EmbeddingAdapter]) -> dict[str, Any]:
    """The arguments under which the owner of the blocks sees the prompt and nothing else: positions count from the sequence's start."""
    embeddings_PD = torch.cat([each.prompt().to(_weight_of(each)) for each in prompts])
    inputs = {"inputs_embeds": embeddings_PD[None], "use_cache": False}
    if isinstance(owner, ShiftsPositions):
        inputs["position_ids"] = torch.arange(-len(embeddings_PD), 0, device=embeddings_PD.device)[None]
    return inputs


def _weight_of(prompt: EmbeddingAdapter) -> Tensor:
    weight: Any = prompt.around.host.weight
    return weight


def _versions(weights: list[Tensor]) -> list[tuple[int, int]] | None:
    """What changes when a weight does. None where that cannot be told (weights made in inference mode)."""
    if any(weight.is_inference() for weight in weights):
        return None
    return [(weight._version, weight.data_ptr()) for weight in weights]


def install_prompt(root: nn.Module, site_table: SiteTable, state: State, name: str, adapter: EmbeddingAdapter) -> None:
    """Let the stacks that read the adapter's embedding take care of its prompt.

    Raises `GraftError` for a model without such a stack, or with layers that are no attention.
    """
    found = False
    for blocks in _stacks(site_table):
        crossed = any("cross" in block.family.attentions for block in blocks)
        owner = _owner_of(root, blocks[0].path)
        if owner is None or not any(p is _weight_of(adapter) for p in owner.parameters()):
            continue
        owner.__dict__["graft_state"] = state
        if crossed:  # a decoder behind an encoder: the prompt is in what it reads there
            container_of(owner, state).add_prompt(name, adapter)
            substitute(owner, SeesLongerEncoder)
            continue
        found = True
        container_of(owner, state).add_prompt(name, adapter)
        if adapter.behind_positions and (not hasattr(owner, "embeddings") or not _sees_both_ways(root, blocks[0])):
            raise GraftError(
                f"enters: blocks is for encoders whose embeddings are one module, not for {type(owner).__name__}: use enters: embedding"
            )
        if _sees_both_ways(root, blocks[0]):
            owner.__dict__["graft_feeds_decoder"] = any(
                "cross" in block.family.attentions for block in site_table.blocks
            )
            substitute(owner, PrependsPrompts)
        else:
            _seat_recorded(root, site_table, state, name, adapter, blocks)
            substitute(owner, CachesPrompts)
    if not found:
        raise GraftError(
            f"no stack of blocks in this {type(root).__name__} takes embeddings (inputs_embeds) in place of token ids, so virtual "
            "tokens cannot stand before its input: use kind prefix"
        )


def _stacks(site_table: SiteTable) -> list[list[Block]]:
    stacks: dict[str, list[Block]] = {}
    for block in site_table.blocks:
        stacks.setdefault(block.path.rpartition(".")[0], []).append(block)
    return list(stacks.values())


def _owner_of(root: nn.Module, path: str) -> Any:
    """The nearest module around a block that takes embeddings."""
    while path:
        path = path.rpartition(".")[0]
        module = root.get_submodule(path)
        cls = type(module)
        own = cls.graft_base if issubclass(cls, Substituted) else cls
        if "inputs_embeds" in inspect.signature(own.forward).parameters:
            return module
    return None


def _sees_both_ways(root: nn.Module, block: Block) -> bool:
    attention = root.get_submodule(block.at(block.family.attentions["attn"]))
    causal = getattr(attention, "is_causal", None)
    return not (getattr(attention, "is_decoder", True) if causal is None else causal)


def _seat_recorded(
    root: nn.Module, site_table: SiteTable, state: State, name: str, adapter: EmbeddingAdapter, blocks: list[Block]
) -> None:
    """A place in every layer for what it notes of the prompt. Several prompts of one adapter are one."""
    for block in blocks:
        if "attn" not in block.family.attentions:
            raise GraftError(
                f"'{block.path}' ({type(block.module).__name__}) has no attention that Graft knows: virtual tokens in the embedding would "
                "not reach the sequence through it. Use lora or a bottleneck"
            )
        path = block.at(block.family.attentions["attn"])
        host = root.get_submodule(path)
        container = container_of(host, state)
        own = [each for each in container.hooks.keys_values.get(name, ()) if each.cached_kv]
        if own:
            own[0].position_shift += adapter.tokens
            continue
        container.add_attention(name, KEY, CachedPrompt(state, adapter.tokens, adapter.windowed))
        install(host, state, path)
    shift_positions(
        root, site_table, state, name, root.get_submodule(blocks[0].at(blocks[0].family.attentions["attn"]))
    )
