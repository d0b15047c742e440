"""The adapter contract: what a kind says of itself, and what its module computes.

One idea: a site has an input x and the frozen base's output h; an adapter may change either:

    x' = before(x, ctx)         h = base(x')         h' = adapt(x', h, ctx)

A kind is one file: a frozen config (what the user writes) and a module (what it does). A whole kind that learns one scale per feature:

    class Scale(AdapterConfig):
        \"\"\"Multiply the output by one learned number per feature.\"\"\"

        kind: Literal["scale"] = "scale"
        sites: str | tuple[str, ...] = "attn.v mlp.down"

        def build(self, spec: SiteSpec) -> Adapter:
            return ScaleAdapter(spec)

    class ScaleAdapter(Adapter):
        def __init__(self, spec: SiteSpec) -> None:
            super().__init__(spec)
            self.w = nn.Parameter(torch.ones(spec.out_features, dtype=spec.dtype, device=spec.device))

        def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
            return h * self.w.to(h.dtype)  # [B, L, O]

    graft.register(Scale)

Both classes below list what a kind must write, may write and rarely writes, in this order. Freezing, counting, saving, merging and routing
go through them and never through names of parameters: all parameters and persistent buffers of an `Adapter` module are the adapter.

Legend: [..., I] input features, [..., O] output features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from graft.adapters.surroundings import Surroundings
from graft.architectures.site import SiteLike, SiteSpec, SiteType
from graft.errors import GraftError
from graft.ops.low_rank_update import LowRankUpdate
from graft.routing.context import AdapterContext


class CannotFold(GraftError):
    """This adapter has no equal in the base's weights."""


class AdapterConfig(BaseModel):
    """What the user writes about one adapter. Frozen; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    # Every kind writes these.

    kind: str
    """Name of the adapter kind."""
    sites: str | tuple[str, ...]
    """Where to attach: names of the site language, e.g. "attn.q attn.v", "linear", "mlp@0-15", or "re:PATTERN" over module names."""

    def build(self, spec: SiteSpec) -> Adapter:
        """Make the module for one site."""
        raise NotImplementedError

    # A kind may write these: what it is good for, where it can act, and what holds for it.

    takes: ClassVar[frozenset[SiteType]] = frozenset({"linear"})
    """The types of sites that it can act at."""
    source: ClassVar[str] = ""
    """The paper."""
    suits: ClassVar[str] = ""
    """One sentence for who chooses a kind: what it is good for, and what it costs."""

    @property
    def starts_as_identity(self) -> bool:
        """Whether a fresh adapter leaves the model's output bitwise unchanged."""
        return True

    @property
    def folds(self) -> bool:
        """Whether the adapter has an equal in the base's weights, which its module's `fold` computes."""
        return False

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        """Raise `GraftError` for a setting that has no effect at these sites."""

    @classmethod
    def example(cls) -> dict[str, Any]:
        """A small mapping as one writes it in YAML: the kind, its first two settings and its sites, at their defaults."""
        fields = {name: field.get_default(call_default_factory=True) for name, field in cls.model_fields.items()}
        shown = [
            name for name in fields if name not in ("kind", "sites") and isinstance(fields[name], str | int | float)
        ]
        return {name: fields[name] for name in ("kind", *shown[:2], "sites")}

    # A kind rarely writes these.

    needs: ClassVar[frozenset[str]] = frozenset()
    """Site names that a model must have for this kind to make sense there ("bias" for BitFit)."""
    replaces: ClassVar[bool] = False
    """Whether the adapter takes the place of its sites' weights, so that those of the base do not matter."""

    @property
    def learns_bias(self) -> bool:
        """Whether it learns biases. A layer without a bias cannot take one in: merging there raises `CannotFold` even where `folds`."""
        return bool(getattr(self, "train_bias", False))

    def build_shared(self, specs: Sequence[SiteSpec]) -> Shared | None:
        """Make a module that all sites of this adapter share (a projection, a rule), or None."""
        return None

    def for_site(self, spec: SiteSpec) -> AdapterConfig:
        """This config as it holds at one site (patterns resolved)."""
        return self

    def collapsed(self) -> AdapterConfig:
        """The config of the adapter as it is published (a reparametrisation is folded away)."""
        return self

    @property
    def starts_from(self) -> tuple[int, ...]:
        """Token ids of a text: every attention adapter starts at the keys and values that the base computes of it (`start_at`)."""
        return ()

    def tokenised(self, tokenizer: Any) -> AdapterConfig:
        """This config with every text in it turned into token ids."""
        return self

    def parts(self) -> tuple[AdapterConfig, ...]:
        """The simple configs that this one is made of; itself for every kind but a stack."""
        return (self,)


