"""Put one adapter module into its host, and let the host run it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graft.adapters.hooks import AttentionAdapter, EmbeddingAdapter, ExpertsAdapter
from graft.adapters.nesting import every_config
from graft.adapters.surroundings import Surroundings
from graft.architectures.blocks import bidirectional
from graft.architectures.site import Site, SiteSpec
from graft.architectures.sites import SiteTable
from graft.architectures.transformers_internals import device_of
from graft.architectures.two_streams import two_streams_of
from graft.attention.install import install, shift_positions
from graft.attention.prompts import install_prompt
from graft.errors import GraftError
from graft.injection.container import AdapterContainer, container_of
from graft.injection.ends import AddsAtEnd
from graft.injection.experts import RunsExperts
from graft.injection.inputs import KeepsInput
from graft.injection.masks import RecordsMask
from graft.injection.owners import owner_of
from graft.injection.state import Installed, State
from graft.injection.substitution import GraftedCall, GraftedForward, substitute


def spec_of(root: nn.Module, site: Site, index: int) -> SiteSpec:
    """Return what the adapter module number `index` is told about its site."""
    # The host of a stream has no weights: it computes where its block does.
    host = root.get_submodule(site.module if site.type != "stream" else site.module.rpartition(".")[0])
    weight = next(host.parameters(), None)
    dtype = torch.float64 if weight is not None and weight.dtype == torch.float64 else torch.float32
    return SiteSpec(site.name, site.type, site.module, site.in_features, site.out_features, site.layer, index, dtype, device_of(host),
                 site.num_heads, site.num_kv_heads, site.head_dim, site.num_experts, site.value_dim)  # fmt: skip


def install_adapter(root: nn.Module, state: State, name: str, installed: Installed) -> None:
    """Let an adapter module act at its site. Raises `GraftError` if the model has no way to run it."""
    site, adapter, host = installed.site, installed.module, root.get_submodule(installed.site.module)
    if isinstance(adapter, EmbeddingAdapter) and two_streams_of(root) is not None:
        raise GraftError(
            f"kind '{installed.config.kind}' does not train on a reversible base: its virtual tokens run through the blocks on their own, "
            "and the base keeps no activations of that. Choose a kind that acts inside the blocks (lora, parallel, prefix)"
        )
    assert (site_table := state.site_table) is not None
    adapter.train(host.training)
    norm = root.get_submodule(site.norm) if site.norm else None
    projections = _projections(root, site_table, site) if isinstance(adapter, AttentionAdapter) else {}
    causal = _causal(root, site_table, site)
    answers = causal and bool(getattr(getattr(root, "config", None), "is_encoder_decoder", False))
    adapter.on_install(Surroundings(host, site.features, norm, projections, causal, answers))
    if adapter.reads_mask:
        _record_masks(root, state)
    if any(each.compares_rows for each in every_config(installed.config)):
        _add_at_end(root, state, site)
    container = container_of(host, state)
    if isinstance(adapter, EmbeddingAdapter):
        container.hold(name, installed.key, adapter)
        install_prompt(root, site_table, state, name, adapter)
    elif isinstance(adapter, AttentionAdapter):
        container.add_attention(name, installed.key, adapter)
        install(host, state, site.module)
        if adapter.reads == "input":
            substitute(host, KeepsInput)
        if adapter.position_shift:
            shift_positions(root, site_table, state, name, host)
        if adapter.adapts_output_projection:
            container_of(projections["o"].host, state).add_output_hook(name, adapter)
            _run_through_container(projections["o"].host)
    elif isinstance(adapter, ExpertsAdapter):
        container.add_experts(name, installed.key, adapter)
        substitute(host, RunsExperts)
    else:
        block = next(
            (block.path for block in site_table.blocks if site.module.startswith(f"{block.path}.")), site.module
        )
        # E.g. "experts.3.up_proj" in a block: a number in the path says that the host is in a list, so it may get some tokens only.
        container.is_expert = any(part.isdigit() for part in site.module.removeprefix(block).split("."))
        _install_around(root, container, name, installed)


def _causal(root: nn.Module, site_table: SiteTable, site: Site) -> bool:
    """Whether tokens at a site depend on earlier ones only. A site outside of the blocks is as causal as the last of them."""
    own = [block for block in site_table.blocks if site.module.startswith(f"{block.path}.")]
    return any(not bidirectional(root, block) for block in own or site_table.blocks[-1:])


def _record_masks(root: Any, state: State) -> None:
    """Let the model put the mask of each call into the forward context; an encoder-decoder also where a half of it is called alone."""
    both = getattr(getattr(root, "config", None), "is_encoder_decoder", False)
    halves = (root.get_encoder(), root.get_decoder()) if both else ()
    for each in (root, *halves):
        each.__dict__["graft_state"] = state
        substitute(each, RecordsMask)


def _add_at_end(root: nn.Module, state: State, site: Site) -> None:
    """Let the module that owns the blocks around a site add losses that read its last hidden states."""
    assert state.site_table is not None
    block = next((block for block in state.site_table.blocks if site.module.startswith(f"{block.path}.")), None)
    owner = owner_of(root, block.path) if block is not None else None
    if owner is None:
        raise GraftError(
            f"information reads the last hidden states of the blocks around a site, and none are known around '{site.name}': adapt a "
            "sublayer (attn, mlp) of the blocks"
        )
    owner.__dict__["graft_state"] = state
    substitute(owner, AddsAtEnd)


def _install_around(root: nn.Module, container: AdapterContainer, name: str, installed: Installed) -> None:
    """Install an adapter around its host, and at the module with its input if that is another one."""
    site, adapter = installed.site, installed.module
    source = site.residual if adapter.reads == "residual" else site.source
    if source is None and adapter.reads == "residual":
        raise GraftError(
            f"kind '{installed.config.kind}' reads the residual stream, which is not known at site '{site.name}': name attn or mlp"
        )
    remote = source is not None and source != site.module
    hosted = container.add(name, installed.key, adapter, site.features, remote)
    _run_through_container(container.host)
    if source is not None and remote:
        container_of(root.get_submodule(source), container.state).send(hosted)
        _run_through_container(root.get_submodule(source))


def _run_through_container(module: nn.Module) -> None:
    substitute(module, GraftedCall if "forward" in module.__dict__ else GraftedForward)


def _projections(root: nn.Module, site_table: SiteTable, site: Site) -> dict[str, Surroundings]:
    """Return the linear layers (or the features of a fused one) that make an attention's queries, keys, values and output: q, k, v, o."""
    block = next((block for block in site_table.blocks if site.module.startswith(f"{block.path}.")), None)
    found = [] if block is None else [each for each in site_table.of_block(block) if each.type == "linear"]
    letters = {f"{site.name}.{letter}": letter for letter in "qkvo"}
    return {
        letters[each.name]: Surroundings(root.get_submodule(each.module), each.features)
        for each in found
        if each.name in letters
    }
