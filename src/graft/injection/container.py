"""The adapters at one module: a submodule `graft` that the module's substituted forward runs the base through.

Eager code visits the adapters of the rows at hand only. Compiled code computes every adapter of the module and selects by a row-to-slot
tensor, so that switching and routing change data, never the graph.

Legend: B rows, L length, I input features, O output features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.base import Adapter
from graft.adapters.hooks import AttentionAdapter, EmbeddingAdapter, ExpertsAdapter
from graft.architectures.four_bit import is_four_bit
from graft.errors import GraftError
from graft.injection.state import HostedAdapter, State
from graft.ops.low_rank import LowRankUpdate, add_low_rank, makes_its_output
from graft.ops.low_rank_linear import linear_low_rank
from graft.routing.context import AdapterContext, ForwardContext
from graft.routing.rows import RowSplit, by_rows

Base = Callable[..., Any]
Take = Callable[[Tensor], Tensor]
"""Of a tensor of all rows, those of the adapter at hand."""
INPUT_NAMES = ("hidden_states", "input", "x", "inputs", "input_ids")
OFFLOADED = "an adapter's tensors were offloaded after attach: offload the base first, then attach"


class AdapterContainer(nn.Module):
    """Container of one module's adapters: state-dict names are `<module>.graft.<adapter>.<key>.<parameter>`."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state
        self.links: dict[str, list[HostedAdapter]] = {}
        """Adapters whose output is this module's."""
        self.sent: dict[str, list[HostedAdapter]] = {}
        """Adapters of sublayers whose input is this module's and whose output is another's."""
        self.attention: dict[str, list[AttentionAdapter]] = {}
        """Adapters that give this attention module virtual tokens."""
        self.beside: dict[str, list[AttentionAdapter]] = {}
        """Adapters that add a second attention to this module's."""
        self.prompts: dict[str, list[EmbeddingAdapter]] = {}
        """Virtual tokens before the sequence, of which this module, the owner of the blocks, takes care."""
        self.experts: dict[str, list[ExpertsAdapter]] = {}
        """Adapters of the experts' weights that this module holds."""
        self._acts_before = False
        """Whether any adapter here may change the input."""
        self._runs_host = False
        """Whether any adapter here runs this module again."""
        self.is_expert = False  # inside its block, as experts are

    def add(self, name: str, key: str, adapter: Adapter, rows: slice | Tensor | None) -> HostedAdapter:
        """Take an adapter module in. `_modules` is written directly, past nn.Module's reserved attributes, so that names are free."""
        self.add_shared(name, key, adapter)
        hosted = HostedAdapter(name, adapter, rows)
        self.links.setdefault(name, []).append(hosted)
        self._acts_before |= hosted.acts_before
        self._runs_host |= adapter.runs_host
        return hosted

    def add_shared(self, name: str, key: str, module: nn.Module) -> None:
        """Hold a module of an adapter."""
        parts = self._modules.setdefault(name, nn.Module().train(self.training))
        assert parts is not None
        parts._modules[key] = module

    def add_attention(self, name: str, key: str, adapter: AttentionAdapter) -> None:
        """Take an adapter of the attention itself in. Tokens that were recorded have seen the others, and stand behind them."""
        self.add_shared(name, key, adapter)
        if type(adapter).beside is not AttentionAdapter.beside:
            self.beside.setdefault(name, []).append(adapter)
            return
        self.attention.setdefault(name, []).append(adapter)
        self.attention[name].sort(key=lambda each: each.cached_kv)

    def add_experts(self, name: str, key: str, adapter: ExpertsAdapter) -> None:
        """Take an adapter of this module's experts in."""
        self.add_shared(name, key, adapter)
        self.experts.setdefault(name, []).append(adapter)

    def add_behind(self, name: str, adapter: Adapter) -> None:
        """Let an adapter that is held elsewhere change this module's output."""
        self.links.setdefault(name, []).append(HostedAdapter(name, adapter))

    def send(self, hosted: HostedAdapter) -> None:
        """Be the source of a sublayer's input."""
        hosted.remote = True
        self.sent.setdefault(hosted.name, []).append(hosted)
        self._acts_before |= hosted.acts_before

    def remove(self, name: str) -> None:
        """Drop an adapter."""
        for table in self._tables:
            table.pop(name, None)
        self._acts_before = any(
            hosted.acts_before for table in (self.links, self.sent) for links in table.values() for hosted in links
        )
        self._runs_host = any(hosted.adapter.runs_host for links in self.links.values() for hosted in links)

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        for table in self._tables:
            if old in table:
                table[new] = table.pop(old)  # pyright: ignore[reportArgumentType]
        for hosted in (*self.links.get(new, ()), *self.sent.get(new, ())):
            hosted.name = new

    @property
    def empty(self) -> bool:
        """Whether nothing is left."""
        return not any(self._tables)

    @property
    def _tables(self) -> tuple[dict[str, Any], ...]:
        return self._modules, self.links, self.sent, self.attention, self.beside, self.prompts, self.experts

    def hosts(self, name: str) -> bool:
        """Whether a forward pass under this adapter must reach this module."""
        return any(name in table for table in self._tables[1:])

    def run(self, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward: before, base, adapt."""
        if torch.compiler.is_compiling():
            return self._run(base, args, kwargs, None)
        context = self.state.current
        if context.rows is None or self.state.merged is not None:
            return base(*args, **kwargs)
        if self.state.reached is not None:
            self.state.reached.add(id(self))
        if isinstance(context.rows, str) and context.rows not in self.links and context.rows not in self.sent:
            return base(*args, **kwargs)
        try:
            return self._run(base, args, kwargs, context)
        except RuntimeError as error:
            if any(p.device.type == "meta" for p in self.parameters()) and "meta" in str(error):
                raise GraftError(OFFLOADED) from error
            raise

    def _run(self, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any], context: ForwardContext | None) -> Any:
        key = None if args else next(name for name in (*INPUT_NAMES, *kwargs) if name in kwargs)
        given = args[0] if key is None else kwargs[key]
        x = by_rows(given, context, self.is_expert)
        new_x = self._before(x, context)
        if new_x is not x:
            changed = new_x.reshape(given.shape)
            if key is None:
                args = (changed, *args[1:])
            else:
                kwargs = {**kwargs, key: changed}
        host = None if context is None else self._linear_host()
        updates, left = ([], self.links) if host is None else self.low_rank(new_x, context)
        if host is not None and updates and (h := linear_low_rank(host, new_x, updates)) is not None:
            return self.adapt(new_x, h, left, context).reshape(*given.shape[:-1], h.shape[-1])
        output = base(*args, **kwargs)
        if not self.links:
            return output
        if self._runs_host and (len(args) + len(kwargs) > 1 or isinstance(output, tuple)):
            raise GraftError(
                "an adapter that trains a whole module (kind full) is at a module with several inputs or outputs: name the layers in it"
            )
        first = output[0] if isinstance(output, tuple) else output
        if context is not None and not first.is_meta:
            self._refuse_offloaded(context)
        h = by_rows(first, context, self.is_expert)
        if host is None:
            updates, left = self.low_rank(h, context)
        if updates:
            own = all(makes_its_output(hosted.adapter.around.host) for links in self.links.values() for hosted in links)
            h = add_low_rank(new_x.to(h.dtype), h, updates, in_place=own)
        h = self.adapt(new_x, h, left, context).reshape(first.shape)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _linear_host(self) -> nn.Module | None:
        """The module, where it is a linear layer that can be one node with low-rank terms."""
        hosts = (hosted.adapter.around.host for links in self.links.values() for hosted in links)
        host = next((each for each in hosts if each._modules.get("graft") is self), None)
        return host if host is not None and (makes_its_output(host) or is_four_bit(host)) else None

    def _refuse_offloaded(self, context: ForwardContext) -> None:
        """torch computes with tensors that have no data, and gives numbers that mean nothing."""
        for name in context.names:
            for hosted in self.links.get(name, ()):
                if any(p is not None and p.is_meta for p in hosted.adapter._parameters.values()):
                    raise GraftError(OFFLOADED)

    def _before(self, x: Tensor, context: ForwardContext | None) -> Tensor:
        if self._acts_before:
            own = {name: [hosted for hosted in links if not hosted.remote] for name, links in self.links.items()}
            for table in (own, self.sent):
                x = self._change(x, table, context, lambda hosted, x, ctx, **_: hosted.adapter.before(x, ctx))
        for name, links in self.sent.items():
            if context is None or name in context.names:
                for hosted in links:
                    hosted.x = None if hosted.adapter.reads == "nothing" else x
        return x

    def low_rank(
        self, h: Tensor, context: ForwardContext | None
    ) -> tuple[list[LowRankUpdate], Mapping[str, list[HostedAdapter]]]:
        """The adapters of the pass that are nothing but a low-rank term, which one operation adds all together; and the others.

        h: a tensor with the rows of the pass.
        """
        if context is None:
            return [], self.links
        everyone = [(context.rows, None, context.everything)] if isinstance(context.rows, str) else context.groups(h)
        updates, left = [], dict(self.links)
        for name, index, ctx in everyone:
            links = self.links.get(name, ())
            if len(links) == 1 and links[0].rows is None and not isinstance(index, Tensor):
                update = links[0].adapter.low_rank(ctx, index)
                if update is not None:
                    updates.append(update)
                    left.pop(name, None)
        return updates, left if updates else self.links

    def adapt(
        self, x: Tensor, h: Tensor, table: Mapping[str, list[HostedAdapter]], context: ForwardContext | None
    ) -> Tensor:
        """h through the adapters of a table."""

        def step(hosted: HostedAdapter, h: Tensor, ctx: AdapterContext, take: Take = _whole) -> Tensor:
            source = take(hosted.source(x))
            if hosted.rows is None:
                return hosted.adapter.adapt(source, h, ctx)
            own = RowSplit([hosted.rows], h.shape[-1], -1)
            return own.put(h, [hosted.adapter.adapt(source, own.take(h, 0), ctx)])

        h = self._change(h, table, context, step)
        for links in self.links.values():
            for hosted in links:
                hosted.x = None  # nothing outlives the forward pass; a name may have had several runs of rows in it
        return h

    def add_beside(self, query_BLHD: Tensor, scaling: float, output_BLHD: Tensor) -> Tensor:
        """The module's own attention with the second attention of the adapters in the pass added."""
        if self.state.merged is not None:
            return output_BLHD
        context = None if torch.compiler.is_compiling() else self.state.current
        if (
            self.state.reached is not None
            and context is not None
            and any(name in context.names for name in self.beside)
        ):
            self.state.reached.add(id(self))

        def step(adapter: AttentionAdapter, h: Tensor, ctx: AdapterContext, take: Take = _whole) -> Tensor:
            return h + adapter.beside(take(query_BLHD), scaling, ctx)

        return self._change(output_BLHD, self.beside, context, step)

    def _change(
        self, h: Tensor, table: Mapping[str, Sequence[Any]], context: ForwardContext | None, step: Callable[..., Tensor]
    ) -> Tensor:
        """Apply `step` of each adapter of a table to its own rows of h."""
        if not table:
            return h
        if context is None:
            return self._select(h, table, step)
        if isinstance(context.rows, str):
            for hosted in table.get(context.rows, ()):
                h = step(hosted, h, context.everything)
            return h
        found = [group for group in context.groups(h) if table.get(group[0])]
        if not found:
            return h
        dim = 1 if context.flat else 0
        cut, pieces = RowSplit([index for _, index, _ in found], h.shape[dim], dim), []
        for number, (name, _, ctx) in enumerate(found):
            piece = cut.take(h, number)
            for hosted in table[name]:
                piece = step(hosted, piece, ctx, take=functools.partial(cut.take, number=number))
            pieces.append(piece)
        return cut.put(h, pieces)

    def _select(self, h: Tensor, table: Mapping[str, Sequence[Any]], step: Callable[..., Tensor]) -> Tensor:
        """For compiled code: every adapter on all rows, selected by slot number; one graph for every routing."""
        slot_B = self.state.slots_of_rows(h.shape[0], h.device)
        there = {name: links for name, links in table.items() if not self.state.adapters[name].aside}
        for name, links in there.items():
            chosen = (slot_B == self.state.adapters[name].slot).view((-1,) + (1,) * (h.dim() - 1))
            for hosted in links:
                h = torch.where(chosen, step(hosted, h, AdapterContext()), h)
        return h


def _whole(x: Tensor) -> Tensor:
    return x


def container_of(module: nn.Module, state: State) -> AdapterContainer:
    """The container of a module's adapters, made where there is none."""
    if "graft" not in module._modules:
        module._modules["graft"] = AdapterContainer(state).train(module.training)
    container = module._modules["graft"]
    assert isinstance(container, AdapterContainer)
    return container
