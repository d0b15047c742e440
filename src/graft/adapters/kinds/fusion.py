"""AdapterFusion: attention over trained adapters, which stay frozen.

    d_n = adapt_n(x, h) - h,    p = softmax_n(Q h . K d_n / T),    h' = h + sum_n p_n V d_n

Each token weighs what the adapters would add to its output h. Q and K start from N(0, 0.02) with biases of zero. V starts near the
identity and is kept there: its distance from the identity is a penalty of the loss. `reads` says what stands in place of h in Q h.

Pfeiffer et al. 2021, "AdapterFusion" (arXiv 2005.00247).

Legend: O features of h, N adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from graft.adapters.base import Adapter, Shared
from graft.adapters.composite import CompositeAdapter
from graft.adapters.kinds.trained import HeldAround, Trained
from graft.adapters.made_of_kinds import MadeOfKinds
from graft.architectures.site import SiteLike, SiteSpec, SiteType
from graft.errors import GraftError
from graft.routing.context import AdapterContext


class Fusion(MadeOfKinds):
    """Attention over frozen adapters, which learns for each token how much of each adapter it takes."""

    takes: ClassVar[frozenset[SiteType]] = frozenset({"linear", "sublayer", "norm", "other"})
    source = "arXiv 2005.00247"
    suits = "Using what several adapters learnt on other tasks for a new one. 3 O^2 parameters at each site."

    kind: Literal["fusion"] = "fusion"
    of: tuple[Trained, ...] = Field(min_length=2)
    """The folders of the trained adapters. They act at the same sites and each has one part."""
    reads: Literal["output", "input", "stream"] = "output"
    """What asks the adapters. output: h. input: what the adapters get as x. stream: what bottlenecks with `reads: stream` read, the
    residual stream with h added, after the norm if one follows (AdapterHub)."""
    temperature: float = Field(default=1.0, gt=0.0)
    """T: higher values make the weights of the adapters more equal."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout of the scores before the softmax."""
    value: bool = True
    """Whether there is V. Without it, what the adapters add is mixed as it is."""
    penalty: float | None = Field(default=None, ge=0.0)
    """Factor of the squared distance between V and the identity in the loss. None: 0.01 where there is V."""
    sites: str | tuple[str, ...] = ()
    """Where the adapters act: they name their sites."""

    @model_validator(mode="before")
    @classmethod
    def _at_the_sites_of_its_adapters(cls, value: Any) -> Any:
        """Read the folders, and take the sites from them."""
        given = value.get("of") if isinstance(value, Mapping) else None
        if given is None:
            return value
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise GraftError(f"`of` takes a list of adapter folders; given: {given!r}")
        if len(given) < 2:
            raise GraftError(f"a fusion is made of at least two adapters; given: {len(given)}")
        found = tuple(_trained(each) for each in given)
        for each in found:
            if each.parts() != (each,):
                raise GraftError(
                    f"the adapter in {each.folder} has several parts, and fusion takes adapters of one: leave it out"
                )
            if each.sites != found[0].sites:
                raise GraftError(
                    f"the adapters in {found[0].folder} and {each.folder} act at different sites, {found[0].sites!r} and "
                    f"{each.sites!r}, so they cannot be weighed against each other"
                )
        sites = value.get("sites") or (found[0].sites if found else ())
        sites = tuple(sites) if isinstance(sites, list) else sites
        if found and sites != found[0].sites:
            raise GraftError(f"a fusion acts where its adapters do, at {found[0].sites!r}; given sites: {sites!r}")
        return {**value, "of": found, "sites": sites}

    @model_validator(mode="after")
    def _has_what_it_says(self) -> Fusion:
        if not self.value and self.penalty is not None:
            raise ValueError("penalty keeps V near the identity, and with value: false there is no V")
        if self.reads == "stream" and (
            other := [each for each in self.of if getattr(each.of, "reads", "") != "stream"]
        ):
            raise ValueError(
                f"reads: stream is for bottlenecks that read the stream, and the one in {other[0].folder} does not"
            )
        return self

    @property
    def starts_as_identity(self) -> bool:
        return False

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        for each in self.of:
            if unfit := {site.type for site in sites} - each.of.takes:
                raise GraftError(f"kind '{each.of.kind}' does not act at {' and '.join(sorted(unfit))} sites")
            each.check_sites(sites)

    def build_shared(self, specs: Sequence[SiteSpec]) -> Shared | None:
        for each in self.of:
            if each.build_shared(specs) is not None:
                raise _does_more(each)
        return None

    def build(self, spec: SiteSpec) -> Adapter:
        built = {}
        for number, each in enumerate(self.of):
            module = each.build(spec)
            if type(module) is not HeldAround or module.acts_before:
                raise _does_more(each)
            built[f"of_{number}"] = module
        return FusionAdapter(self, spec, built)


