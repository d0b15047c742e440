"""What Graft knows of one model: its adapters, where they sit, and the pass that is in effect.

One `State` belongs to one root; every module with adapters refers to it. A deep copy or a pickle of the model takes it along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.base import Adapter, AdapterConfig, AdapterModule, Shared
from graft.architectures.language import resolve_sites
from graft.architectures.site import Site, SiteRequest
from graft.architectures.sites import SiteTable
from graft.architectures.torch_internals import assert_in_graph
from graft.errors import GraftError, did_you_mean
from graft.routing.context import ForwardContext, PromptCache

MAX_ROWS = 4096
"""Rows that a compiled graph can route."""
BARE, NO_ROW = -1, -2
"""Slot numbers of a row that the bare base serves, and of one that is not there."""
SHARED = "shared"
"""Key, with the part's number behind it, of a module that all sites of an adapter share."""


@dataclass(frozen=True, eq=False)
class Installed:
    """One module of an adapter at its site."""

    site: Site
    key: str
    """Its name in the host's container."""
    config: AdapterConfig
    module: Adapter


@dataclass(eq=False)
class AttachedAdapter:
    """One attached adapter."""

    config: AdapterConfig
    slot: int
    """Its number in compiled graphs."""
    installs: list[Installed] = field(default_factory=list)
    shared: dict[str, Shared] = field(default_factory=dict)
    """The modules that all its sites share, by their names in the root's container."""
    trains: bool | None = None
    """Whether its parameters require gradients; None where nobody has said yet."""
    offloaded: bool = False
    """Whether its tensors are elsewhere for now, and empty here: no pass names it, and graphs leave it out."""

    def modules(self) -> Iterator[tuple[str, AdapterModule]]:
        """(path without Graft's own part, module) of every module that is the adapter: one per site, then the shared ones."""
        for installed in self.installs:
            yield f"{installed.site.module}.{installed.key}".lstrip("."), installed.module
        yield from self.shared.items()

    def train(self, mode: bool) -> None:
        """Put its modules into training mode or not."""
        for _, module in self.modules() if self.in_mode(not mode) else ():
            module.train(mode)

    def in_mode(self, training: bool) -> list[Adapter | Shared]:
        """Those of its modules that are in training mode, or not: its layers follow those of the base, which may differ."""
        found: list[Adapter | Shared] = [each.module for each in self.installs if each.module.training == training]
        return found + [each for each in self.shared.values() if each.training == training]


class PromptCaches(dict[str, tuple[list[Tensor], list[tuple[int, int]], PromptCache]]):
    """By adapter name: the weights, their versions and places in memory, and what they gave. A copy of the model begins anew."""

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptCaches:
        return PromptCaches()

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptCaches, ()


