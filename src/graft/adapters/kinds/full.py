"""Full training of any module that has parameters, stored as a difference D from the base, so that the base stays as it is.

    linear layer      h' = h + D x (+ d)
    embedding         h' = h + D[token]
    anything else     the module's own forward, with P + D in place of each of its parameters P (norms; a small head as a whole)

This is what PEFT calls modules_to_save, layer-norm tuning and trainable tokens. LLM-Adapters stores it as whole weights.

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
    """Full training of the named modules (layers, norms, embeddings, heads), stored as differences from the base.

    If the output head shares the embedding's weight, `embed head` trains one difference that both use, and it can be merged. Naming only
    one of them changes only that one, and cannot be merged into the weight that both use.
    """

    takes: ClassVar[frozenset[SiteType]] = frozenset({"linear", "embedding", "norm", "other"})
    suits = "Trains what low-rank updates do not reach: norms, a task's head, rows of new tokens. As large as the modules it names."

    kind: Literal["full"] = "full"
    train_bias: bool = False
    """Also train the bias of linear layers. Norms and other modules always train all of their parameters."""
    tokens: tuple[int, ...] = ()
    """Train only the rows of these token ids (of `embed`, `head` or both). Their initial values are saved too, so that rows that were
    added to the base for new tokens travel with the adapter."""
    sites: str | tuple[str, ...] = "head"

    @property
    def folds(self) -> bool:
        return True

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        types = {site.type for site in sites}
        if self.train_bias and "linear" not in types:
            raise GraftError(
                "train_bias: has no effect without a linear layer; norms and other modules always train their bias"
            )
        if self.tokens and types - {"linear", "embedding"}:
            wrong = next(site for site in sites if site.type not in ("linear", "embedding"))
            raise GraftError(f"tokens: '{wrong.module}' has no rows of tokens: name embed, head or both")
        if len(set(self.tokens)) != len(self.tokens) or any(token < 0 for token in self.tokens):
            raise GraftError(f"tokens: give each id once, and none below 0; given {list(self.tokens)}")

    def build_shared(self, specs: Sequence[SiteSpec]) -> Shared | None:
        types = [spec.type for spec in specs]
        return Ties() if "embedding" in types and len(types) > 1 else None

    def build(self, spec: SiteSpec) -> Adapter:
        if spec.type in ("linear", "embedding"):
            return (FullRows if self.tokens else FullLinear if spec.type == "linear" else FullEmbedding)(self, spec)
        return FullModule(spec)


class Ties(Shared):
    """Which module of the adapter holds the difference for which frozen weight. Layers that share a weight share its difference."""

    def __init__(self) -> None:
        super().__init__()
        self._holders: dict[int, tuple[FullWeight]] = {}

    def holder(self, weight: Tensor, adapter: FullWeight) -> FullWeight:
        """Return the first module that asked for this weight."""
        return self._holders.setdefault(id(weight), (adapter,))[0]


class FullWeight(Adapter):
    """A difference `weight` from the host's weight, [O, I] or of a table [V, O], unless another module of the adapter holds it already."""

    weight: nn.Parameter | None

    def __init__(self, spec: SiteSpec, height: int, width: int) -> None:
        super().__init__(spec)
        self.like = {"dtype": spec.dtype, "device": spec.device}
        self.weight = nn.Parameter(torch.zeros(height, width, **self.like))
        self._shared: tuple[Shared, ...] = ()
        self._holder: tuple[FullWeight, ...] = ()  # in a tuple, so that it does not become a child module

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
        """The difference from the frozen weight, from whichever module holds it."""
        weight = self._holder[0].weight if self._holder else self.weight
        assert weight is not None
        return weight

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.difference.to(weight.dtype), bias


class FullLinear(FullWeight):
    """weight [O, I] and, if asked for, bias [O]. Both start at zero."""

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
    """weight [V, O]. The base's own forward looks it up, and scales it as it scales its table."""

    def __init__(self, config: Full, spec: SiteSpec) -> None:
        super().__init__(spec, spec.in_features, spec.out_features)

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        self._base_copy = (embedding_copy(around.host),)

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return h + self._base_copy[0].run({"weight": self.difference}, x).to(h.dtype)


