"""Full training of any module with parameters of its own, kept as a difference D to the base, so that the base stays as it is.

    linear layer   h + D x (+ d)
    embedding      h + D[token]
    anything else  the module's own forward with P + D in place of each of its parameters P (norms; a small head as a whole)

What PEFT calls modules_to_save, layer-norm tuning and trainable tokens, and LLM-Adapters stores as whole weights, is this difference.

Legend: I input features, O output features, V rows of the table, T chosen tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.adapters.base import Adapter, AdapterConfig, Shared
from graft.adapters.surroundings import Surroundings
from graft.architectures.site import SiteLike, SiteSpec, SiteType
from graft.errors import GraftError
from graft.ops.base_copy import BaseCopy, embedding_copy, require_one_input
from graft.routing.context import AdapterContext


class Full(AdapterConfig):
    """Full training of the named modules (layers, norms, embeddings, heads), as a difference to the base.

    Where the output head shares the embedding's weight, `embed head` train one difference that both use, as the base does, and it merges;
    naming one of the two changes that one alone, and cannot be merged into the weight that both use.
    """

    takes: ClassVar[frozenset[SiteType]] = frozenset({"linear", "embedding", "norm", "other"})
    suits = "What low-rank differences do not reach: norms, a task's head, rows of new tokens. As large as the modules it names."

    kind: Literal["full"] = "full"
    train_bias: bool = False
    """Of linear layers, also learn a difference to the bias. Norms and other modules train all of their parameters anyway."""
    tokens: tuple[int, ...] = ()
    """Train only the rows of these token ids (of `embed`, `head` or both). The rows that they start from are saved too, so that rows
    which were added to the base for new tokens come along with the adapter."""
    sites: str | tuple[str, ...] = "head"

    @property
    def folds(self) -> bool:
        return True

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        types = {site.type for site in sites}
        if self.train_bias and "linear" not in types:
            raise GraftError(
                "train_bias: has no effect without a linear layer; norms and other modules train their bias anyway"
            )
        if self.tokens and types - {"linear", "embedding"}:
            wrong = next(site for site in sites if site.type not in ("linear", "embedding"))
            raise GraftError(f"tokens: '{wrong.module}' has no rows of tokens; name embed, head or both")
        if len(set(self.tokens)) != len(self.tokens) or any(token < 0 for token in self.tokens):
            raise GraftError(f"tokens: each id once and none below 0; given {list(self.tokens)}")

    def build_shared(self, specs: Sequence[SiteSpec]) -> Shared | None:
        types = [spec.type for spec in specs]
        return Ties() if "embedding" in types and len(types) > 1 else None

    def build(self, spec: SiteSpec) -> Adapter:
        if spec.type in ("linear", "embedding"):
            return (FullRows if self.tokens else FullLinear if spec.type == "linear" else FullEmbedding)(self, spec)
        return FullModule(spec)


class Ties(Shared):
    """Which module of the adapter holds the difference to which frozen weight: layers that share a weight share its difference."""

    def __init__(self) -> None:
        super().__init__()
        self._holders: dict[int, tuple[FullWeight]] = {}

    def holder(self, weight: Tensor, adapter: FullWeight) -> FullWeight:
        """The first module that came with this weight."""
        return self._holders.setdefault(id(weight), (adapter,))[0]


class FullWeight(Adapter):
    """A difference `weight` [O, I] (a table: [V, I]) to the host's weight, unless another module of the adapter holds it already."""

    weight: nn.Parameter | None

    def __init__(self, spec: SiteSpec, rows: int, width: int) -> None:
        super().__init__(spec)
        self.like = {"dtype": spec.dtype, "device": spec.device}
        self.weight = nn.Parameter(torch.zeros(rows, width, **self.like))
        self._shared: tuple[Shared, ...] = ()
        self._holder: tuple[FullWeight, ...] = ()

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        weight = getattr(around.host, "weight", None)
        if not self._shared or weight is None:
            return
        (ties,) = self._shared
        assert isinstance(ties, Ties)
        holder = ties.holder(weight, self)
        if holder is not self:
            self.weight, self._holder = None, (holder,)

    @property
    def follows(self) -> Adapter | None:
        return self._holder[0] if self._holder else None

    @property
    def difference(self) -> Tensor:
        """To the frozen weight, wherever it is kept."""
        weight = self._holder[0].weight if self._holder else self.weight
        assert weight is not None
        return weight

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.difference.to(weight.dtype), bias


