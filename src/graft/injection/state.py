"""What Graft knows of one model: its adapters, their sites, and the current forward context.

A model has one `State`, to which every module with adapters refers. A deep copy or a pickle of the model includes it.
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
from graft.injection.prompt_caches import PromptCaches
from graft.routing.context import ForwardContext, PromptCache
from graft.routing.stacked import Slots

MAX_ROWS = 4096
"""The most rows that a compiled graph can route."""
BARE, NO_ROW = -1, -2
"""Slot numbers of a row that the bare base serves, and of a row that does not exist."""
SHARED = "shared"
"""A module that all sites of an adapter share has this key, followed by the number of the stack's part."""


@dataclass(frozen=True, eq=False)
class Installed:
    """A module of an adapter, and its site."""

    site: Site
    key: str
    """Its name in the host's container."""
    config: AdapterConfig
    module: Adapter

    @property
    def changes_weight(self) -> bool:
        """Whether all that it does is a change of the weight, and bias, of a linear layer."""
        return self.site.type == "linear" and self.config.folds


@dataclass(eq=False)
class AttachedAdapter:
    """An attached adapter: its config and its modules."""

    config: AdapterConfig
    slot: int
    """Its number in compiled graphs."""
    installs: list[Installed] = field(default_factory=list)
    shared: dict[str, Shared] = field(default_factory=dict)
    """The modules that all its sites share, by their names in the root's container."""
    offloaded: bool = False
    """Whether its tensors are in a file for now and empty here. No forward context names it, and compiled graphs leave it out."""

    def modules(self) -> Iterator[tuple[str, AdapterModule]]:
        """Yield (path, module) of every module of the adapter: one per site, then the shared ones.

        The path is the host's, followed by the key: `model.layers.0.mlp.up_proj.linear`.
        """
        for installed in self.installs:
            yield f"{installed.site.module}.{installed.key}".lstrip("."), installed.module
        yield from self.shared.items()

    @property
    def requires_grad(self) -> bool:
        """Whether its parameters require gradients. They do so together, so the first one answers for all."""
        first = self.installs[0].module if self.installs else None
        own = next(iter(first._parameters.values()), None) if first is not None else None
        if (
            own is not None
        ):  # nearly every kind; `parameters()` takes ten times as long, once for each adapter of the model
            return own.requires_grad
        return next((p.requires_grad for _, module in self.modules() for p in module.parameters()), False)

    def train(self, mode: bool) -> None:
        """Put its modules into training mode or not."""
        for _, module in self.modules() if self.in_mode(not mode) else ():
            module.train(mode)

    def in_mode(self, training: bool) -> list[Adapter | Shared]:
        """Those of its modules that are in training mode, or not: its layers follow those of the base, which may differ."""
        found: list[Adapter | Shared] = [each.module for each in self.installs if each.module.training == training]
        return found + [each for each in self.shared.values() if each.training == training]


@dataclass(frozen=True, eq=False)
class Combination:
    """Several adapters that serve rows together, and their number in compiled graphs."""

    weights: dict[str, float]
    """Adapter -> weight, in the order in which they act."""
    slot: int


