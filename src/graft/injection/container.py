"""The adapters at one module: a submodule `graft` that the module's substituted forward runs the base through.

Everything rests on one sentence, which `run` says: x' = before(x); h = base(x'); h' = adapt(x', h). The rest is what makes it fast
(low-rank updates in one operation) and who acts on which rows (`rows.py`).

Legend: B rows, L length, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.base import Adapter
from graft.adapters.hooks import AttentionAdapter, EmbeddingAdapter, ExpertsAdapter
from graft.architectures.four_bit import is_four_bit
from graft.errors import GraftError
from graft.injection.call import Call
from graft.injection.hooks import Hooks, HostedAdapter
from graft.injection.rows import NO_NAMES, Gather, RowGroups, Rows, SlotSelection, whole
from graft.injection.state import State
from graft.ops.low_rank import LowRankUpdate, add_low_rank, makes_its_output
from graft.ops.low_rank_linear import linear_low_rank
from graft.routing.context import AdapterContext, ForwardContext
from graft.routing.rows import RowSplit, by_rows

Base = Callable[..., Any]
OFFLOADED = "an adapter's tensors were offloaded after attach: offload the base first, then attach"


class AdapterContainer(nn.Module):
    """Container of one module's adapters: state-dict names are `<module>.graft.<adapter>.<key>.<parameter>`."""

    def __init__(self, state: State, host: nn.Module) -> None:
        super().__init__()
        self.state = state
        self._host = (host,)  # in a tuple, so that the host does not become a submodule of its own container
        self.hooks = Hooks()
        self.is_expert = False
        """Whether the host is one of a list of experts, which see only the tokens that were chosen for them."""

    @property
    def host(self) -> nn.Module:
        """The module that the container is in."""
        return self._host[0]

    def run(self, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's forward with its adapters."""
        if torch.compiler.is_compiling():
            return self._run(base, Call.of(args, kwargs), SlotSelection(self.state))
        context = self.state.current
        if not self._takes_part(context):
            return base(*args, **kwargs)
        try:
            return self._run(base, Call.of(args, kwargs), RowGroups(context))
        except RuntimeError as error:
            if any(p.device.type == "meta" for p in self.parameters()) and "meta" in str(error):
                raise GraftError(OFFLOADED) from error
            raise

    def _run(self, base: Base, call: Call, rows: Rows) -> Any:
        given = by_rows(call.x, rows.context, self.is_expert)
        x = self._before(given, rows)  # x' = before(x)
        call = call if x is given else call.with_input(x)
        linear = self._is_plain_linear(rows)
        updates, done = self.low_rank(x, rows) if linear else ([], NO_NAMES)
        h = linear_low_rank(self.host, x, updates) if updates else None  # fast path: base and updates as one node
        if h is not None:
            return call.in_shape(self.adapt(x, h, rows, done))
        output = base(*call.args, **call.kwargs)  # h = base(x')
        if not self.hooks.adapt:
            return output
        self._check(call, output, rows)
        h = by_rows(call.first(output), rows.context, self.is_expert)
        if not linear:
            updates, done = self.low_rank(h, rows)
        if updates:  # fast path: all low-rank updates in one operation
            h = add_low_rank(x.to(h.dtype), h, updates, in_place=makes_its_output(self.host))
        return call.with_first(output, self.adapt(x, h, rows, done))  # h' = adapt(x', h)

    def _takes_part(self, context: ForwardContext) -> bool:
        """Whether the pass concerns the adapters here; a probe learns that it came by."""
        if context.rows is None or self.state.merged is not None:
            return False
        if self.state.reached is not None:
            self.state.reached.add(id(self))
        return not isinstance(context.rows, str) or context.rows in self.hooks.adapt or context.rows in self.hooks.send

    def _before(self, x: Tensor, rows: Rows) -> Tensor:
        """x through every `before`, and on to the modules whose adapters read it. x: [B, L, I] -> [B, L, I]."""
        hooks = self.hooks
        if hooks.before:
            x = rows.apply(x, hooks.before, _before_step)
        for name in rows.names(hooks.send):
            for hosted in hooks.send[name]:
                if hosted.adapter.reads != "nothing":
                    hosted.x = x
        return x

    def _is_plain_linear(self, rows: Rows) -> bool:
        """Whether the host is a frozen linear layer that can be one node with low-rank updates, in eager code."""
        return rows.context is not None and (makes_its_output(self.host) or is_four_bit(self.host))

    def low_rank(self, x: Tensor, rows: Rows) -> tuple[list[LowRankUpdate], frozenset[str]]:
        """The low-rank updates of the adapters in the pass that do nothing else, and these adapters' names; none in compiled code.

        x: a tensor with the rows of the pass.
        """
        context, table = rows.context, self.hooks.adapt
        if context is None or not table:
            return [], NO_NAMES
        groups = [(context.rows, None, context.everything)] if isinstance(context.rows, str) else context.groups(x)
        updates, done = [], set()
        for name, index, ctx in groups:
            hosted = table.get(name, ())
            if len(hosted) == 1 and hosted[0].features is None and not isinstance(index, Tensor):
                update = hosted[0].adapter.low_rank(ctx, index)
                if update is not None:
                    updates.append(update)
                    done.add(name)
        return updates, frozenset(done)

    def adapt(self, x: Tensor, h: Tensor, rows: Rows, done: frozenset[str] = NO_NAMES) -> Tensor:
        """h through the adapters of the output that are not done yet. x: [B, L, I], h: [B, L, O] -> [B, L, O]."""
        h = rows.apply(
            h, self.hooks.adapt, lambda hosted, h, ctx, gather=whole: _adapt_step(hosted, x, h, ctx, gather), done
        )
        for name in rows.names(self.hooks.adapt):
            for hosted in self.hooks.adapt[name]:
                if hosted.x is not None:  # torch 2.10 compiles no checkpointed block that writes outside of itself
                    hosted.x = None  # nothing outlives the forward pass; a name may have had several runs of rows in it
        return h

    def add_second_attention(self, query_BLHD: Tensor, scaling: float, output_BLHD: Tensor) -> Tensor:
        """Add the second attention of the adapters in the pass to the module's own."""
        state = self.state
        if state.merged is not None:
            return output_BLHD
        table = self.hooks.second_attention
        rows: Rows = SlotSelection(state) if torch.compiler.is_compiling() else RowGroups(state.current)
        if state.reached is not None and any(True for _ in rows.names(table)):
            state.reached.add(id(self))

        def step(adapter: AttentionAdapter, h: Tensor, ctx: AdapterContext, gather: Gather = whole) -> Tensor:
            return h + adapter.beside(gather(query_BLHD), scaling, ctx)

        return rows.apply(output_BLHD, table, step)

    def _check(self, call: Call, output: Any, rows: Rows) -> None:
        """Refuse what cannot be computed at this module."""
        if self._runs_host and (call.has_more or isinstance(output, tuple)):
            raise GraftError(
                "an adapter that trains a whole module (kind full) is at a module with several inputs or outputs: name the layers in it"
            )
        if rows.context is None or call.first(output).is_meta:
            return
        for name in rows.names(
            self.hooks.adapt
        ):  # torch computes with tensors that have no data, and gives meaningless numbers
            for hosted in self.hooks.adapt[name]:
                if any(p is not None and p.is_meta for p in hosted.adapter._parameters.values()):
                    raise GraftError(OFFLOADED)

    @property
    def _runs_host(self) -> bool:
        return self._host_runs > 0

    _host_runs = 0
    """Adapters here that run the host again."""

    def hold(self, name: str, key: str, module: nn.Module) -> None:
        """Hold a module of an adapter. `_modules` is written directly, past nn.Module's reserved attributes, so that names are free."""
        parts = self._modules.setdefault(name, nn.Module().train(self.training))
        assert parts is not None
        parts._modules[key] = module

    def add(
        self, name: str, key: str, adapter: Adapter, features: slice | Tensor | None, remote: bool
    ) -> HostedAdapter:
        """Host an adapter of this module's output. remote: whether its input lies in another module."""
        self.hold(name, key, adapter)
        hosted = HostedAdapter(name, adapter, features, remote)
        self.hooks.add("adapt", name, hosted)
        if not remote:
            self._change_input(hosted)
        self._host_runs += adapter.runs_host
        return hosted

    def add_attention(self, name: str, key: str, adapter: AttentionAdapter) -> None:
        """Host an adapter of the attention itself. Cached tokens have seen the others, and come after them."""
        self.hold(name, key, adapter)
        if type(adapter).beside is not AttentionAdapter.beside:
            self.hooks.add("second_attention", name, adapter)
            return
        self.hooks.add("keys_values", name, adapter)
        self.hooks.keys_values[name].sort(key=lambda each: each.cached_kv)

    def add_experts(self, name: str, key: str, adapter: ExpertsAdapter) -> None:
        """Host an adapter of this module's experts."""
        self.hold(name, key, adapter)
        self.hooks.add("experts", name, adapter)

    def add_prompt(self, name: str, adapter: EmbeddingAdapter) -> None:
        """Take care of an adapter's virtual tokens, which is held elsewhere."""
        self.hooks.add("prompts", name, adapter)

    def add_output_hook(self, name: str, adapter: Adapter) -> None:
        """Let an adapter that is held elsewhere change this module's output."""
        self.hooks.add("adapt", name, HostedAdapter(name, adapter))

    def send(self, hosted: HostedAdapter) -> None:
        """Give this module's input to an adapter of a sublayer whose output is another module's."""
        self.hooks.add("send", hosted.name, hosted)
        self._change_input(hosted)

    def _change_input(self, hosted: HostedAdapter) -> None:
        """Let an adapter change this module's input, if it does such a thing; those of this module come before those of others."""
        if hosted.acts_before:
            self.hooks.add("before", hosted.name, hosted)
            self.hooks.before[hosted.name].sort(key=lambda each: each.remote)

    def remove(self, name: str) -> None:
        """Drop an adapter."""
        self._host_runs -= sum(hosted.adapter.runs_host for hosted in self.hooks.adapt.get(name, ()))
        self._modules.pop(name, None)
        self.hooks.pop(name)

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        if old in self._modules:
            self._modules[new] = self._modules.pop(old)
        self.hooks.rename(old, new)

    @property
    def empty(self) -> bool:
        """Whether nothing is left."""
        return not self._modules and not any(table for _, table in self.hooks.tables())


def _before_step(hosted: HostedAdapter, x: Tensor, ctx: AdapterContext, gather: Gather = whole) -> Tensor:
    return hosted.adapter.before(x, ctx)


def _adapt_step(hosted: HostedAdapter, x: Tensor, h: Tensor, ctx: AdapterContext, gather: Gather) -> Tensor:
    source = gather(hosted.source(x))
    if hosted.features is None:
        return hosted.adapter.adapt(source, h, ctx)
    own = RowSplit([hosted.features], h.shape[-1], -1)  # q, k or v of a fused projection
    return own.scatter(h, [hosted.adapter.adapt(source, own.gather(h, 0), ctx)])


def container_of(module: nn.Module, state: State) -> AdapterContainer:
    """The container of a module's adapters, made where there is none."""
    if "graft" not in module._modules:
        module._modules["graft"] = AdapterContainer(state, module).train(module.training)
    container = module._modules["graft"]
    assert isinstance(container, AdapterContainer)
    return container
