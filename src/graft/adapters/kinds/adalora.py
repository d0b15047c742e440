"""AdaLoRA: a difference in the form of a singular value decomposition, whose ranks are given to the sites that need them.

    h' = h + s P (E (.) Q dropout(x)),    s = alpha / (initial rank + epsilon)

Every site starts at `init_rank`. A budget falls from that to `target_rank` per site on average, by a cubic, between `warmup` and `final`:

    b(t) = b_T + (b_0 - b_T) (1 - (t - t_w) / (T - t_f - t_w))^3

After each of these steps the b(t) triplets (column of P, entry of E, row of Q) with the highest scores keep their E; the E of the others
is zero, but may come back with a later gradient. From `final` on the choice stands. The score of a triplet is that of its E plus the means
of those over its column and row, where the score of one entry w is

    S = mean_b1(I) * mean_b2(|I - mean_b1(I)|),    I = |w * dL/dw|        (running means)

and the loss is increased by gamma times the mean over all P and Q of ||P^T P - 1||, ||Q Q^T - 1|| (Frobenius).

Zhang et al. 2023, "AdaLoRA" (arXiv 2303.10512), equations 7 to 11; order of calls and the scale as in PEFT.

Legend: I input features, O output features, R initial rank, N sites.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from graft.adapters.base import AdapterConfig, Shared
from graft.adapters.parts.weight_delta import WeightDelta
from graft.architectures.site import SiteSpec
from graft.errors import GraftError
from graft.routing.context import AdapterContext

UNSEEN_STEPS = 3
"""Changes of the weights that count as training; one may be a trial step that is taken back."""


class AdaLoRA(AdapterConfig):
    """Low-rank adaptation that moves rank to the sites where it tells."""

    source = "arXiv 2303.10512"
    suits = "When the rank is scarce and it is not known which layers need it; the number of steps has to be known."

    kind: Literal["adalora"] = "adalora"
    init_rank: int = Field(default=12, ge=1)
    """Rank of every site at the start."""
    target_rank: int | None = Field(default=8, ge=1)
    """Mean rank of the sites in the end. None: ranks stay as they are, which is what a saved adapter says."""
    alpha: float = 16.0
    """Numerator of the scale alpha / (init_rank + epsilon), whatever rank remains."""
    epsilon: float = Field(default=1e-5, ge=0.0)
    """As PEFT adds it to the rank; 0 is the paper's scale."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the input of Q."""
    warmup: int | float = Field(default=0.1, ge=0)
    """Steps before the budget begins to fall; a number below 1 is a fraction of all steps."""
    final: int | float = Field(default=0.3, ge=0)
    """Steps at the end in which the choice stands; a number below 1 is a fraction of all steps."""
    interval: int = Field(default=1, ge=1)
    """Steps from one choice to the next."""
    beta1: float = Field(default=0.85, gt=0.0, lt=1.0)
    """Weight of the past in the running mean of the sensitivity."""
    beta2: float = Field(default=0.85, gt=0.0, lt=1.0)
    """Weight of the past in the running mean of its deviation."""
    orthogonality: float = Field(default=0.5, ge=0.0)
    """Factor of the penalty that keeps P and Q orthogonal."""
    sites: str | tuple[str, ...] = "linear"

    @model_validator(mode="after")
    def _fits(self) -> AdaLoRA:
        if self.target_rank is not None and self.target_rank > self.init_rank:
            raise GraftError(
                f"target_rank {self.target_rank} is more than init_rank {self.init_rank}: the budget only falls"
            )
        return self

    @property
    def folds(self) -> bool:
        return True

    def build(self, spec: SiteSpec) -> AdaLoRAAdapter:
        return AdaLoRAAdapter(self, spec)

    def build_shared(self, specs: Sequence[SiteSpec]) -> Shared | None:
        return None if self.target_rank is None else Allocator(self)

    def collapsed(self) -> AdaLoRA:
        return self.model_copy(update={"target_rank": None})


class AdaLoRAAdapter(WeightDelta):
    """P [O, R] and Q [R, I] from N(0, 0.02), E [R] at zero, and which triplets are kept [R].

    While ranks are being given, the running means of every entry's sensitivity and its deviation go along, for exact resuming.
    """

    kept: Tensor

    def __init__(self, config: AdaLoRA, spec: SiteSpec) -> None:
        super().__init__(spec, config.dropout)
        like = {"dtype": spec.dtype, "device": spec.device}
        self.scale = config.alpha / (config.init_rank + config.epsilon)
        self.P = nn.Parameter(torch.empty(spec.out_features, config.init_rank, **like).normal_(std=0.02))
        self.E = nn.Parameter(torch.zeros(config.init_rank, **like))
        self.Q = nn.Parameter(torch.empty(config.init_rank, spec.in_features, **like).normal_(std=0.02))
        self.register_buffer("kept", torch.ones(config.init_rank, dtype=torch.bool, device=spec.device))
        self.means = ("sensitivity", "deviation") if config.target_rank is not None else ()
        for name in self.means:
            for key in "PEQ":
                self.register_buffer(f"{name}_{key}", torch.zeros_like(getattr(self, key)))

    def share(self, shared: Shared) -> None:
        super().share(shared)
        assert isinstance(shared, Allocator)
        shared.sites = (*shared.sites, self)

    def apply_to(self, x: Tensor) -> Tensor:
        values = torch.where(self.kept, self.E, 0.0) * self.scale
        low_R = F.linear(x, self.Q.to(x.dtype)) * values.to(x.dtype)
        return F.linear(low_R, self.P.to(x.dtype))

    def difference(self) -> Tensor:
        return (self.P * torch.where(self.kept, self.E, 0.0) * self.scale) @ self.Q

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        if self.training and self.means and not torch.compiler.is_compiling():
            (shared,) = self._shared
            assert isinstance(shared, Allocator)
            shared.watch(self)
        return super().adapt(x, h, ctx)

    def to_save(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in super().to_save().items() if not name.startswith(self.means)}

    @torch.no_grad()
    def note_gradient(self, beta1: float, beta2: float) -> None:
        """Take this step's gradients into the running means."""
        for key in "PEQ":
            weight, mean, deviation = (getattr(self, name) for name in (key, f"sensitivity_{key}", f"deviation_{key}"))
            if weight.grad is None:
                continue
            now = (weight * weight.grad).abs()
            mean.mul_(beta1).add_(now, alpha=1 - beta1)
            deviation.mul_(beta2).add_((now - mean).abs(), alpha=1 - beta2)

    def scores(self) -> Tensor:
        """The score of each triplet [R]."""
        P, E, Q = (getattr(self, f"sensitivity_{key}") * getattr(self, f"deviation_{key}") for key in "PEQ")
        return E + P.mean(0) + Q.mean(1)


