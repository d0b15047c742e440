"""Soft prompts of causal models: virtual tokens before the sequence, which run through the model once per forward pass, not once per row.

They come first and see only one another, so their keys and values in every layer do not depend on the sequence. The module that owns the
blocks puts the prompt before the batch as one more row of its adapter (`segments.py`), so that the other parts of a stack act on it too.
The rows of the adapter get its keys and values like a prefix (`virtual.py`), with positions that start after it. Padding on either side,
padding-free batches, mixed rows, caches and beams therefore work as they do without a prompt. In inference the tensors serve later passes
too, until a weight changes, so that decoding a token does not run the prompt again. A pass that fills a cache cannot have rows that are not
the caller's: there the prompt runs alone, before the batch.

In models with bidirectional attention the prompt is put before the sequence for real (`prepending.py`).

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
from graft.architectures.blocks import Block, bidirectional
from graft.architectures.rope import Company, company_of
from graft.architectures.sites import SiteTable
from graft.attention.install import ShiftsPositions, can_call, install, shift_positions
from graft.attention.leading import LeadsWithPrompts, masks_padding
from graft.attention.prepending import PrependsPrompts, SeesLongerEncoder
from graft.attention.segments import Led, led
from graft.attention.virtual import CachedPrompt
from graft.errors import GraftError
from graft.injection.arguments import cached_tokens, given_to
from graft.injection.container import AdapterContainer, container_of
from graft.injection.modes import evaluation_mode
from graft.injection.owners import owner_of
from graft.injection.state import State
from graft.injection.substitution import ORDER, substitute
from graft.routing.context import ForwardContext, PromptCache

LINEAR_ATTENTION = ("LightningAttention", "LinearAttention", "DeltaAttention", "GatedDeltaNet")
"""Words in the names of classes of attention that keeps a state."""
DECAYS = {"A_log", "time_decay"}
"""Parameters of recurrences."""
NOT_THE_TEXT = {"diffllama", "doge", "hrm_text", "moss_transcribe_diarize", "xlm"}
"""Types on which a prompt that holds a text's embeddings is not that text, as tests/attention/test_leading.py measures on every type."""
KEY = "cached_kv"
"""The name of the `CachedPrompt` in an attention module's container."""


class CachesPrompts:
    """Mixin for the module that owns the blocks: runs the prompts of the adapters in use, as rows of the batch or before it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        container, state = self._modules["graft"], self.__dict__["graft_state"]
        if torch.compiler.is_compiling():
            return self._forward_in_graph(container, state, args, kwargs)
        context: ForwardContext = state.current
        names = [name for name in container.hooks.prompts if name in context.names]
        if not names or context.cache_to_fill is not None or state.merged is not None:
            return super().forward(*args, **kwargs)  # pyright: ignore
        if state.reached is not None:
            state.reached.add(id(container))
        if company := self.__dict__["graft_company"]:
            _refuse_other_frequencies(self, company, names, given_to(self, args, kwargs))
        known = {name: self._kept(container, state, name) for name in names}
        if any(each is None for each in known.values()):
            prompts = {name: container.hooks.prompts[name] for name in names}
            if (found := led(self, prompts, context, given_to(self, args, kwargs))) is not None:
                return self._run_led(container, state, found, names)
        cached_kv: PromptCache = {}
        for name, kept in known.items():
            cached_kv |= self._run_alone(container, state, name, context) if kept is None else kept
        with state.carrying(replace(context, cached_kv=cached_kv)):
            return super().forward(*args, **kwargs)  # pyright: ignore

    def _kept(self: Any, container: AdapterContainer, state: State, name: str) -> PromptCache | None:
        """Return the keys and values of a prompt from an earlier pass, if no weight trains or changed and no dropout acts."""
        weights, versions = self._weights(container, name)
        kept = state.prompt_caches.get(name)
        if versions is None:
            state.prompt_caches.pop(name, None)  # torch's fused optimisers change weights but not their versions
        return kept[2] if kept is not None and versions is not None and kept[1] == versions else None

    def _weights(self: Any, container: AdapterContainer, name: str) -> tuple[list[Tensor], Any]:
        """Return the weights that a prompt's keys and values come from, and their versions; None where nothing may be kept."""
        weights = [*self.parameters(), *(p for each in container.hooks.prompts[name] for p in each.parameters())]
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in weights)
        return weights, None if learns or self.training else _versions(weights)

    def _keep(self: Any, container: AdapterContainer, state: State, name: str, cache: PromptCache) -> None:
        weights, versions = self._weights(container, name)
        if versions is not None and not any(each.is_inference() for pair in cache.values() for each in pair):
            state.prompt_caches[name] = weights, versions, cache

    def _run_led(self: Any, container: AdapterContainer, state: State, batch: Led, names: Sequence[str]) -> Any:
        """Run a batch with its prompts as rows."""
        with state.carrying(batch.context):
            output = super().forward(**batch.given)  # pyright: ignore
        if len(names) == 1 and batch.computed:
            self._keep(container, state, names[0], batch.computed)
        return batch.cut(output)

    def _run_alone(
        self: Any, container: AdapterContainer, state: State, name: str, context: ForwardContext
    ) -> PromptCache:
        """Run one adapter's prompt before the batch."""
        if self._weights(container, name)[1] is None:
            return self._run_prompt(container, state, name, context)
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not serve a later pass that trains
            cache = self._run_prompt(container, state, name, context)
        self._keep(container, state, name, cache)
        return cache

    def _run_prompt(
        self: Any, container: AdapterContainer, state: State, name: str, context: ForwardContext
    ) -> PromptCache:
        """Run one adapter's prompt through the blocks, and return the keys and values that attention has kept."""
        cache: PromptCache = {}
        seed = context.prompt_seed(name)
        with state.carrying(ForwardContext(name, seeds=None if seed is None else (seed,), cache_to_fill=cache)):
            super().forward(**_prompt_inputs(self, container.hooks.prompts[name]))  # pyright: ignore
        return cache

    def _forward_in_graph(self: Any, container: AdapterContainer, state: State, args: Any, kwargs: Any) -> Any:
        """Run in a compiled graph: the prompts of all adapters in memory run, and rows pick theirs by slot number."""
        slots, everything = state.slots, {}
        # While a prompt runs, every row has its adapter's slot, so that the other parts of a stack act on the prompt.
        for name, prompts in container.hooks.prompts.items():
            if not state.in_memory(name):
                continue
            cache: PromptCache = {}
            state.cache_in_graph, state.slots = (name, cache), torch.full_like(slots, state.served(name).slot)
            super().forward(**_prompt_inputs(self, prompts))  # pyright: ignore
            everything |= cache
        state.cache_in_graph, state.slots = None, slots
        for adapter, pair in everything.items():
            adapter.in_graph = pair
        output = super().forward(*args, **kwargs)  # pyright: ignore
        for adapter in everything:
            adapter.in_graph = None
        return output


