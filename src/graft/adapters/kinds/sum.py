"""A sum of adapters at one site: each changes the base's own input and output, and what they change is added.

    h' = h + (adapt_1(x, h) - h) + (adapt_2(x, h) - h) + ...        x' = x + (before_1(x) - x) + (before_2(x) - x) + ...

In a stack (a list) each part at a site gets the output of the one before. In a sum all get the same x and h, and their order does not
matter.
Where all parts fold, the sum does: W' = W + (W_1 - W) + (W_2 - W) + ...

Legend: I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from graft.adapters.base import Adapter, AdapterConfig, AdapterModule, CannotFold, Shared
from graft.adapters.composite import CompositeAdapter
from graft.adapters.hooks import AttentionAdapter, EmbeddingAdapter, ExpertsAdapter
from graft.adapters.made_of_kinds import MadeOfKinds
from graft.adapters.nesting import placed
from graft.adapters.surroundings import Surroundings
from graft.architectures.site import SiteSpec, SiteType
from graft.errors import GraftError
from graft.routing.context import AdapterContext

APART = 1 << 32
"""How far the numbers of a site in two parts are apart, so that each part draws dropout of its own."""


class Sum(MadeOfKinds):
    """Several adapters at one site that read the same input, and whose changes are added."""

    suits = (
        "Two forms of change in one place, such as a low-rank and a nonlinear one, neither of which reads the other."
    )

    kind: Literal["sum"] = "sum"
    of: tuple[AdapterConfig, ...] = Field(min_length=2)
    """The parts: mappings with `kind`, or names of kinds."""
    sites: str | tuple[str, ...] = Field(default=(), validate_default=False)
    """Where all parts attach; by default where they say, if they say the same."""

    @model_validator(mode="before")
    @classmethod
    def _parts_at_one_place(cls, value: Any) -> Any:
        from graft.adapters.parsing import parse

        if not isinstance(value, Mapping) or "of" not in value:
            return value
        given = value["of"]
        if not isinstance(given, list | tuple):
            raise GraftError(f"`of` takes a list of adapters; given: {given!r}")
        if len(given) < 2:
            raise GraftError(f"a sum has at least 2 parts; given: {len(given)}")
        parts = [parse(each) for each in given]
        for part in parts:
            if not isinstance(part, AdapterConfig) or part.parts() != (part,):
                raise GraftError("each part is one adapter, and not a preset or a list: write its adapters out")
            if part.takes <= {"attention", "experts"}:
                raise GraftError(
                    f"kind {part.kind} does not act around a module's input and output, so it has nothing to add: write a list (a stack)"
                )
            if part.replaces:
                raise GraftError(f"kind {part.kind} replaces weights of the base, so it has no change to add")
        sites = value.get("sites") or parts[0].sites  # pyright: ignore[reportAttributeAccessIssue]
        sites = tuple(sites) if isinstance(sites, list) else sites
        told = {part.sites for part, each in zip(parts, given, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
                if not value.get("sites") or (isinstance(each, Mapping) and "sites" in each)}  # fmt: skip
        if told - {sites}:
            raise GraftError(
                f"its parts act at one site, but they are at {', '.join(sorted(map(repr, told | {sites})))}: give `sites` once, "
                "beside `of`, or write a list (a stack), whose parts have sites of their own"
            )
        return {**value, "of": tuple(placed(part, sites) for part in parts), "sites": sites}  # pyright: ignore[reportArgumentType]

    @classmethod
    def example(cls) -> dict[str, Any]:
        return {
            "kind": "sum",
            "of": [{"kind": "lora", "rank": 8}, {"kind": "parallel", "bottleneck": 16}],
            "sites": "mlp.down",
        }

    @property
    def takes(self) -> frozenset[SiteType]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset.intersection(*(part.takes for part in self.of)) - {"attention", "experts"}

    @property
    def folds(self) -> bool:
        return all(part.folds for part in self.of)

    def build_shared(self, specs: Sequence[SiteSpec]) -> Shared | None:
        found = {
            str(number): part.build_shared([_of_part(spec, number) for spec in specs])
            for number, part in enumerate(self.of)
        }
        own = {name: shared for name, shared in found.items() if shared is not None}
        return SharedOfParts(own) if own else None

    def build(self, spec: SiteSpec) -> Adapter:
        return SumAdapter(spec, [part.build(_of_part(spec, number)) for number, part in enumerate(self.of)])


def _of_part(spec: SiteSpec, number: int) -> SiteSpec:
    return replace(spec, index=spec.index + number * APART)


class SharedOfParts(Shared):
    """What the sites of each part share, by the part's number."""

    def __init__(self, parts: Mapping[str, Shared]) -> None:
        super().__init__()
        self._names = tuple(parts)
        for name, module in parts.items():
            self.add_module(name, module)

    def inner(self) -> Mapping[str, AdapterModule]:
        return {name: self.get_submodule(name) for name in self._names}  # pyright: ignore[reportReturnType]