class Allocator(Shared):
    """Gives ranks to the sites of one adapter after each optimiser step, and penalises what is not orthogonal."""

    def __init__(self, config: AdaLoRA) -> None:
        super().__init__()
        assert config.target_rank is not None
        self.config = config
        self.target = config.target_rank
        self.sites: tuple[AdaLoRAAdapter, ...] = ()
        """They come in when they take this module as theirs, and keep their parameters."""
        self.unseen: int | None = 0
        """Optimiser steps that nobody told of; None once one was told of, or the warning given."""
        self.seen: Tensor | None = None
        """The first site's E as a training pass last saw it: torch's fused optimisers change weights and not their versions."""

    def penalty(self) -> Tensor | None:
        if not self.config.orthogonality:
            return None
        grams = [gram for site in self.sites for gram in (site.P.T @ site.P, site.Q @ site.Q.T)]
        norms = [(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).norm() for gram in grams]
        return self.config.orthogonality * torch.stack(norms).mean()

    def watch(self, site: AdaLoRAAdapter) -> None:
        """Warn once where weights change from pass to pass and `after_step` is never called: ranks would stay in silence."""
        if (
            self.unseen is None
            or site is not self.sites[0]
            or (self.seen is not None and torch.equal(site.E, self.seen))
        ):
            return
        self.unseen, self.seen = self.unseen + (self.seen is not None), site.E.detach().clone()
        if self.unseen == UNSEEN_STEPS:
            self.unseen = None
            warnings.warn(
                "an AdaLoRA adapter is being trained and its ranks stay as they are, since nobody tells it of the steps taken: give a "
                "Trainer callbacks=[graft.callback()], or in a loop of your own add graft.penalty(model, name) to the loss and call "
                "graft.after_step(model, name, step, steps) after optimizer.step(); with target_rank: null no ranks are given",
                stacklevel=2,
            )

    def after_step(self, step: int, steps: int) -> None:
        self.unseen = None
        warmup, end = self.schedule(steps)
        if step < end:
            for site in self.sites:
                site.note_gradient(self.config.beta1, self.config.beta2)
        if step == end or (warmup < step < end and step % self.config.interval == 0):
            self._choose(self.budget(step, steps), last=step == end)
        elif step > end:
            self._hold()

    def schedule(self, steps: int) -> tuple[int, int]:
        """(last step of the warm-up, step of the last choice). Raises `GraftError` when nothing is left between them."""
        warmup, final = (
            round(value * steps) if isinstance(value, float) and value < 1 else int(value)
            for value in (self.config.warmup, self.config.final)
        )
        if warmup >= steps - final:
            raise GraftError(
                f"AdaLoRA with a warm-up of {warmup} and {final} final steps has no steps left to give ranks in a run of {steps}: "
                "lower `warmup` or `final`, or train longer"
            )
        return warmup, steps - final

    def budget(self, step: int, steps: int) -> int:
        """Triplets that are kept after a step, over all sites."""
        warmup, end = self.schedule(steps)
        start, target = self.config.init_rank * len(self.sites), self.target * len(self.sites)
        left = 1 - (min(max(step, warmup), end) - warmup) / (end - warmup)
        return int((start - target) * left**3 + target)

    @torch.no_grad()
    def _choose(self, budget: int, last: bool) -> None:
        """Zero the E of all but the best triplets; the last time, for good."""
        score_NR = torch.stack([site.scores().to(self.sites[0].E.device) for site in self.sites])
        chosen = torch.zeros(score_NR.numel(), dtype=torch.bool, device=score_NR.device)
        chosen[score_NR.flatten().argsort(descending=True, stable=True)[:budget]] = True
        for site, kept in zip(self.sites, chosen.view_as(score_NR), strict=True):
            site.E.masked_fill_(~kept.to(site.E.device), 0.0)
            if last:
                site.kept.copy_(kept)

    @torch.no_grad()
    def _hold(self) -> None:
        """Keep at zero what the last choice left out, whatever an optimiser's momentum says."""
        for site in self.sites:
            site.E.masked_fill_(~site.kept, 0.0)
