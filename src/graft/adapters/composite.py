"""A kind made of other kinds: what it asks of the inner one, and what it hands on to it.

A composite such as a gate or a mixture takes an inner config, `of`, builds one or more of its modules, and uses them in its own `adapt`,
`before`, `keys_values` and so on. Everything else reaches the inner modules by one declaration, `inner()`: installing, shared modules,
penalties, learning-rate factors, what happens after a step, saving, counting. Nothing in Graft asks the outer module alone.

    class Gate(Composite):
        kind: Literal["gate"] = "gate"

        def build(self, spec: SiteSpec) -> Adapter:
            return wrap(spec, self.of.build(spec), around=GateAround)

    class GateAround(Wrapper):
        def adapt(self, x, h, ctx):
            return h + self.gate(x) * (self.of.adapt(x, h, ctx) - h)

A composite acts where its inner kind acts, so it has to be of the same hook: `wrap` chooses among `Wrapper`, `WrapsAttention`,
`WrapsPrompt` and `WrapsExperts`, or the subclasses that a kind gives.

Legend: [..., I] input features, [..., O] output features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from graft.adapters.base import Adapter, AdapterConfig, Shared
from graft.adapters.hooks import ALL_ROWS, AttentionAdapter, EmbeddingAdapter, ExpertsAdapter
from graft.adapters.made_of_kinds import MadeOfKinds
from graft.adapters.surroundings import Surroundings
from graft.architectures.site import SiteSpec, SiteType
from graft.errors import GraftError
from graft.ops.low_rank_update import LowRankUpdate
from graft.routing.context import AdapterContext


class Composite(MadeOfKinds):
    """The settings of every kind made of one other kind."""

    takes_several: ClassVar[bool] = False
    """Whether `of` may be several adapters under one name, for a kind with a part of its own for each (`parts`)."""

    of: AdapterConfig
    """The inner adapter: a mapping with `kind`, or the name of a kind."""
    sites: str | tuple[str, ...] = Field(default=(), validate_default=False)
    """Where to attach; by default where `of` says."""

    @model_validator(mode="before")
    @classmethod
    def _one_place_for_sites(cls, value: Any) -> Any:
        """Parse `of`, and give it and the composite the same sites."""
        from graft.adapters.parsing import parse

        if not isinstance(value, Mapping) or "of" not in value:
            return value
        kind, given = cls.model_fields["kind"].default, value["of"]
        inner = parse(given)
        if not isinstance(inner, AdapterConfig) or inner.parts() != (inner,) and not cls.takes_several:
            what = "a preset" if not isinstance(inner, AdapterConfig) else "a list of adapters"
            raise GraftError(f"{kind}: `of` takes one adapter, but it is {what}: write a list with a {kind} of each")
        sites = value.get("sites") or inner.sites
        sites = tuple(sites) if isinstance(sites, list) else sites
        own = isinstance(given, Mapping) and "sites" in given
        if own and value.get("sites") and inner.sites != sites:
            raise GraftError(
                f"{kind}: sites are given twice, as {sites!r} and, in `of`, as {inner.sites!r}: remove one"
            )
        return {**value, "of": inner.model_copy(update={"sites": sites}), "sites": sites}

    @property
    def takes(self) -> frozenset[SiteType]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.of.takes

    @property
    def replaces(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.of.replaces

    @property
    def starts_from(self) -> tuple[int, ...]:
        return self.of.starts_from

    def build_shared(self, specs: Sequence[SiteSpec]) -> Shared | None:
        return self.of.build_shared(specs)


class CompositeAdapter(Adapter):
    """A module with adapter modules inside it, as submodules of the given names."""

    def __init__(self, spec: SiteSpec, inner: Mapping[str, Adapter]) -> None:
        super().__init__(spec)
        self._names = tuple(inner)
        for name, module in inner.items():
            self.add_module(name, module)
            module.__dict__["_outer"] = (self,)  # in a tuple, so that it does not become a submodule
        first = next(iter(inner.values()))
        self.reads = first.reads
        self.reads_mask = any(module.reads_mask for module in inner.values())
        self.runs_host = any(module.runs_host for module in inner.values())

    def inner(self) -> Mapping[str, Adapter]:
        return {name: self.get_submodule(name) for name in self._names}  # pyright: ignore[reportReturnType]

    @property
    def acts_before(self) -> bool:
        return any(module.acts_before for module in self.inner().values())

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        for module in self.inner().values():
            module.on_install(around)

    def share(self, shared: Shared) -> None:
        super().share(shared)
        for module in self.inner().values():
            module.share(shared)

    def check_filled(self) -> None:
        for module in self.inner().values():
            module.check_filled()

    def to_save(self) -> dict[str, Tensor]:
        inside = tuple(f"{name}." for name in self._names)
        own = {key: tensor for key, tensor in super().to_save().items() if not key.startswith(inside)}
        return own | {
            f"{name}.{key}": tensor for name, module in self.inner().items() for key, tensor in module.to_save().items()
        }


class Wrapper(CompositeAdapter):
    """A composite of one module, `of`. By itself it computes what that module computes."""

    of: Adapter

    def __init__(self, spec: SiteSpec, of: Adapter) -> None:
        super().__init__(spec, {"of": of})

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return self.of.adapt(x, h, ctx)

    def before(self, x: Tensor, ctx: AdapterContext) -> Tensor:
        return self.of.before(x, ctx)

    def output_read(self, x: Tensor, h: Tensor) -> Tensor:
        return self.of.output_read(x, h)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.of.fold(weight, bias)

    def fold_input(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.of.fold_input(weight, bias)

    def fold_all(self) -> dict[str, Tensor] | None:
        return self.of.fold_all()

    def low_rank(self, ctx: AdapterContext, rows: slice | None = None) -> LowRankUpdate | None:
        return self.of.low_rank(ctx, rows)

    @property
    def follows(self) -> Adapter | None:
        holder = self.of.follows
        return None if holder is None else holder.__dict__["_outer"][0]

    @property
    def replaces_rows(self) -> Sequence[int]:
        return self.of.replaces_rows


class WrapsAttention(Wrapper, AttentionAdapter):
    """A wrapper of an adapter in an attention module."""

    of: AttentionAdapter

    def __init__(self, spec: SiteSpec, of: AttentionAdapter) -> None:
        super().__init__(spec, of)
        self.position_shift, self.windowed, self.per_row = of.position_shift, of.windowed, of.per_row
        self.adapts_output_projection = of.adapts_output_projection

    @property
    def adds_attention(self) -> bool:
        return self.of.adds_attention

    def start_at(self, keys: Tensor, values: Tensor) -> None:
        self.of.start_at(keys, values)

    def keys_values(self, x: Tensor | None = None, ctx: AdapterContext = ALL_ROWS) -> tuple[Tensor, Tensor]:
        return self.of.keys_values(x, ctx)

    def beside(self, query: Tensor, scaling: float, ctx: AdapterContext, x: Tensor | None = None) -> Tensor:
        return self.of.beside(query, scaling, ctx, x)


class WrapsPrompt(Wrapper, EmbeddingAdapter):
    """A wrapper of virtual tokens before the sequence."""

    of: EmbeddingAdapter

    def __init__(self, spec: SiteSpec, of: EmbeddingAdapter) -> None:
        super().__init__(spec, of)
        self.tokens, self.windowed, self.after_positions = of.tokens, of.windowed, of.after_positions

    def prompt(self) -> Tensor:
        return self.of.prompt()


class WrapsExperts(Wrapper, ExpertsAdapter):
    """A wrapper of an adapter of the weights of experts."""

    of: ExpertsAdapter

    def changed(self, weight: Tensor) -> Tensor:
        return self.of.changed(weight)


DOES: dict[type[Adapter], str] = {
    EmbeddingAdapter: "puts tokens before the sequence",
    AttentionAdapter: "acts inside an attention (prefix, llama-adapter)",
    ExpertsAdapter: "changes the weights of experts",
    Adapter: "acts around a module (lora, series, parallel, ia3, ...)",
}
"""What the adapters of each hook do, for messages."""


def wrap(
    spec: SiteSpec,
    of: Adapter,
    around: type[Wrapper] | None = Wrapper,
    attention: type[WrapsAttention] | None = WrapsAttention,
    prompt: type[WrapsPrompt] | None = WrapsPrompt,
    experts: type[WrapsExperts] | None = WrapsExperts,
    **settings: Any,
) -> Adapter:
    """Make the wrapper of an inner module that acts by the same hook. settings: further arguments of its constructor.

    Raises `GraftError` where the wrapper for this hook is None.
    """
    by_hook: dict[type[Adapter], type[Any] | None] = {
        EmbeddingAdapter: prompt, AttentionAdapter: attention, ExpertsAdapter: experts, Adapter: around,
    }  # fmt: skip
    hook = next(hook for hook in by_hook if isinstance(of, hook))
    chosen = by_hook[hook]
    if chosen is None:
        kind = getattr(settings.get("config"), "kind", "this composite")
        taken = " or ".join(DOES[each] for each, wrapper in by_hook.items() if wrapper is not None)
        raise GraftError(f"{kind}: what is in it {DOES[hook]} at '{spec.name}', but it takes an adapter that {taken}")
    return chosen(spec, of, **settings)
