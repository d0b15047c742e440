"""Attach adapters to a model in place, and detach them again.

The model stays itself: its class, its base weights and the names of its state dict do not change. After the last `detach` it is exactly
what it was before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from graft.adapters.base import AdapterConfig
from graft.adapters.filling import will_be_filled
from graft.adapters.hooks import AttentionAdapter
from graft.adapters.nesting import every_config
from graft.adapters.parsing import parse
from graft.adapters.presets import Preset
from graft.architectures.four_bit import allow_packing, forbid_packing
from graft.architectures.language import resolve_sites
from graft.architectures.site import Site, SiteKeys
from graft.architectures.sites import SiteTable
from graft.architectures.torchao import allow_rounding, forbid_rounding
from graft.architectures.transformers_internals import is_checkpointed_layer
from graft.architectures.walk import CONTAINER, base_modules
from graft.attaching.active import set_active, set_trainable
from graft.attaching.install import install_adapter, spec_of
from graft.attaching.probe import explained, probe
from graft.attaching.room import refuse_too_large
from graft.attaching.together import without_adapter
from graft.attaching.trained import check_references, fill_references
from graft.attaching.trainer import SavesAdapter
from graft.attention.cached_text import start_from_text
from graft.attention.install import ShiftsPositions, uninstall
from graft.attention.proof import prove_forwards
from graft.errors import GraftError
from graft.injection.container import AdapterContainer, container_of
from graft.injection.ends import AddsAtEnd
from graft.injection.gated_mlp import GATED, GatedForward, install_gated_mlps
from graft.injection.holes import EmptyTable, Hole
from graft.injection.masks import RecordsMask
from graft.injection.state import SHARED, AttachedAdapter, Installed, State, state_of, unwrapped
from graft.injection.substitution import KeepsContext, hooked, restore, substitute
from graft.reversible.passes import CoupledBlock

Model = TypeVar("Model", bound=nn.Module)
NAME = re.compile(r"(?!training$)[A-Za-z0-9][A-Za-z0-9_\-]*")
"""Names of adapters. `training` is not allowed, because torch sets this attribute on every module."""
NAMES = "letters, digits, '_' and '-', with a letter or digit first, and not the word 'training'"
"""The same in words."""
MODEL_MIXINS = (
    KeepsContext, RecordsMask, AddsAtEnd, SavesAdapter, ShiftsPositions, GatedForward, CoupledBlock, Hole, EmptyTable,
)  # fmt: skip
"""Mixins that stay while any adapter is attached. Others are removed with the last adapter of their module."""


def attach(
    model: Model, adapters: Mapping[str, AdapterConfig | Preset | Mapping[str, Any] | Sequence[Any] | str]
) -> Model:
    """Attach adapters by name, in place. The base is frozen, and the first adapter ever attached becomes active.

    adapters: name -> a config (`graft.LoRA(rank=16)`), a mapping with `kind`, a preset's name, or a list of these (a stack).
    Raises `GraftError` for a bad name or config, a site that matches nothing, a model wrapped by PEFT, or a site that a trial forward
    pass does not reach. The model is then as it was before.
    """
    if not isinstance(adapters, Mapping):
        raise GraftError(
            f"adapters are given by name, such as {{'task': graft.LoRA(rank=8)}}; given: {type(adapters).__name__}"
        )
    root = unwrapped(model)
    state: State = root.__dict__.get("graft_state") or State()
    if state.merged is not None:
        raise GraftError(
            f"adapter '{state.merged}' is merged into the base: call graft.unmerge(model, '{state.merged}') before attach"
        )
    _refuse_foreign(root)
    site_table = state.sites(root)
    planned = {name: _plan(site_table, state, name, spec) for name, spec in adapters.items()}
    first, configs = not state.adapters, [config for config, _ in planned.values()]
    if first:
        _refuse_adapted_parts(root, state)
    try:
        with explained(root, state, configs, "a trial pass of the base's parts"):
            if first:
                _prepare_base(root, state)
        for name, (config, parts) in planned.items():
            with explained(root, state, [config], "putting it into the model"):
                _install(root, state, name, config, parts)
                fill_references(root, state, state.adapters[name])
        with explained(root, state, configs, "a trial pass"):
            prove_forwards(root, state)
        probe(root, state, tuple(planned))
    except BaseException:
        for name in planned:
            if name in state.adapters:
                _remove(root, state, name)
        if first:
            _restore_base(root, state)
        raise
    if first and planned:
        set_active(model, next(iter(planned)))
    else:
        set_trainable(model, state.trained or ())
    return model


def _refuse_foreign(root: nn.Module) -> None:
    """Raise `GraftError` for a model that PEFT has wrapped."""
    for _, module in base_modules(root):
        if hasattr(module, "base_layer") or hasattr(module, "peft_config") and not hasattr(module, "graft_base"):
            raise GraftError(
                "this model is already wrapped by PEFT: unload it (model.unload()) or load a fresh base, then attach"
            )


def check_name(name: Any) -> None:
    """Raise `GraftError` for what cannot be the name of an adapter."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise GraftError(f"'{name}' is not an adapter name: use {NAMES} (the name becomes a part of tensor names)")