class FullRows(FullWeight):
    """weight [T, O]: differences of some rows of a table or of a head's weight from their initial values `start` [T, O].

    Example: tokens (5, 2) in a table of 8 rows. `chosen` is [5, 2], and `row_of` is [2, 2, 1, 2, 2, 0, 2, 2]: token 5 reads row 0, token 2
    reads row 1, and all others read row 2, which is zeros.
    """

    chosen: Tensor
    """[T], the token ids."""
    row_of: Tensor
    """[V], the row of each token id here; T, a row of zeros, for all others."""
    start: Tensor | None

    def __init__(self, config: Full, spec: SiteSpec) -> None:
        linear = spec.type == "linear"
        height, width = (spec.out_features, spec.in_features) if linear else (spec.in_features, spec.out_features)
        super().__init__(spec, len(config.tokens), width)
        if height <= max(config.tokens):
            raise GraftError(f"tokens: there is no row {max(config.tokens)}; '{spec.module}' has {height} rows")
        chosen = torch.tensor(config.tokens, device=spec.device)
        row_of = torch.full((height,), len(chosen), device=spec.device).scatter(
            0, chosen, torch.arange(len(chosen), device=spec.device)
        )
        self.linear = linear
        self.register_buffer("chosen", chosen, persistent=False)
        self.register_buffer("row_of", row_of, persistent=False)

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        frozen = around.weight()
        self.register_buffer("start", None if self._holder else frozen.detach()[self.chosen].to(**self.like))
        if not self.linear:
            self._base_copy = (embedding_copy(around.host),)
            self._base_copy[0].module.__dict__["padding_idx"] = None  # it is a row of the base's table, not of this one

    @property
    def replaces_rows(self) -> Sequence[int]:
        return self.chosen.tolist()

    def rows_now(self) -> Tensor:
        """Return the trained rows [T, O] that replace the frozen ones."""
        holder = self._holder[0] if self._holder else self
        assert isinstance(holder, FullRows) and holder.start is not None
        return holder.start + self.difference

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        # A base that was extended for new tokens again may hold other values in these rows than `start`, so the difference is taken
        # from its current rows.
        delta_TO = self.rows_now() - self.around.weight()[self.chosen].to(self.difference.dtype)
        if not self.linear:
            table = torch.cat([delta_TO, delta_TO.new_zeros(1, delta_TO.shape[1])])  # [T + 1, O]
            return h + self._base_copy[0].run({"weight": table}, self.row_of[x]).to(h.dtype)
        return h.index_add(-1, self.chosen, F.linear(x.to(h.dtype), delta_TO.to(h.dtype)))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        others_TO = weight[self.chosen] - self.around.weight()[self.chosen].to(
            weight.dtype
        )  # what else the adapter did to these rows
        return weight.index_copy(0, self.chosen, self.rows_now().to(weight.dtype) + others_TO), bias


class FullModule(Adapter):
    """A difference from each parameter of the host and its children, under the host's own names. All start at zero."""

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
            if not parameter.is_floating_point() or getattr(parameter, "quant_state", None) is not None:
                raise GraftError(
                    f"'{self.path}.{name}' is quantised: full training needs it in a floating-point dtype, such as bfloat16"
                )
            # "dense.weight" becomes the parameter `weight` of an empty child module `dense`. `_modules` and `_parameters` are set directly,
            # since `register_module` refuses names that nn.Module has as attributes.
            *parents, own = name.split(".")
            holder: nn.Module = self
            for parent in parents:
                child = holder._modules.setdefault(parent, nn.Module())
                assert child is not None
                holder = child
            holder._parameters[own] = nn.Parameter(torch.zeros(parameter.shape, **self.like))

    def parameters_now(self) -> dict[str, Tensor]:
        """Return, by name, the tensors P + D that replace the frozen parameters, in their dtype."""
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