@dataclass(eq=False)
class State:
    """The adapters of one model and the current forward context."""

    adapters: dict[str, AttachedAdapter] = field(default_factory=dict)
    combinations: dict[str, Combination] = field(default_factory=dict)
    """Adapters that were asked for together, by the name that rows carry: "style+0.5*task"."""
    current: ForwardContext = field(default_factory=ForwardContext)
    merged: str | None = None
    originals: dict[str, Tensor] = field(default_factory=dict)
    """Name -> base weight from before the merge, on the CPU."""
    before_merge: tuple[ForwardContext, tuple[str, ...]] | None = None
    """While an adapter is merged: the context that was current before, and the adapters that trained."""
    trained: tuple[str, ...] = ()
    """The adapters with parameters that require gradients."""
    base_trainable: tuple[str, ...] = ()
    """The base's parameters that required gradients before the first attach."""
    site_table: SiteTable | None = None
    """The base's sites, read before the first attach and again when its modules change."""
    proved: set[tuple[str, str, type]] = field(default_factory=set)
    """Each (host, table, adapter class) that a probe has reached."""
    reached: set[int] | None = None
    """While the model is probed: the ids of the containers that a forward pass has reached."""
    slots: Tensor = field(default_factory=lambda: torch.full((MAX_ROWS + 1,), BARE, dtype=torch.int32))
    """Row -> slot number, for compiled graphs. After the last routed row comes `NO_ROW`."""
    outer: list[ForwardContext] = field(default_factory=list)
    """The contexts that open `with` blocks will restore, innermost last."""
    prompt_caches: PromptCaches = field(default_factory=PromptCaches)
    """The keys and values of virtual tokens, kept while the weights that they come from stay the same."""
    silu_product: Callable[[Tensor, Tensor], Tensor | None] | None = None
    """A kernel for silu(e) * u, while one is in use. It returns None for tensors that it does not accept."""
    proved_forwards: set[type[nn.Module]] = field(default_factory=set)
    """Attention classes for which Graft's forward was proved equal to that of the installed transformers."""
    slots_in_stacks: Slots = field(default_factory=dict)
    """Adapter -> the stack that its factors lie in while it trains, and its slot there."""
    cache_in_graph: tuple[str, PromptCache] | None = None
    """The adapter with the virtual tokens that run through the model, and its `cache_to_fill`, for compiled graphs: they see no context."""

    def __getstate__(self) -> dict[str, Any]:
        found_again = {"site_table": None, "proved": set(), "proved_forwards": set(), "slots_in_stacks": {}}
        return {**self.__dict__, **found_again}

    def sites(self, root: nn.Module) -> SiteTable:
        """Return the sites of the base. They are read again, and nothing counts as proved, when its modules or their hooks have changed."""
        if self.site_table is None or not self.site_table.fits():
            self.site_table, self.proved = SiteTable(root), set()
        return self.site_table

    def adapter(self, name: str) -> AttachedAdapter:
        """Look up an adapter. Raises `GraftError` with the names that exist."""
        if not isinstance(name, str):
            raise GraftError(
                f"this takes the name of one adapter; given: {name!r}. graft.combine makes one adapter of several"
            )
        if name not in self.adapters:
            have = ", ".join(self.adapters) or "none"
            raise GraftError(f"no adapter '{name}' is attached.{did_you_mean(name, self.adapters)} Attached: {have}")
        return self.adapters[name]

    def served(self, name: str) -> AttachedAdapter | Combination:
        """Look up what serves the rows of this name: an adapter, or several together. Raises `GraftError` as `adapter` does."""
        return self.combinations.get(name) or self.adapter(name)

    @property
    def names_in_use(self) -> set[str]:
        """What serves rows in the current context, and in those that will be restored."""
        waiting = [] if self.before_merge is None else [self.before_merge[0]]
        return {name for context in (self.current, *self.outer, *waiting) for name in context.names}

    def in_memory(self, name: str) -> bool:
        """Whether the tensors of what serves the rows of this name are in memory."""
        served = self.served(name)
        names = (name,) if isinstance(served, AttachedAdapter) else tuple(served.weights)
        return not any(self.adapters[each].offloaded for each in names)

    def free_slot(self) -> int:
        """Return the lowest slot number that is not in use."""
        used = {served.slot for served in (*self.adapters.values(), *self.combinations.values())}
        return next(slot for slot in range(len(used) + 1) if slot not in used)

    def reroute(self, old: str, new: str | None) -> None:
        """Replace an adapter's name, or its rows by the bare base (None), in the current context and in those that will be restored."""
        self.outer = [_rerouted(context, old, new) for context in self.outer]
        self._put(_rerouted(self.current, old, new))
        self.trained = _renamed(self.trained, old, new)
        if self.before_merge is not None:
            context, trained = self.before_merge
            self.before_merge = _rerouted(context, old, new), _renamed(trained, old, new)
        self.merged = new if self.merged == old else self.merged

    def enter(self, context: ForwardContext) -> None:
        """Make a context the current one, for eager modules and for compiled graphs. Raises `GraftError` if an adapter is not available."""
        for name in context.names:
            self.served(name)
        if self.merged is not None and context.rows != self.merged:
            raise GraftError(
                f"adapter '{self.merged}' is merged into the base, so neither the base alone nor other adapters can run: "
                f"call graft.unmerge(model, '{self.merged}') first"
            )
        self._put(context)

    @contextmanager
    def entered(self, context: ForwardContext) -> Iterator[None]:
        """Make a context the current one for a block of code. The one before is restored, also after an error."""
        before = self.current
        self.enter(context)
        self.outer.append(before)
        try:
            yield
        finally:
            self._put(self.outer.pop())

    @contextmanager
    def carrying(self, context: ForwardContext) -> Iterator[None]:
        """Replace the current context for a block of code by one with the same routing, so that the slots of compiled graphs stay."""
        before, self.current = self.current, context
        try:
            yield
        finally:
            self.current = before

    def _put(self, context: ForwardContext) -> None:
        with torch.inference_mode(False):  # a later pass with the same slots may train
            self.current, self.slots = context, self._slots_of(context)

    def _slots_of(self, context: ForwardContext) -> Tensor:
        """Return the slots of a context, in a new tensor: the backward of an earlier pass may still need the old one.

        E.g. with slots a: 0 and b: 1, the rows ("a", None, "b") give [0, -1, 1, -2, -2, ...].
        """
        if self.merged is not None:
            return torch.full_like(self.slots, BARE)
        if not isinstance(context.rows, tuple) and not context.flat:
            return torch.full_like(self.slots, BARE if context.rows is None else self.served(context.rows).slot)
        # If all slots are NO_ROW (a padding-free batch, or too many rows), compiled graphs refuse to run.
        slots = torch.full_like(self.slots, NO_ROW)
        if isinstance(context.rows, tuple) and not context.flat and len(context.rows) <= MAX_ROWS:
            numbers = [BARE if name is None else self.served(name).slot for name in context.rows]
            slots[: len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
        return slots

    def slots_of_rows(self, num_rows: int, device: torch.device | None = None) -> Tensor:
        """Return the slot number of each row of a batch [B], in a compiled graph. The graph raises if the routing has other rows."""
        self.refuse_flat_in_graph()
        slots = self.slots if device is None else self.slots.to(device)
        slot_B = slots[:num_rows]
        # All rows of the batch have a slot, and the row after the last has none, unless one adapter serves all rows (no slot is NO_ROW).
        fits = (slot_B != NO_ROW).all() & ((slots[num_rows] == NO_ROW) | (slots[-1] != NO_ROW))
        assert_in_graph(fits, "graft: the batch has another number of rows than the routing names")
        return slot_B

    def refuse_flat_in_graph(self) -> None:
        """Raise, in a compiled graph, if it cannot route the current context at all."""
        assert_in_graph(
            self.slots[0] != NO_ROW, f"graft: padding-free batches and more than {MAX_ROWS} rows do not run compiled"
        )


def _renamed(names: tuple[str, ...], old: str, new: str | None) -> tuple[str, ...]:
    return tuple(name for name in (new if each == old else each for each in names) if name is not None)


def _rerouted(context: ForwardContext, old: str, new: str | None) -> ForwardContext:
    if old not in context.names:
        return context
    rows = tuple(new if name == old else name for name in context.rows) if isinstance(context.rows, tuple) else new
    return replace(context, rows=rows, _groups={})


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of DDP and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def site_table_of(model: nn.Module) -> SiteTable:
    """Return the sites of a model. The table of a model with adapters is kept until its modules change."""
    root = unwrapped(model)
    state: State | None = root.__dict__.get("graft_state")
    return SiteTable(root) if state is None else state.sites(root)


def sites_of(model: nn.Module, config: SiteRequest) -> list[Site]:
    """Return the sites of a model that an adapter's config names, with the errors of `resolve_sites`."""
    return resolve_sites(site_table_of(model), config)


def state_of(model: nn.Module) -> State:
    """Return the state of a model with adapters. Raises `GraftError` if it has none."""
    state = unwrapped(model).__dict__.get("graft_state")
    if state is None:
        raise GraftError(f"this {type(model).__name__} has no adapters: call graft.attach or graft.load first")
    return state