# Outside of ShiftsPositions, so that the prompt's own run has its positions shifted too.
ORDER.insert(ORDER.index(ShiftsPositions), CachesPrompts)


def _refuse_other_frequencies(owner: Any, company: Company, names: Sequence[str], given: dict[str, Any]) -> None:
    """Raise `GraftError` if rows are so long that the model turns their keys by other frequencies than those of the prompt."""
    tokens = next(each for each in (given.get("input_ids"), given.get("inputs_embeds")) if each is not None)
    positions = given.get("position_ids")
    length = cached_tokens(given) + tokens.shape[1] if positions is None else int(positions.max()) + 1
    taken = max(owner.__dict__.get("graft_shifts", {}).get(name, 0) for name in names)
    if company.of(length + taken) != company.of(0):
        limit = min((*company.switches, *company.grows)) - taken
        raise GraftError(
            f"virtual tokens in the embedding have the rotary frequencies of short rows, and this model (LongRoPE or dynamic NTK) has "
            f"others for rows of more than {limit} tokens; this one has {length}. Keep rows shorter, or use kind prefix or lora"
        )


def _prompt_inputs(owner: Any, prompts: Sequence[EmbeddingAdapter]) -> dict[str, Any]:
    """Return the arguments with which the owner of the blocks runs on the prompt alone.

    Positions count from the sequence's start: a prompt of 3 tokens is at -3, -2, -1, which ShiftsPositions moves to 0, 1, 2.
    """
    embeddings_PD = torch.cat([each.prompt().to(_weight_of(each)) for each in prompts])
    inputs = {"inputs_embeds": embeddings_PD[None], "use_cache": False}
    if (
        getattr(owner, "hidden_size_per_layer_input", 0)
        and "inputs_embeds" in inspect.signature(owner.get_per_layer_inputs).parameters
    ):
        # Gemma 4 adds something of each token's id to every layer. Virtual tokens have that of padding, as its images do.
        padding = torch.full((1, len(embeddings_PD)), owner.config.pad_token_id or 0, device=embeddings_PD.device)
        inputs["per_layer_inputs"] = owner.get_per_layer_inputs(padding)
    if isinstance(owner, ShiftsPositions):
        inputs["position_ids"] = torch.arange(-len(embeddings_PD), 0, device=embeddings_PD.device)[None]
    return inputs


def _weight_of(prompt: EmbeddingAdapter) -> Tensor:
    weight: Any = prompt.around.host.weight
    return weight