@dataclass(eq=False)
class State:
    """The adapters of one model and the pass in effect."""

    adapters: dict[str, AttachedAdapter] = field(default_factory=dict)
    current: ForwardContext = field(default_factory=ForwardContext)
    merged: str | None = None
    originals: dict[str, Tensor] = field(default_factory=dict)
    """Base weights from before a merge, on the CPU, by name."""
    trained: tuple[str, ...] = ()
    """Adapters that require gradients."""
    base_trainable: tuple[str, ...] = ()
    """Base parameters that required gradients before the first attach."""
    site_table: SiteTable | None = None
    """The base's sites, read once, before the first attach."""
    proved: set[tuple[str, str, type]] = field(default_factory=set)
    """(host, hook, adapter class) that a probe has reached."""
    reached: set[int] | None = None
    """While probing: the containers that a forward pass has reached."""
    slots: Tensor = field(default_factory=lambda: torch.full((MAX_ROWS + 1,), BARE, dtype=torch.int32))
    """Row -> slot number for compiled graphs; `NO_ROW` behind the last routed row."""
    outer: list[ForwardContext] = field(default_factory=list)
    """The passes that open contexts will bring back, innermost last."""
    prompt_caches: PromptCaches = field(default_factory=lambda: PromptCaches())
    """Keys and values of virtual tokens, kept while the weights they come from stay the same."""
    silu_product: Callable[[Tensor, Tensor], Tensor | None] | None = None
    """A kernel for silu(e) * u, while one is in use; None for what it does not take."""
    proved_forwards: set[type[nn.Module]] = field(default_factory=set)
    """Attention classes whose forward of ours equals the installed transformers'."""
    cache_in_graph: tuple[str, PromptCache] | None = None
    """For compiled graphs, which do not know the pass: whose virtual tokens run through the model, and `ForwardContext.cache_to_fill`."""

    def __getstate__(self) -> dict[str, Any]:
        found_again = {"site_table": None, "proved": set(), "proved_forwards": set()}
        return {**self.__dict__, **found_again}

    def adapter(self, name: str) -> AttachedAdapter:
        """Look an adapter up. Raises `GraftError` with the names that exist."""
        if name not in self.adapters:
            have = ", ".join(self.adapters) or "none"
            raise GraftError(f"no adapter '{name}' is attached.{did_you_mean(name, self.adapters)} Attached: {have}")
        return self.adapters[name]

    def free_slot(self) -> int:
        """The lowest slot number not in use."""
        used = {attached.slot for attached in self.adapters.values()}
        return next(slot for slot in range(len(used) + 1) if slot not in used)

    def reroute(self, old: str, new: str | None) -> None:
        """Follow an adapter's new name, or its end (None): in the pass in effect and in those that open contexts will bring back."""
        self.outer = [_rerouted(context, old, new) for context in self.outer]
        self._put(_rerouted(self.current, old, new))
        self.trained = tuple(
            name for name in (new if each == old else each for each in self.trained) if name is not None
        )
        self.merged = new if self.merged == old else self.merged

    def enter(self, context: ForwardContext) -> None:
        """Put a pass in effect, for eager modules and for compiled graphs."""
        for name in context.names:
            self.adapter(name)
        if self.merged is not None and context.rows != self.merged:
            raise GraftError(
                f"adapter '{self.merged}' is merged into the base, so the base alone and other adapters are not to be had: "
                f"call graft.unmerge(model, '{self.merged}') first"
            )
        self._put(context)

    @contextmanager
    def entered(self, context: ForwardContext) -> Iterator[None]:
        """Put a pass in effect for a block of code; the one before comes back whatever happens."""
        before = self.current
        self.enter(context)
        self.outer.append(before)
        try:
            yield
        finally:
            self._put(self.outer.pop())

    @contextmanager
    def carrying(self, context: ForwardContext) -> Iterator[None]:
        """Put what one forward pass has found out into the pass in effect; its routing, and so the slots of compiled graphs, stay."""
        before, self.current = self.current, context
        try:
            yield
        finally:
            self.current = before

    def _put(self, context: ForwardContext) -> None:
        with torch.inference_mode(False):  # a later pass may train under the same slots
            self.current, self.slots = context, self._slots_of(context)

    def _slots_of(self, context: ForwardContext) -> Tensor:
        """A new tensor each time: a graph that ran under the last pass may still need its slots in backward."""
        if self.merged is not None:
            return torch.full_like(self.slots, BARE)
        if not isinstance(context.rows, tuple) and not context.flat:
            return torch.full_like(self.slots, BARE if context.rows is None else self.adapters[context.rows].slot)
        slots = torch.full_like(
            self.slots, NO_ROW
        )  # all of it for what compiled graphs cannot route: they refuse to run
        if isinstance(context.rows, tuple) and not context.flat and len(context.rows) <= MAX_ROWS:
            numbers = [BARE if name is None else self.adapters[name].slot for name in context.rows]
            slots[: len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
        return slots

    def slots_of_rows(self, num_rows: int, device: torch.device | None = None) -> Tensor:
        """For compiled graphs: the slot number of each row of a batch [B]. The graph raises when the pass in effect has other rows."""
        self.refuse_flat_in_graph()
        slots = self.slots if device is None else self.slots.to(device)
        slot_B = slots[:num_rows]
        fits = (slot_B != NO_ROW).all() & ((slots[num_rows] == NO_ROW) | (slots[-1] != NO_ROW))
        assert_in_graph(fits, "graft: the batch has another number of rows than the routing names")
        return slot_B

    def refuse_flat_in_graph(self) -> None:
        """For compiled graphs: raise when they cannot route the pass in effect at all."""
        assert_in_graph(
            self.slots[0] != NO_ROW, f"graft: token-flat passes and more than {MAX_ROWS} rows do not run compiled"
        )


def _rerouted(context: ForwardContext, old: str, new: str | None) -> ForwardContext:
    if old not in context.names:
        return context
    rows = tuple(new if name == old else name for name in context.rows) if isinstance(context.rows, tuple) else new
    return replace(context, rows=rows, _groups={})


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def site_table_of(model: nn.Module) -> SiteTable:
    """The sites of a base. The table of a model with adapters is read once and kept until its modules change."""
    root = unwrapped(model)
    state: State | None = root.__dict__.get("graft_state")
    if state is None:
        return SiteTable(root)
    if state.site_table is None or not state.site_table.fits():
        state.site_table, state.proved = SiteTable(root), set()
    return state.site_table


def sites_of(model: nn.Module, config: SiteRequest) -> list[Site]:
    """Return the sites of a model that an adapter's config names, with the errors of `resolve_sites`."""
    return resolve_sites(site_table_of(model), config)


def state_of(model: nn.Module) -> State:
    """The state of a model that has adapters. Raises `GraftError` when it has none."""
    state = unwrapped(model).__dict__.get("graft_state")
    if state is None:
        raise GraftError(f"this {type(model).__name__} has no adapters: call graft.attach or graft.load first")
    return state
