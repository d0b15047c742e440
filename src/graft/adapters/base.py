"""The adapter contract: what a kind declares, and what its module computes.

A site has an input x and the frozen base's output h. An adapter may change both:

    x' = before(x, ctx)         h = base(x')         h' = adapt(x', h, ctx)

A kind is one file with a frozen config (what the user writes) and a module (what it computes). A complete kind that learns one scale per
feature:

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
use these methods and never the names of parameters: all parameters and persistent buffers of an `Adapter` module are the adapter.

Legend: [..., I] input features, [..., O] output features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import ValidationError, model_validator
from torch import Tensor, nn

from graft.adapters.surroundings import Surroundings
from graft.architectures.site import SiteLike, SiteSpec, SiteType
from graft.errors import GraftError
from graft.ops.low_rank_update import LowRankUpdate
from graft.routing.context import AdapterContext
from graft.utils.strict import Strict, described


class CannotFold(GraftError):
    """An adapter cannot be merged, because no weights of the base compute the same."""


class AdapterConfig(Strict):
    """What the user writes about one adapter. It is frozen, an unknown field is an error, and types are not converted.

    Raises `GraftError` for a field that is unknown or has a wrong value.
    """

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            kind = type(self).model_fields["kind"].default
            raise GraftError(f"adapter kind '{kind}': {described(error, type(self).model_fields)}") from error

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: Any) -> Any:
        """Turn the lists of YAML and JSON into the tuples that fields hold."""
        if not isinstance(value, Mapping):
            return value
        tuples = {
            name
            for name, field in cls.model_fields.items()
            if tuple in map(get_origin, (field.annotation, *get_args(field.annotation)))
        }
        return {key: tuple(each) if key in tuples and isinstance(each, list) else each for key, each in value.items()}

    # Every kind writes these.

    kind: str
    """Name of the adapter kind."""
    sites: str | tuple[str, ...]
    """Where to attach: names of the site language, e.g. "attn.q attn.v", "linear", "mlp@0-15", or "re:PATTERN" over module names."""

    def build(self, spec: SiteSpec) -> Adapter:
        """Make the module for one site."""
        raise NotImplementedError

    # A kind may write these: where it can act, what it is good for, and what is true of it.

    takes: ClassVar[frozenset[SiteType]] = frozenset({"linear"})
    """The types of sites at which it can act."""
    source: ClassVar[str] = ""
    """The paper."""
    suits: ClassVar[str] = ""
    """One sentence that helps to choose a kind: what it is good for, and what it costs."""

    @property
    def starts_as_identity(self) -> bool:
        """Whether a fresh adapter leaves the model's output unchanged, bit for bit."""
        return True

    @property
    def folds(self) -> bool:
        """Whether the adapter can be merged into the base's weights, with its module's `fold`."""
        return False

    @property
    def needs_gradients(self) -> bool:
        """Whether the adapter reads its gradients after a step, so that methods without a backward pass cannot train it."""
        return False

    @property
    def added_losses(self) -> tuple[str, ...]:
        """The names of the losses that it adds from the activations of a pass (`ops/added_loss.py`)."""
        return ()

    @property
    def compares_rows(self) -> bool:
        """Whether one of them compares the rows of a step, which then have to run in one pass."""
        return False

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        """Raise `GraftError` for a setting that has no effect at these sites."""

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Return a small mapping to write in YAML: the kind, its first two settings and its sites, with their defaults."""
        fields = {name: field.get_default(call_default_factory=True) for name, field in cls.model_fields.items()}
        shown = [
            name for name in fields if name not in ("kind", "sites") and isinstance(fields[name], str | int | float)
        ]
        return {name: fields[name] for name in ("kind", *shown[:2], "sites")}

    # A kind rarely writes these.

    needs: ClassVar[frozenset[str]] = frozenset()
    """Site names that a model must have for this kind to be of use ("bias" for BitFit)."""
    down: ClassVar[tuple[str, ...]] = ()
    """What the names of parameters begin with that read the input (LoRA's A). They are the down half, which a mixture can share, or not."""
    replaces: ClassVar[bool] = False
    """Whether the adapter replaces the weights of its sites, so that those of the base do not matter."""

    @property
    def learns_bias(self) -> bool:
        """Whether it learns biases. Merging then raises `CannotFold` at a layer without a bias, even if `folds` is true."""
        return bool(getattr(self, "train_bias", False))

    def build_shared(self, specs: Sequence[SiteSpec]) -> Shared | None:
        """Make a module that all sites of this adapter share (a projection, a rule), or return None."""
        return None

    def for_site(self, spec: SiteSpec) -> AdapterConfig:
        """Return this config as it applies to one site, with patterns resolved."""
        return self

    def collapsed(self) -> AdapterConfig:
        """Return the config of the adapter as it is published, with reparametrisations folded away."""
        return self

    @property
    def starts_from(self) -> tuple[int, ...]:
        """The token ids of a text. Attention adapters start at the keys and values that the base computes for it (`start_at`)."""
        return ()

    def tokenised(self, tokenizer: Any) -> AdapterConfig:
        """Return this config with every text in it as token ids."""
        return self

    def parts(self) -> tuple[AdapterConfig, ...]:
        """Return the configs that are attached side by side. Only a stack has more than itself."""
        return (self,)

    def inner(self) -> tuple[AdapterConfig, ...]:
        """Return the configs inside this one. Only a composite has any (`composite.py`)."""
        return ()

    @property
    def publishes_shared(self) -> bool:
        """Whether a saved adapter holds the module that all sites share. Otherwise it was a reparametrisation, and is folded away."""
        return self.collapsed() == self


class AdapterModule(nn.Module):
    """Any module of an adapter: the one at each site, and those that all sites share. It declares what training does besides the loss."""

    def penalty(self) -> Tensor | None:
        """Return a scalar that is added to the job's loss once per optimizer step, or None."""
        return None

    def after_step(self, step: int, steps: int) -> None:
        """Act after optimizer step number `step` (from 1) of `steps`, while its gradients are still there."""

    def lr_factor(self, parameter: str) -> float:
        """Return the factor of the learning rate of one of this module's own parameters."""
        return 1.0

    def inner(self) -> Mapping[str, AdapterModule]:
        """Return the adapter modules inside this one, by the names of the submodules that they are. Only a composite has any."""
        return {}


class Shared(AdapterModule):
    """A module that all sites of an adapter share: a projection, a rule, a budget."""


class Adapter(AdapterModule):
    """The module of one adapter at one site."""

    def __init__(self, spec: SiteSpec) -> None:
        super().__init__()
        self.site_index = spec.index
        """The number of the site in the adapter. With the seed of a row it is the key of the row's dropout mask."""

    # Every kind writes one of these.

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        """Return the output that replaces the base's output h. x: [..., I], h: [..., O] -> [..., O]."""
        return h

    def before(self, x: Tensor, ctx: AdapterContext) -> Tensor:
        """Return the input that the base gets in place of x. x: [..., I] -> [..., I]."""
        return x

    def output_read(self, x: Tensor, h: Tensor) -> Tensor:
        """Return the site's output as this adapter reads it: h, or h and the residual stream x together."""
        return h

    # A kind may write these: merging, and low-rank updates that are added together with those of other adapters.

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight [O, I] and bias [O] that compute what the given ones and `adapt` compute. Raises `CannotFold`."""
        raise self.cannot_fold()

    def fold_input(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias that compute on x what the given ones compute on `before(x)`.

        Other adapters of the layer read `before(x)` too, so they are folded first.
        """
        return weight, bias

    def cannot_fold(self) -> CannotFold:
        """Return the error of a kind that cannot be merged."""
        return CannotFold(
            "adapters of this kind have no equal in the base's weights and cannot be merged: "
            "keep the adapter beside the base (graft.load, graft chat, graft eval)"
        )

    def low_rank(self, ctx: AdapterContext, rows: slice | None = None) -> LowRankUpdate | None:
        """Return the low-rank update that `adapt` adds to h on these rows, None if it does anything else."""
        return None

    reads: Literal["nothing", "input", "residual"] = "input"
    """What `adapt` gets as x at a sublayer: its input, or the residual stream to which h is added. Other modules have these tensors and
    keep them for the adapter only if it reads them. Set this on the class, or on an instance before it is installed."""

    # A kind rarely writes these.

    reads_mask: bool = False
    """Whether `adapt` reads `ctx.mask`, which is then recorded at each call of the model."""
    runs_host: bool = False
    """Whether `adapt` runs the host's own forward again on x. A call with further inputs is then an error."""

    @property
    def acts_before(self) -> bool:
        """Whether it has a `before`."""
        return type(self).before is not Adapter.before

    def on_install(self, around: Surroundings) -> None:
        """Take note of the frozen modules at the site. This is called once, when the module has been installed."""
        self.around = around

    def share(self, shared: Shared) -> None:
        """Keep the module that all sites share, without making it a child of this one."""
        self._shared = (shared,)

    def check_filled(self) -> None:
        """Raise `GraftError` for tensors from a file that no adapter of this kind has, such as positions outside of the weight."""

    def fold_all(self) -> dict[str, Tensor] | None:
        """Return, for an adapter of a whole module, all parameters of the host by name with the adapter folded in. None: `fold` is used."""
        return None

    @property
    def follows(self) -> Adapter | None:
        """The module of the same adapter that holds this one's parameters, because their hosts share the frozen weight; else None."""
        return None

    @property
    def replaces_rows(self) -> Sequence[int]:
        """The rows of the host's table that this module replaces, so that those of the base do not matter."""
        return ()

    def to_save(self) -> dict[str, Tensor]:
        """Return what a published adapter holds, by name: parameters and persistent buffers, with reparametrisations folded away."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}