def _versions(weights: list[Tensor]) -> list[tuple[int, int]] | None:
    """Return numbers that change when a weight does. None for weights made in inference mode, which have no version."""
    if any(weight.is_inference() for weight in weights):
        return None
    return [(weight._version, weight.data_ptr()) for weight in weights]


def install_prompt(root: nn.Module, site_table: SiteTable, state: State, name: str, adapter: EmbeddingAdapter) -> None:
    """Install a prompt in every stack of blocks that reads the adapter's embedding.

    Raises `GraftError` for a model without such a stack, and for blocks without attention.
    """
    if getattr(root.config, "model_type", None) in NOT_THE_TEXT:
        raise GraftError(
            f"virtual tokens before the input of {type(root).__name__} do not compute what a text in their place does, so prompts and "
            "p-tuning are refused there: use kind prefix, or a kind at the linear layers"
        )
    found = False
    for blocks in _stacks(site_table):
        crossed = any("cross" in block.family.attentions for block in blocks)
        owner = owner_of(root, blocks[0].path)
        if owner is None or not any(p is _weight_of(adapter) for p in owner.parameters()):
            continue
        owner.__dict__["graft_state"] = state
        if crossed:  # the decoder of an encoder-decoder sees the prompt in the encoder's output
            container_of(owner, state).add_prompt(name, adapter)
            substitute(owner, SeesLongerEncoder)
            continue
        found = True
        container_of(owner, state).add_prompt(name, adapter)
        if adapter.after_positions and (not hasattr(owner, "embeddings") or not bidirectional(root, blocks[0])):
            raise GraftError(
                f"enters: blocks is for encoders whose embeddings are one module, not for {type(owner).__name__}: use enters: embedding"
            )
        if bidirectional(root, blocks[0]):
            owner.__dict__["graft_feeds_decoder"] = any(
                "cross" in block.family.attentions for block in site_table.blocks
            )
            substitute(owner, PrependsPrompts)
        elif _keeps_state(root, blocks):
            owner.__dict__["graft_masks"] = _masks_padding(root, state, owner)
            substitute(owner, LeadsWithPrompts)
        else:
            _install_cached(root, site_table, state, name, adapter, blocks)
            owner.__dict__["graft_company"] = company_of(owner)
            substitute(owner, CachesPrompts)
    if not found:
        raise GraftError(
            f"no stack of blocks in this {type(root).__name__} takes embeddings (inputs_embeds) instead of token ids, so virtual "
            "tokens cannot come before its input: use kind prefix"
        )


def _stacks(site_table: SiteTable) -> list[list[Block]]:
    """Return the model's blocks, one list for each stack."""
    stacks: dict[str, list[Block]] = {}
    for block in site_table.blocks:
        stacks.setdefault(block.path.rpartition(".")[0], []).append(block)
    return list(stacks.values())


def _keeps_state(root: nn.Module, blocks: Sequence[Block]) -> bool:
    """Whether some block of a stack carries what it knows of earlier tokens in a state, and not in keys and values alone.

    Such blocks have no attention, or an attention of another kind than others, or beside it a convolution or decay rates (Falcon-H1).
    """
    paths = [block.family.attentions.get("attn") for block in blocks]
    if any(path is None for path in paths):
        return True
    callable_ = {can_call(root.get_submodule(block.at(str(path)))) for block, path in zip(blocks, paths, strict=True)}
    modules = [module for block in blocks for module in block.module.modules()]
    named = any(word in type(module).__name__ for module in modules for word in LINEAR_ATTENTION)
    recurs = any(isinstance(each, nn.Conv1d) or DECAYS & set(each._parameters) for each in modules)
    return len(callable_) > 1 or named or recurs


def _masks_padding(root: nn.Module, state: State, owner: nn.Module) -> bool:
    with evaluation_mode(root), state.carrying(ForwardContext()):
        return masks_padding(root, owner)


def _install_cached(
    root: nn.Module, site_table: SiteTable, state: State, name: str, adapter: EmbeddingAdapter, blocks: list[Block]
) -> None:
    """Install a `CachedPrompt` in the attention of every block. Several prompts of one adapter share it."""
    for block in blocks:
        path = block.at(block.family.attentions["attn"])
        host = root.get_submodule(path)
        container = container_of(host, state)
        own = [each for each in container.hooks.keys_values.get(name, ()) if each.cached_kv]
        if own:
            own[0].position_shift += adapter.tokens
            continue
        prompt = CachedPrompt(state, adapter.tokens, adapter.windowed).train(host.training)
        container.add_attention(name, KEY, prompt)
        install(host, state, path)
    shift_positions(
        root, site_table, state, name, root.get_submodule(blocks[0].at(blocks[0].family.attentions["attn"]))
    )
