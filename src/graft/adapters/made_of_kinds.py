"""The settings of a kind made of other kinds (`composite.py` has their modules)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

from graft.adapters.base import AdapterConfig
from graft.architectures.site import SiteLike, SiteSpec


class MadeOfKinds(AdapterConfig):
    """The settings of every kind made of other kinds: what is true of it follows from what is true of them."""

    of: Any

    def inner(self) -> tuple[AdapterConfig, ...]:
        return self.of if isinstance(self.of, tuple) else (self.of,)

    def changed(self, change: Callable[[Any], AdapterConfig]) -> Self:
        """Return this config with each one inside it changed."""
        of = tuple(change(each) for each in self.inner())
        return self.model_copy(update={"of": of if isinstance(self.of, tuple) else of[0]})

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset().union(*(each.needs for each in self.inner()))

    @property
    def starts_as_identity(self) -> bool:
        return all(each.starts_as_identity for each in self.inner())

    @property
    def learns_bias(self) -> bool:
        return any(each.learns_bias for each in self.inner())

    @property
    def needs_gradients(self) -> bool:
        return any(each.needs_gradients for each in self.inner())

    @property
    def publishes_shared(self) -> bool:
        return any(each.publishes_shared for each in self.inner())

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        for each in self.inner():
            each.check_sites(sites)

    def for_site(self, spec: SiteSpec) -> AdapterConfig:
        return self.changed(lambda each: each.for_site(spec))

    def collapsed(self) -> AdapterConfig:
        return self.changed(lambda each: each.collapsed())

    def tokenised(self, tokenizer: Any) -> AdapterConfig:
        return self.changed(lambda each: each.tokenised(tokenizer))

    def model_dump(self, **options: Any) -> dict[str, Any]:
        dumped = [each.model_dump(**options) for each in self.inner()]
        return {**super().model_dump(**options), "of": dumped if isinstance(self.of, tuple) else dumped[0]}