class SumAdapter(CompositeAdapter):
    """The parts at one site, named by their numbers."""

    def __init__(self, spec: SiteSpec, parts: Sequence[Adapter]) -> None:
        super().__init__(spec, {str(number): part for number, part in enumerate(parts)})
        self.site = spec.module
        if elsewhere := [
            type(part).__name__
            for part in parts
            if isinstance(part, AttentionAdapter | EmbeddingAdapter | ExpertsAdapter)
        ]:
            raise GraftError(
                f"sum: {elsewhere[0]} does not act around a module's input and output, so there is nothing to add: write a list (a stack)"
            )
        reads = {part.reads for part in parts} - {"nothing"}
        if len(reads) > 1:
            raise GraftError(
                f"sum: at '{spec.name}' one part reads the site's input and another the residual stream; in a sum all read the same"
            )
        self.reads = "nothing"
        for part in parts:
            self.reads = self.reads if part.reads == "nothing" else part.reads

    @property
    def parts(self) -> list[Adapter]:
        """The parts, in their order."""
        return list(self.inner().values())  # pyright: ignore[reportReturnType]

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        if any(part.follows is not None for part in self.parts):
            raise GraftError(
                f"sum: '{self.site}' shares its weight with another site of a part: name one of the two sites"
            )

    def share(self, shared: Shared) -> None:
        for name, each in shared.inner().items():
            self.get_submodule(name).share(each)  # pyright: ignore[reportCallIssue]

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        changed = [each for part in self.parts if (each := part.adapt(x, h, ctx)) is not h]
        return _added(h, changed)

    def before(self, x: Tensor, ctx: AdapterContext) -> Tensor:
        changed = [each for part in self.parts if (each := part.before(x, ctx)) is not x]
        return _added(x, changed)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return _folded(weight, bias, [part.fold(weight, bias) for part in self.parts])

    def fold_input(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return _folded(weight, bias, [part.fold_input(weight, bias) for part in self.parts])

    def fold_all(self) -> dict[str, Tensor] | None:
        found = [part.fold_all() for part in self.parts]
        if all(each is None for each in found):
            return None
        if any(each is None for each in found):
            raise CannotFold(
                f"sum: at '{self.site}' one part changes a whole module and another its linear layer, which do not merge"
            )
        own = {name: self.around.host.get_parameter(name).detach() for each in found for name in each or ()}
        return {
            name: _added(base.to(torch.promote_types(base.dtype, torch.float32)), [
                each[name].to(torch.promote_types(base.dtype, torch.float32)) for each in found if each and name in each
            ])
            for name, base in own.items()
        }  # fmt: skip


def _added(plain: Tensor, changed: Sequence[Tensor]) -> Tensor:
    """Return plain + the sum of (changed - plain). With one change that is the change itself, bit for bit."""
    if not changed:
        return plain
    total = changed[0]
    for each in changed[1:]:
        total = total + (each - plain)
    return total


def _folded(
    weight: Tensor, bias: Tensor | None, found: Sequence[tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias that compute the sum of what these compute beyond the given ones."""
    weights = _added(weight, [each for each, _ in found])
    given = [each for _, each in found if each is not None]
    if bias is None:  # a part that leaves it at None adds nothing
        return weights, sum(given[1:], given[0]) if given else None
    return weights, _added(bias, given)
