"""A mixture of adaptations: M experts of one kind at each site, and a random one of them in each training pass.

    training      the site runs expert j, with j drawn from 1 ... M
    evaluation    the site runs the inner adapter with the mean of the experts' parameters

What is saved is the mean: one plain adapter of the inner kind, which merges where that kind merges. AdaMix draws one expert per pass and
shares one half of the bottleneck (or of LoRA's pair) among the experts; a consistency loss between two passes (`train.objective:
consistency`) then pulls their outputs together. If both halves have experts, each half draws by itself.

Example: `{kind: mixture, of: {kind: series, bottleneck: 48}, experts: 4, share: up}` on a layer of width 768 has four `down`, one `up`:
4 (768 * 48 + 48) + 48 * 768 + 768 = 185,280 parameters in training, and 74,544 in the file.

Wang et al. 2022, "AdaMix" (arXiv 2205.12410).

Legend: M experts, B rows, L length, T tokens of a padding-free batch, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from graft.adapters.base import Adapter, AdapterConfig
from graft.adapters.composite import Composite, Wrapper, wrap
from graft.adapters.filling import will_be_filled
from graft.adapters.parts.experts import Experts, holding
from graft.adapters.surroundings import Surroundings
from graft.architectures.site import SiteSpec, SiteType
from graft.errors import GraftError
from graft.ops.low_rank_update import LowRankUpdate
from graft.routing.context import AdapterContext, ForwardContext
from graft.routing.rows import RowSplit

AROUND: frozenset[SiteType] = frozenset({"linear", "sublayer", "embedding", "norm", "stream", "other"})
"""The types of sites where adapters act around a module."""


class Mixture(Composite):
    """Several experts of one kind, of which a random one trains in each pass. Evaluation uses their mean."""

    source = "arXiv 2205.12410"
    suits = "More capacity in training at no cost afterwards: the experts become one plain adapter. Steps may take two passes."

    draws: ClassVar[bool] = True
    """Whether training draws random numbers, besides dropout."""

    kind: Literal["mixture"] = "mixture"
    experts: int = Field(default=4, ge=2)
    """Number M of experts at each site."""
    share: Literal["up", "down", "none"] = "none"
    """The half of the inner adapter that all experts share: its second matrix (up: LoRA's B), its first one (down: LoRA's A), or none."""
    route: Literal["pass", "row", "token"] = "pass"
    """What draws an expert in training: each pass at each site (AdaMix), each row, or each token. Rows and tokens cost more time."""
    start: Literal["independent", "copies"] = "independent"
    """How experts begin: each with random numbers of its own, or as copies of one. Kinds that keep fixed tensors (PiSSA, SHiRA) begin as
    copies in any case."""

    @model_validator(mode="after")
    def _of_can_stand_here(self) -> Mixture:
        kind = self.of.kind
        if isinstance(self.of, Mixture):
            raise GraftError(
                "mixture: its experts cannot be mixtures: give one mixture as many experts as both would have"
            )
        if kind == "trained":
            raise GraftError(
                "mixture: a trained adapter by reference (from) is frozen, so experts of it would all be one"
            )
        if not self.of.takes & AROUND:
            raise GraftError(
                f"mixture: kind {kind} acts at {', '.join(sorted(self.of.takes))} sites, but experts need a kind that acts around a module "
                "(lora, series, parallel, ia3, ...)"
            )
        if self.of.needs_gradients:
            raise GraftError(
                f"mixture: kind {kind} changes its ranks by its gradients after each step, so its experts have no mean: use lora"
            )
        if self.of.compares_rows and self.route != "pass":
            raise GraftError(
                f"mixture: information compares all rows of a pass, so one expert has to run them: set route: pass; given: {self.route}"
            )
        if self.share != "none" and not self.of.down:
            raise GraftError(
                f"mixture: kind {kind} has no halves, so experts cannot share its {self.share} half: use share: none, or a kind with "
                "a pair of matrices (lora, dora, pissa, series, parallel, compacter, loretta-adp)"
            )
        return self

    @property
    def takes(self) -> frozenset[SiteType]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.of.takes & AROUND

    @property
    def folds(self) -> bool:
        return self.of.folds

    def build(self, spec: SiteSpec) -> Adapter:
        of = self.of.build(spec)
        # Where a file fills the experts, fixed tensors belong to the first one, or there are no numbers, no others are made.
        empty = will_be_filled() or spec.device.type == "meta"
        alike = self.start == "copies" or empty or next(of.buffers(), None) is not None
        others = () if alike else tuple(self.of.build(spec) for _ in range(self.experts - 1))
        return wrap(
            spec, of, around=MixtureAdapter, attention=None, prompt=None, experts=None, config=self, others=others
        )

    def collapsed(self) -> AdapterConfig:
        return self.of.collapsed()

    @classmethod
    def example(cls) -> dict[str, Any]:
        return {
            "kind": "mixture",
            "of": {"kind": "series", "bottleneck": 64, "sites": "mlp"},
            "experts": 4,
            "share": "up",
        }


Step = Callable[..., Tensor]
"""step(module, *tensors, ctx): what an inner module does to tensors."""
Numbers = list[tuple[int, ...]]
"""For each row, the expert that each draw chose."""


class MixtureAdapter(Wrapper):
    """The inner module, in which each parameter that is not shared has a first dimension of M."""

    def __init__(self, spec: SiteSpec, of: Adapter, config: Mixture, others: Sequence[Adapter]) -> None:
        super().__init__(spec, of)
        self.kind, self.route, self.alike = config.of.kind, config.route, not others
        self.experts = Experts(of, config.experts, config.of.down, config.share)
        self.experts.stack(others)
        self._drawn: dict[AdapterContext, Numbers | list[Tensor]] = {}
        """What `before` drew, until `adapt` takes it."""

    def on_install(self, around: Surroundings) -> None:
        # A kind that starts from the frozen weight writes into its parameters: let it see one expert after the other.
        for expert in range(1 if self.alike else self.experts.count):
            own = {name: stack.detach()[expert] for name, stack in self.experts.tensors().items()}
            with holding(self.of, own):
                super().on_install(around)
        if self.alike:
            for stack in self.experts.tensors().values():
                stack.detach()[1:] = stack.detach()[0]
        if self.of.follows is not None:
            raise GraftError(
                f"mixture: kind {self.kind} has one set of parameters for two modules here (a tied head): name one of them"
            )
        self.experts.stack()  # some kinds make their parameters only now

    def to_save(self) -> dict[str, Tensor]:
        with self.experts.averaged() as of:
            return {name: tensor.detach() for name, tensor in of.to_save().items()}

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with self.experts.averaged() as of:
            return of.fold(weight, bias)

    def fold_input(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with self.experts.averaged() as of:
            return of.fold_input(weight, bias)

    def fold_all(self) -> dict[str, Tensor] | None:
        with self.experts.averaged() as of:
            return of.fold_all()

    def before(self, x: Tensor, ctx: AdapterContext) -> Tensor:
        numbers = self._draw(x, ctx) if self.training else None
        if numbers is not None:
            self._drawn[ctx] = numbers
        return self._run(lambda of, x, ctx: of.before(x, ctx), (x,), ctx, numbers)

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        numbers = self._drawn.pop(ctx, None)
        if self.training and numbers is None:
            numbers = self._draw(h, ctx)
        return self._run(lambda of, x, h, ctx: of.adapt(x, h, ctx), (x, h), ctx, numbers)

    def low_rank(self, ctx: AdapterContext, rows: slice | None = None) -> LowRankUpdate | None:
        if type(self.of).low_rank is Adapter.low_rank:
            return None
        if not self.training:
            with self.experts.averaged() as of:
                return of.low_rank(ctx, rows)
        # Without seeds, only `adapt` draws: a recomputed block has to draw as often as it did at first, whichever path it takes.
        if ctx.pass_seeds is None or self.route != "pass" or len(set(numbers := self._of_rows(ctx, 1))) > 1:
            return None
        with holding(self.of, self.experts.expert(numbers[0])):
            return self.of.low_rank(ctx, rows)

    def _draw(self, h: Tensor, ctx: AdapterContext) -> Numbers | list[Tensor]:
        """Draw experts for a pass on h, [B, L, ...] or [1, T, ...]: numbers for each row or, for tokens, a tensor [B, L] for each draw."""
        if torch.compiler.is_compiling():  # in a graph torch's global generator draws, and the numbers stay tensors
            shape = {"pass": (1,), "row": h.shape[:1], "token": h.shape[:2]}[self.route]
            return [torch.randint(self.experts.count, shape, device=h.device) for _ in self._sites]
        if self.route == "token":
            return [ctx.draw_by_token(h, self.experts.count, site) for site in self._sites]
        return self._of_rows(ctx, len(ctx.lengths or ()) if ctx.flat else h.shape[0])

    def _of_rows(self, ctx: AdapterContext, rows: int) -> Numbers:
        per = "row" if self.route == "row" else "pass"
        return list(zip(*(ctx.draw(self.experts.count, site, per, rows) for site in self._sites), strict=True))

    @property
    def _sites(self) -> tuple[int, ...]:
        """A number for each draw, with which its random numbers are its own."""
        return (self.site_index, ~self.site_index)[: self.experts.draws]

    def _run(self, step: Step, tensors: Sequence[Tensor], ctx: AdapterContext, numbers: Any) -> Tensor:
        """Let the inner module take a step on tensors, [B, L, ...] or [1, T, ...]: as the mean without numbers, else as experts."""
        if numbers is None:
            return self._as(self.experts.mean(), step, tensors, ctx)
        if isinstance(numbers[0], Tensor):
            return self._by_tensor(step, tensors, ctx, numbers)
        if len(set(numbers)) == 1:
            return self._as(self.experts.expert(numbers[0]), step, tensors, ctx)
        names = tuple(repr(own) for own in numbers)
        rows = ForwardContext(
            names, ctx.lengths, ctx.flat, ctx.seeds, ctx.pass_seeds, ctx.mask, ctx.cached, self._shares(ctx, names)
        )
        groups, dim = rows.groups(tensors[-1]), 1 if ctx.flat else 0
        split, pieces = RowSplit([index for _, index, _ in groups], tensors[-1].shape[dim], dim), []
        for at, (name, _, own) in enumerate(groups):
            expert = self.experts.expert(numbers[names.index(name)])
            own = replace(own, losses=ctx.losses, waiting=ctx.waiting)
            pieces.append(self._as(expert, step, [split.gather(each, at) for each in tensors], own))
        return split.scatter(tensors[-1], pieces)

    @staticmethod
    def _shares(ctx: AdapterContext, rows: Sequence[str]) -> tuple[float, ...]:
        """The shares of rows in added losses, whichever experts they run through."""
        return (1 / len(rows),) * len(rows) if ctx.loss_shares is None else ctx.loss_shares

    def _by_tensor(self, step: Step, tensors: Sequence[Tensor], ctx: AdapterContext, drawn: Sequence[Tensor]) -> Tensor:
        """Take a step with numbers in tensors: one for all, or for each row or token, where every expert runs on everything."""
        if self.route == "pass":
            return self._as(self.experts.expert(drawn), step, tensors, ctx)
        out = tensors[-1]
        for numbers in product(range(self.experts.count), repeat=len(drawn)):
            chosen = torch.stack([own == number for own, number in zip(drawn, numbers, strict=True)]).all(0)
            chosen = chosen.view(chosen.shape + (1,) * (out.dim() - chosen.dim()))
            out = torch.where(chosen, self._as(self.experts.expert(numbers), step, tensors, ctx), out)
        return out

    def _as(self, held: Mapping[str, Tensor], step: Step, tensors: Sequence[Tensor], ctx: AdapterContext) -> Tensor:
        with holding(self.of, held):
            return step(self.of, *tensors, ctx)
