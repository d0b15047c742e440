"""The container of the adapters at one module: its submodule `graft`, through which the module's forward runs.

All of it computes one equation: x' = before(x); h = base(x'); h' = adapt(x', h). The rest makes it fast (low-rank updates in one
operation) and lets each adapter act on its own rows (`rows.py`).

Legend: B rows, L length, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.base import Adapter
from graft.adapters.hooks import AttentionAdapter, EmbeddingAdapter, ExpertsAdapter
from graft.errors import GraftError
from graft.injection.call import Call
from graft.injection.hooks import Hooks, HostedAdapter
from graft.injection.rows import NO_NAMES, Gather, RowGroups, Rows, SlotSelection, whole
from graft.injection.stacks import stacked_updates
from graft.injection.state import State
from graft.ops.frozen_linear import is_packed
from graft.ops.low_rank import Update, add_low_rank, makes_its_output
from graft.ops.low_rank_linear import linear_low_rank
from graft.routing.context import AdapterContext, ForwardContext
from graft.routing.rows import RowSplit, by_rows

Base = Callable[..., Any]
OFFLOADED = "an adapter's tensors were offloaded after attach: offload the base first, then attach"


class AdapterContainer(nn.Module):
    """The adapters of one module. The state dict names a parameter `<module>.graft.<adapter>.<key>.<parameter>`."""

    def __init__(self, state: State, host: nn.Module) -> None:
        super().__init__()
        self.state = state
        self._host = (host,)  # in a tuple, so that the host does not become a submodule of its own container
        self.hooks = Hooks()
        self._host_runs = 0
        """The number of adapters here that run the host's forward again."""
        self.is_expert = False
        """Whether the host is one expert in a list, which gets only the tokens that were chosen for it."""
        self.attention_input: Tensor | None = None
        """The input of an attention module while it runs, if an adapter reads it (`inputs.py`)."""

    @property
    def host(self) -> nn.Module:
        """The module that the container is in."""
        return self._host[0]

    def run(self, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's forward with its adapters.

        E.g. adapter a is one module with a `before` and an `adapt`, b is a LoRA, and the rows are ("a", "b", None). Then `before` of a runs
        on row 0, the base runs once on all three rows, b is added to row 1 of the output, and `adapt` of a runs on row 0.
        If a is a stack of two modules, both `before` run in the order of the stack, then the base, then both `adapt` in that order.
        """
        if torch.compiler.is_compiling():
            return self._run(base, Call.of(args, kwargs), SlotSelection(self.state))
        context = self.state.current
        if not self._takes_part(context):
            return base(*args, **kwargs)
        try:
            return self._run(base, Call.of(args, kwargs), RowGroups(context))
        except RuntimeError as error:
            # torch's own message for tensors on the meta device does not say what to do about it.
            if any(p.device.type == "meta" for p in self.parameters()) and "meta" in str(error):
                raise GraftError(OFFLOADED) from error
            raise

    def _run(self, base: Base, call: Call, rows: Rows) -> Any:
        given = by_rows(call.x, rows.context, self.is_expert)
        x = self._before(given, rows)  # x' = before(x)
        call = call if x is given else call.with_input(x)
        # A plain linear layer: its low-rank updates read x, so they can be computed with the base, or right after it.
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
        if (
            h.dim() == 2 < x.dim() and len(h) == x.shape[:-1].numel()
        ):  # Llama 4's experts flatten batch and length themselves
            h = h.view(*x.shape[:-1], h.shape[-1])
        if not linear:  # groups of rows are made from h, because x may have no features (an embedding reads token ids)
            updates, done = self.low_rank(h, rows)
        if updates:  # fast path: all low-rank updates in one operation
            h = add_low_rank(x.to(h.dtype), h, updates, in_place=makes_its_output(self.host))
        return call.with_first(output, self.adapt(x, h, rows, done))  # h' = adapt(x', h)

    def _takes_part(self, context: ForwardContext) -> bool:
        """Whether an adapter here serves a row. While the model is probed, record that the container was reached."""
        if context.rows is None or self.state.merged is not None:
            return False
        if self.state.reached is not None:
            self.state.reached.add(id(self))
        return not isinstance(context.rows, str) or context.rows in self.hooks.adapt or context.rows in self.hooks.send

    def _before(self, x: Tensor, rows: Rows) -> Tensor:
        """Apply every `before`, and leave x for adapters at other modules that read it. x: [B, L, I] -> [B, L, I]."""
        hooks = self.hooks
        if hooks.before:
            x = rows.apply(x, hooks.before, _before_step)
        for name in rows.names(hooks.send):
            for hosted in hooks.send[name]:
                if hosted.adapter.reads != "nothing":
                    hosted.x = x
        return x

    def _is_plain_linear(self, rows: Rows) -> bool:
        """Whether the host is a linear layer that can be one autograd node with its low-rank updates. Compiled code has no such node."""
        return rows.context is not None and (makes_its_output(self.host) or is_packed(self.host))

    def low_rank(self, x: Tensor, rows: Rows) -> tuple[list[Update], frozenset[str]]:
        """Return the low-rank updates of adapters that do nothing else here, and the names of these adapters. Compiled code has none.

        x: a tensor with all rows, from which groups of rows are made.
        """
        context, table = rows.context, self.hooks.adapt
        if context is None or not table:
            return [], NO_NAMES
        groups = [(context.rows, None, context.everything)] if isinstance(context.rows, str) else context.groups(x)
        updates, stacked = stacked_updates(self, x, context, self.state.slots_in_stacks)
        done = set(stacked)
        for name, index, ctx in groups:
            if name in stacked:
                continue
            hosted = table.get(name, ())
            # Only a whole layer, and rows that are contiguous: updates are added to views of the output.
            if len(hosted) == 1 and hosted[0].features is None and not isinstance(index, Tensor):
                update = hosted[0].adapter.low_rank(ctx, index)
                if update is not None:
                    updates.append(update)
                    done.add(name)
        return updates, frozenset(done)

    def adapt(self, x: Tensor, h: Tensor, rows: Rows, done: frozenset[str] = NO_NAMES) -> Tensor:
        """Apply every `adapt` to h, except those of the adapters in `done`. x: [B, L, I], h: [B, L, O] -> [B, L, O]."""
        h = rows.apply(
            h, self.hooks.adapt, lambda hosted, h, ctx, gather=whole: _adapt_step(hosted, x, h, ctx, gather), done
        )
        for name in rows.names(self.hooks.adapt):
            for hosted in self.hooks.adapt[name]:
                # Not earlier: in a padding-free batch an adapter may have several groups. And only where there is something to drop:
                # torch 2.10 compiles no checkpointed block that writes to an object outside of itself.
                if hosted.x is not None:
                    hosted.x = None
        return h

    def add_second_attention(self, query_BLHD: Tensor, scaling: float, output_BLHD: Tensor) -> Tensor:
        """Add the second attention of adapters to the output of the module's own."""
        state = self.state
        if state.merged is not None:
            return output_BLHD
        table = self.hooks.second_attention
        rows: Rows = SlotSelection(state) if torch.compiler.is_compiling() else RowGroups(state.current)
        if state.reached is not None and rows.names(table):
            state.reached.add(id(self))

        def step(adapter: AttentionAdapter, h: Tensor, ctx: AdapterContext, gather: Gather = whole) -> Tensor:
            x = gather(self.input_of_attention()) if adapter.reads == "input" else None
            return h + adapter.beside(gather(query_BLHD), scaling, ctx, x)

        return rows.apply(output_BLHD, table, step)

    def input_of_attention(self) -> Tensor:
        """Return the input [B, L, D] of the attention module that runs. Raises `GraftError` if other code runs its forward."""
        if self.attention_input is None:
            raise GraftError(
                f"an adapter reads the input of {type(self.host).__name__}, but other code runs the module's forward (a hook that offloads "
                "it?): attach before such hooks, or choose a kind that does not read it"
            )
        return self.attention_input

    def _check(self, call: Call, output: Any, rows: Rows) -> None:
        """Raise `GraftError` for a call that the adapters cannot compute, or would compute wrongly."""
        if self._host_runs and (call.has_more or isinstance(output, tuple)):
            raise GraftError(
                "an adapter of kind full is at a module with several inputs or outputs, but it can train only the first: "
                "name the layers in it"
            )
        if rows.context is None or call.first(output).is_meta:
            return
        # Some operations of torch accept a meta tensor beside a real one, and return meaningless numbers.
        for name in rows.names(self.hooks.adapt):
            for hosted in self.hooks.adapt[name]:
                if any(p is not None and p.is_meta for p in hosted.adapter._parameters.values()):
                    raise GraftError(OFFLOADED)

    def hold(self, name: str, key: str, module: nn.Module) -> None:
        """Register a module of an adapter as a submodule, so that it is in the state dict."""
        # `_modules` is written directly, because `register_module` refuses names that nn.Module has as attributes.
        parts = self._modules.setdefault(name, nn.Module().train(self.training))
        assert parts is not None
        parts._modules[key] = module

    def add(
        self, name: str, key: str, adapter: Adapter, features: slice | Tensor | None, remote: bool
    ) -> HostedAdapter:
        """Host an adapter of this module's output. remote: whether its input is that of another module."""
        self.hold(name, key, adapter)
        hosted = HostedAdapter(name, adapter, features, remote)
        self.hooks.add("adapt", name, hosted)
        if not remote:
            self._change_input(hosted)
        self._host_runs += adapter.runs_host
        return hosted

    def add_attention(self, name: str, key: str, adapter: AttentionAdapter) -> None:
        """Host an adapter of the attention itself.

        Virtual tokens with cached keys come last, because the model computed these keys with the other virtual tokens in view.
        """
        self.hold(name, key, adapter)
        if adapter.adds_attention:
            self.hooks.add("second_attention", name, adapter)
            return
        self.hooks.add("keys_values", name, adapter)
        self.hooks.keys_values[name].sort(key=lambda each: each.cached_kv)

    def add_experts(self, name: str, key: str, adapter: ExpertsAdapter) -> None:
        """Host an adapter of this module's experts."""
        self.hold(name, key, adapter)
        self.hooks.add("experts", name, adapter)

    def add_prompt(self, name: str, adapter: EmbeddingAdapter) -> None:
        """Let this module, which owns the blocks, put an adapter's virtual tokens before the sequence. Another module holds the adapter."""
        self.hooks.add("prompts", name, adapter)

    def add_output_hook(self, name: str, adapter: Adapter) -> None:
        """Let an adapter change this module's output. Another module holds the adapter."""
        self.hooks.add("adapt", name, HostedAdapter(name, adapter))

    def send(self, hosted: HostedAdapter) -> None:
        """Leave this module's input for an adapter of a sublayer that has its output in another module."""
        self.hooks.add("send", hosted.name, hosted)
        self._change_input(hosted)

    def _change_input(self, hosted: HostedAdapter) -> None:
        """Let an adapter change this module's input, if it has a `before`. Adapters of this module act before those of other modules."""
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
        """Whether no adapter is left."""
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
    """Return the container of a module, which is made if there is none."""
    if "graft" not in module._modules:
        module._modules["graft"] = AdapterContainer(state, module).train(module.training)
    container = module._modules["graft"]
    assert isinstance(container, AdapterContainer)
    return container