def _plan(
    site_table: SiteTable, state: State, name: str, spec: Any
) -> tuple[AdapterConfig, list[tuple[AdapterConfig, list[Site]]]]:
    """Return the config that a user means, and each of its simple parts with the sites in this model. Changes nothing."""
    check_name(name)
    if name in state.adapters:
        raise GraftError(f"an adapter '{name}' is attached already: detach it first, or choose another name")
    config = parse(spec)
    if isinstance(config, Preset):
        config = config.resolve(site_table.names())
    check_references(config)
    with explained(site_table.model, state, [config], "looking for its sites"):
        parts = [(part, resolve_sites(site_table, part)) for part in config.parts()]
    for part, sites in parts:
        part.check_sites(sites)
        for site in sites:
            if site.features is not None and any(
                getattr(each, "position", "after") == "before" for each in every_config(part)
            ):
                raise GraftError(
                    f"'{site.name}' is a slice of a fused projection, which has one input for q, k and v: name attn.qkv instead"
                )
    return config, parts


def _refuse_adapted_parts(root: nn.Module, state: State) -> None:
    for _, module in base_modules(root):
        if module.__dict__.get("graft_state", state) is not state:
            raise GraftError(
                "a submodule of this model has adapters of its own: detach those first, or attach to that submodule"
            )


def _prepare_base(root: nn.Module, state: State) -> None:
    """Freeze the base, remember which of its parameters required gradients, and put in the mixins that every model with adapters has."""
    state.base_trainable = tuple(name for name, p in root.named_parameters() if p.requires_grad)
    forbid_packing(root)
    forbid_rounding(root)
    root.__dict__["graft_state"] = state
    for parameter in root.parameters():
        parameter.requires_grad_(False)
    if hasattr(root, "save_pretrained"):
        substitute(root, SavesAdapter)
    for _, module in base_modules(root):
        if is_checkpointed_layer(module):
            module.__dict__["graft_state"] = state
            substitute(module, KeepsContext)
    assert state.site_table is not None
    install_gated_mlps(state.site_table.blocks, state)


def _install(
    root: nn.Module, state: State, name: str, config: AdapterConfig, parts: list[tuple[AdapterConfig, list[Site]]]
) -> None:
    """Build the modules of an adapter and put them into the model."""
    attached = state.adapters[name] = AttachedAdapter(config, state.free_slot())
    keys = SiteKeys()
    for number, (part, sites) in enumerate(parts):
        # Sites are numbered through all parts of a stack: the number is part of the key of seeded dropout.
        specs = [spec_of(root, site, len(attached.installs) + i) for i, site in enumerate(sites)]
        refuse_too_large(part, specs)
        shared = part.build_shared(specs)
        if shared is not None:
            key = f"{SHARED}{number}"
            container_of(root, state).hold(name, key, shared.train(root.training))
            attached.shared[key] = shared
        for site, spec in zip(sites, specs, strict=True):
            key = keys.take(site.module, site.part)
            at_site = part.for_site(spec)
            adapter = at_site.build(spec)
            if shared is not None:
                adapter.share(shared)
            installed = Installed(site, key, at_site, adapter)
            install_adapter(root, state, name, installed)
            attached.installs.append(installed)
        # A prefix that starts from a text runs the base, so all of this part's modules have to be in place first.
        if part.starts_from and not will_be_filled():
            own = [(each.site.module, each.module) for each in attached.installs[-len(sites) :]]
            attending = [(root.get_submodule(path), each) for path, each in own if isinstance(each, AttentionAdapter)]
            start_from_text(root, state, part.starts_from, attending)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Detach one adapter, or all of them (None). After the last one the model is what it was before, class and all.

    Rows that it served get the bare base; rows that it served together with others keep the others. The weights of an adapter that was
    merged with keep=False stay in the base for good.
    Raises `GraftError` for an unknown name, an adapter with a merge that can still be undone, or a module that other code has hooked or
    wrapped since.
    """
    root, state = unwrapped(model), state_of(model)
    names = tuple(state.adapters) if name is None else (name,)
    for each in names:
        state.adapter(each)
        if state.merged == each and state.originals:
            raise GraftError(
                f"adapter '{each}' is merged into the base: call graft.unmerge(model, '{each}') before detach"
            )
    _refuse_hooked(root, state)
    if state.merged in names:
        state.merged = state.before_merge = None
    for each in names:
        _remove(root, state, each)
    if not state.adapters:
        _restore_base(root, state)


def _refuse_hooked(root: nn.Module, state: State) -> None:
    """Raise `GraftError` if other code has put a forward on an adapted module, before anything is changed."""
    for path, module in base_modules(root):
        if hooked(module):
            raise GraftError(
                f"module '{path}' was hooked after attach (its instance has a forward of its own): remove that hook before detach"
            )


def _remove(root: nn.Module, state: State, name: str) -> None:
    """Take an adapter out of the model and of the combinations that it is in, and restore the hosts that no adapter is left in."""
    without_adapter(root, name)
    state.adapters.pop(name)
    state.prompt_caches.clear()
    state.reroute(name, None)
    for path, module in list(base_modules(root)):
        container = module._modules.get(CONTAINER)
        if isinstance(container, AdapterContainer):
            container.remove(name)
            if container.empty:
                del module._modules[CONTAINER]
                uninstall(module, path)
                restore(module, path, keep=MODEL_MIXINS)
                if module is not root and not isinstance(module, MODEL_MIXINS):
                    module.__dict__.pop("graft_state", None)
        module.__dict__.get("graft_shifts", {}).pop(name, None)


def _restore_base(root: nn.Module, state: State) -> None:
    """Undo `_prepare_base`."""
    allow_packing(root)
    allow_rounding(root)
    for path, module in base_modules(root):
        uninstall(module, path)
        restore(module, path, keep=(CoupledBlock, Hole, EmptyTable))
        for key in (
            "graft_state",
            "graft_shifts",
            "graft_positions",
            "graft_feeds_decoder",
            "graft_company",
            "graft_masks",
            GATED,
        ):
            module.__dict__.pop(key, None)
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(name in state.base_trainable)