def _does_more(trained: Trained) -> GraftError:
    return GraftError(
        f"fusion weighs what adapters add to an output, and kind '{trained.of.kind}' does something else: take series, parallel, "
        "compacter or a difference of weights"
    )


def _trained(value: Any) -> Trained:
    from graft.adapters.parsing import parse

    found = parse({"from": value} if isinstance(value, str) else value)
    if not isinstance(found, Trained):
        raise GraftError(f"fusion takes folders of trained adapters; given: {value!r}")
    return found


class FusionAdapter(CompositeAdapter):
    """Q [O or I, O], K [O, O] with biases, V [O, O] without."""

    value: nn.Parameter | None

    def __init__(self, config: Fusion, spec: SiteSpec, inner: Mapping[str, Adapter]) -> None:
        super().__init__(spec, inner)
        read = {each.reads for each in inner.values()} - {"nothing"}
        if len(read) > 1:
            raise GraftError(
                f"fusion: at '{spec.name}' one adapter reads the site's input and another the residual stream; all have to read the same"
            )
        self.reads = "residual" if "residual" in read else "input" if read or config.reads == "input" else "nothing"
        like = {"dtype": spec.dtype, "device": spec.device}
        asks = spec.in_features if config.reads == "input" else spec.out_features
        self.asks, self.temperature, self.p = config.reads, config.temperature, config.dropout
        self.factor = 0.01 if config.penalty is None else config.penalty
        self.query = nn.Linear(asks, spec.out_features, **like)
        self.key = nn.Linear(spec.out_features, spec.out_features, **like)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.value = None
        if config.value:
            near = torch.full((spec.out_features, spec.out_features), 1e-6, **like)
            self.value = nn.Parameter(near.fill_diagonal_(1.0))

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        adapters, dtype = list(self.inner().values()), self.key.weight.dtype
        wide = h.to(dtype)  # in fewer bits, the difference from h would lose what a small change adds
        added = torch.stack([each.adapt(x, wide, ctx) - wide for each in adapters], -2).to(dtype)  # [..., N, O]
        asks = {"input": lambda: x, "output": lambda: h, "stream": lambda: adapters[0].output_read(x, h)}[self.asks]()
        query = self.query(asks.to(dtype))  # [..., O]
        scores = torch.einsum("...o,...no->...n", query, self.key(added))  # [..., N]
        if self.training:
            scores = ctx.dropout(scores, self.p, self.site_index)
        weights = torch.softmax(scores / self.temperature, -1)
        mixed = torch.einsum("...n,...no->...o", weights, added)
        if self.value is not None:
            mixed = mixed @ self.value.t()  # V is linear, so it acts on the mixture
        return h + mixed.to(h.dtype)

    def penalty(self) -> Tensor | None:
        if not self.factor or self.value is None:
            return None
        identity = torch.eye(self.value.shape[-1], dtype=self.value.dtype, device=self.value.device)
        return self.factor * (self.value - identity).square().sum((-2, -1)).mean()  # in a mixture, over the experts