class FullLinear(FullWeight):
    """weight [O, I] and, where asked for, bias [O]; both start at zero."""

    def __init__(self, config: Full, spec: SiteSpec) -> None:
        super().__init__(spec, spec.out_features, spec.in_features)
        self.bias = nn.Parameter(torch.zeros(spec.out_features, **self.like)) if config.train_bias else None

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        bias = None if self.bias is None else self.bias.to(h.dtype)
        return h + F.linear(x.to(h.dtype), self.difference.to(h.dtype), bias)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().fold(weight, bias)
        if self.bias is not None:
            bias = self.bias.to(weight.dtype) if bias is None else bias + self.bias.to(bias.dtype)
        return weight, bias


class FullEmbedding(FullWeight):
    """weight [V, O], looked up and scaled the way the base does its own table."""

    def __init__(self, config: Full, spec: SiteSpec) -> None:
        super().__init__(spec, spec.in_features, spec.out_features)

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        self._base_copy = (embedding_copy(around.host),)

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return h + self._base_copy[0].run({"weight": self.difference}, x).to(h.dtype)


class FullRows(FullWeight):
    """weight [T, O]: rows of a table, or of a head's weight. `start` [T, O] are the rows that they are the difference to."""

    def __init__(self, config: Full, spec: SiteSpec) -> None:
        linear = spec.type == "linear"
        self.rows, width = (spec.out_features, spec.in_features) if linear else (spec.in_features, spec.out_features)
        super().__init__(spec, len(config.tokens), width)
        if self.rows <= max(config.tokens):
            raise GraftError(f"tokens: there is no row {max(config.tokens)}; '{spec.module}' has {self.rows} rows")
        chosen = torch.tensor(config.tokens, device=spec.device)
        row_of = torch.full((self.rows,), len(chosen), device=spec.device).scatter(
            0, chosen, torch.arange(len(chosen), device=spec.device)
        )
        self.linear = linear
        self.register_buffer("chosen", chosen, persistent=False)
        self.register_buffer("row_of", row_of, persistent=False)

    chosen: Tensor
    """[T] token ids."""
    row_of: Tensor
    """[V] token id -> its row here; T, a row of zeros, for all others."""
    start: Tensor | None

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        frozen = around.weight()
        self.register_buffer("start", None if self._holder else frozen.detach()[self.chosen].to(**self.like))
        if not self.linear:
            self._base_copy = (embedding_copy(around.host),)
            self._base_copy[0].module.__dict__["padding_idx"] = None  # a row here is not a row there

    def rows_now(self) -> Tensor:
        """The rows [T, O] that take the frozen ones' place."""
        holder = self._holder[0] if self._holder else self
        assert isinstance(holder, FullRows) and holder.start is not None
        return holder.start + self.difference

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        change = self.rows_now() - self.around.weight()[self.chosen].to(self.difference.dtype)
        if not self.linear:
            table = torch.cat([change, change.new_zeros(1, change.shape[1])])
            return h + self._base_copy[0].run({"weight": table}, self.row_of[x]).to(h.dtype)
        return h.index_add(-1, self.chosen, F.linear(x.to(h.dtype), change.to(h.dtype)))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_copy(0, self.chosen, self.rows_now().to(weight.dtype)), bias


class FullModule(Adapter):
    """A difference to each parameter of the host, by the host's own names, children included; all start at zero."""

    runs_host = True

    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.like, self.path = {"dtype": spec.dtype, "device": spec.device}, spec.module

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        require_one_input(around.host)
        self._base_copy = (BaseCopy(around.host),)
        frozen = self._base_copy[0].parameters()
        if not frozen:
            raise GraftError(f"'{self.path}' ({type(around.host).__name__}) has no parameters to train")
        for name, parameter in frozen.items():
            if not parameter.is_floating_point():
                raise GraftError(f"'{self.path}.{name}' is quantised: full training needs it in bfloat16 or float32")
            *parents, own = name.split(".")
            holder: nn.Module = self
            for parent in parents:  # `_modules` directly, past nn.Module's reserved attributes, so that names are free
                child = holder._modules.setdefault(parent, nn.Module())
                assert child is not None
                holder = child
            holder._parameters[own] = nn.Parameter(torch.zeros(parameter.shape, **self.like))

    def parameters_now(self) -> dict[str, Tensor]:
        """Name -> what takes the frozen parameter's place, in its dtype."""
        frozen, now = self._base_copy[0].parameters(), {}
        for name, difference in self.named_parameters():
            if frozen[name].device.type == "meta" != difference.device.type:
                raise GraftError(f"'{self.path}.{name}' is offloaded: full training of this module needs it in memory")
            now[name] = (frozen[name].to(difference.dtype) + difference).to(frozen[name].dtype)
        return now

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return self._base_copy[0].run(self.parameters_now(), x).reshape(h.shape).to(h.dtype)

    def fold_all(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.parameters_now().items()}