class AdapterModule(nn.Module):
    """Any module of an adapter: the one at each site, and what all sites share. Training asks it for what goes beyond a loss."""

    def penalty(self) -> Tensor | None:
        """A scalar that is added to the job's loss once per step, or None."""
        return None

    def after_step(self, step: int, steps: int) -> None:
        """Act on optimiser step number `step` (from 1) of `steps`, before its gradients are dropped."""

    def lr_factor(self, parameter: str) -> float:
        """By what the learning rate of one of this module's own parameters is multiplied."""
        return 1.0


class Shared(AdapterModule):
    """What all sites of an adapter share: a projection, a rule, a budget."""


class Adapter(AdapterModule):
    """The module of one adapter at one site."""

    def __init__(self, spec: SiteSpec) -> None:
        super().__init__()
        self.site_index = spec.index
        """Number of the site within the adapter: with a row's seed, the key of its dropout mask."""

    # Every kind writes one of these.

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        """The output in place of the base's. x: [..., I], h: [..., O] -> [..., O]."""
        return h

    def before(self, x: Tensor, ctx: AdapterContext) -> Tensor:
        """The input that the base shall see. x: [..., I] -> [..., I]."""
        return x

    # A kind may write these: merging, and how its update is added together with those of other adapters.

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight [O, I] and bias [O] that equal base plus what `adapt` does. Raises `CannotFold`."""
        raise self.cannot_fold()

    def fold_input(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias that compute on x what the given ones compute on `before(x)`. Other adapters of the layer, which read
        `before(x)` too, are folded first."""
        return weight, bias

    def cannot_fold(self) -> CannotFold:
        """The error of a kind that has no equal in the base's weights."""
        return CannotFold(
            f"{type(self).__name__.removesuffix('Adapter').lower()} adapters have no equal in the base's weights and cannot be merged: "
            "keep the adapter beside the base (graft.load, graft chat, graft eval)"
        )

    def low_rank(self, ctx: AdapterContext, rows: slice | None = None) -> LowRankUpdate | None:
        """What `adapt` adds to h on these rows, where that is all it does and it has low rank: such adapters are added together."""
        return None

    reads: Literal["nothing", "input", "residual"] = "input"
    """The x that `adapt` gets at a sublayer: its input, or the residual stream that h will be added to. Both lie in other modules and are
    carried over only when read. Set it on the class, or on the instance before it is installed."""

    # A kind rarely writes these.

    reads_mask: ClassVar[bool] = False
    """Whether `adapt` reads `ctx.mask`, which is then noted from each call of the model."""
    runs_host: ClassVar[bool] = False
    """Whether `adapt` runs the host's own forward again on x; a call with further inputs is then an error."""

    def on_install(self, around: Surroundings) -> None:
        """Called once, when the module has been installed at its site."""
        self.around = around

    def share(self, shared: Shared) -> None:
        """Take the module that all sites share. It is kept out of this module's own parameters."""
        self._shared = (shared,)

    def fold_all(self) -> dict[str, Tensor] | None:
        """For an adapter of a whole module: the host's parameters by name that equal base plus adapter. None: `fold` says all."""
        return None

    @property
    def follows(self) -> Adapter | None:
        """The module of the same adapter that holds what this one computes with, because their hosts share the frozen weight."""
        return None

    def to_save(self) -> dict[str, Tensor]:
        """What a published adapter holds: parameters and persistent buffers by name, reparametrisations folded away."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}


def fold_steps(parts: Sequence[tuple[Adapter, Any]]) -> Iterator[tuple[Any, Any]]:
    """(how to fold, where) for the adapters of one layer, in the order that gives what they compute: all read what `before` left."""
    yield from ((adapter.fold, where) for adapter, where in parts)
    yield from ((adapter.fold_input, where) for adapter, where in reversed(parts))
