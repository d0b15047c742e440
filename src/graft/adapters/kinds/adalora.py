"""AdaLoRA: a low-rank update in the form of a singular value decomposition, with a rank budget that moves to the sites that need it.

    h' = h + s P (E (.) Q dropout(x)),    s = alpha / (init_rank + epsilon)

Every site starts at `init_rank`. Between `warmup` and `final` the budget b of all sites together falls along a cubic, to `target_rank` per
site on average (t step, T all steps, t_w warm-up, t_f final steps):

    b(t) = b_T + (b_0 - b_T) (1 - (t - t_w) / (T - t_f - t_w))^3

A triplet is a column of P, an entry of E and a row of Q. After each of these steps, the b(t) triplets with the highest scores keep their E.
The other E are set to zero, from where later gradients may bring them back. The choice at the start of `final` is kept to the end.

Example: 4 sites with init_rank 12 and target_rank 8 fall from 48 to 32 triplets. Half-way, 32 + 16 (1/2)^3 = 34 are left.

The score of a triplet is that of its E plus the mean scores of its column and its row. The score of one entry w is

    S = mean_b1(I) * mean_b2(|I - mean_b1(I)|),    I = |w * dL/dw|        (running means)

The loss grows by gamma times the mean of ||P^T P - 1|| and ||Q Q^T - 1|| (Frobenius) over all sites.

Zhang et al. 2023, "AdaLoRA" (arXiv 2303.10512), equations 7 to 11. The order of calls and the scale are PEFT's.

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

UNREPORTED_STEPS = 3
"""After this many weight changes without `after_step` a warning is due. One of them may be a trial step that is taken back."""


class AdaLoRA(AdapterConfig):
    """Low-rank update that moves rank to the sites that need it."""

    source = "arXiv 2303.10512"
    suits = "For a tight rank budget when you do not know which layers need it. The number of steps must be known in advance."

    kind: Literal["adalora"] = "adalora"
    init_rank: int = Field(default=12, ge=1)
    """Rank of every site at the start."""
    target_rank: int | None = Field(default=8, ge=1)
    """Mean rank of the sites at the end. None: ranks stay as they are, as in a saved adapter."""
    alpha: float = 16.0
    """Numerator of the scale alpha / (init_rank + epsilon). The scale does not follow the rank."""
    epsilon: float = Field(default=1e-5, ge=0.0)
    """Number that is added to the rank in the scale, as in PEFT. 0 gives the paper's scale."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the input of Q."""
    warmup: int | float = Field(default=0.1, ge=0)
    """Steps before the budget begins to fall. A float below 1 is a fraction of all steps."""
    final: int | float = Field(default=0.3, ge=0)
    """Steps at the end, in which ranks no longer change. A float below 1 is a fraction of all steps."""
    interval: int = Field(default=1, ge=1)
    """Steps from one choice of triplets to the next."""
    beta1: float = Field(default=0.85, gt=0.0, lt=1.0)
    """Weight of the past in the running mean of the sensitivity I."""
    beta2: float = Field(default=0.85, gt=0.0, lt=1.0)
    """Weight of the past in the running mean of the deviation of I from its mean."""
    orthogonality: float = Field(default=0.5, ge=0.0)
    """Factor gamma of the penalty that keeps P and Q orthogonal."""
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

    @property
    def needs_gradients(self) -> bool:
        return self.target_rank is not None

    def collapsed(self) -> AdaLoRA:
        return self.model_copy(update={"target_rank": None})


class AdaLoRAAdapter(WeightDelta):
    """P [O, R] and Q [R, I] from N(0, 0.02), E [R] at zero, and `kept` [R], which marks the triplets in use.

    While ranks change, the module also has the running means of sensitivity and deviation of every entry as buffers. A training checkpoint
    stores them, so that a resumed run is exact.
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
        shared.adapters = (*shared.adapters, self)

    def apply_to(self, x: Tensor) -> Tensor:
        values_R = torch.where(self.kept, self.E, 0.0) * self.scale
        low_R = F.linear(x, self.Q.to(x.dtype)) * values_R.to(x.dtype)  # [..., R]
        return F.linear(low_R, self.P.to(x.dtype))  # [..., O]

    def difference(self) -> Tensor:
        return (self.P * torch.where(self.kept, self.E, 0.0) * self.scale) @ self.Q  # [O, I]

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
        """Update the running means with the gradients of this step."""
        for key in "PEQ":
            weight, mean, deviation = (getattr(self, name) for name in (key, f"sensitivity_{key}", f"deviation_{key}"))
            if weight.grad is None:
                continue
            sensitivity = (weight * weight.grad).abs()
            mean.mul_(beta1).add_(sensitivity, alpha=1 - beta1)
            # The deviation is that from the mean with this step in it.
            deviation.mul_(beta2).add_((sensitivity - mean).abs(), alpha=1 - beta2)

    def scores(self) -> Tensor:
        """Return the score of each triplet [R]."""
        # [O, R], [R], [R, I]
        P, E, Q = (getattr(self, f"sensitivity_{key}") * getattr(self, f"deviation_{key}") for key in "PEQ")
        return E + P.mean(0) + Q.mean(1)


class Allocator(Shared):
    """Distribute the rank budget over the sites of one adapter after each optimiser step, and penalise P and Q that are not orthogonal."""

    def __init__(self, config: AdaLoRA) -> None:
        super().__init__()
        assert config.target_rank is not None
        self.config = config
        self.target = config.target_rank
        self.adapters: tuple[AdaLoRAAdapter, ...] = ()
        """The module of each site, which registers itself in `share`. A tuple, so that their parameters stay out of this module's own."""
        self.unreported: int | None = 0
        """Optimiser steps without a call of `after_step`. None after the first call, or once the warning was given."""
        self.last_E: Tensor | None = None
        """E of the first site in the last training pass. Tensor versions would not do: torch's fused optimisers do not raise them."""

    def penalty(self) -> Tensor | None:
        if not self.config.orthogonality:
            return None
        grams = [gram for each in self.adapters for gram in (each.P.T @ each.P, each.Q @ each.Q.T)]
        norms = [(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).norm() for gram in grams]
        return self.config.orthogonality * torch.stack(norms).mean()

    def watch(self, adapter: AdaLoRAAdapter) -> None:
        """Warn once if weights change from pass to pass but nobody calls `after_step`, so that ranks never change."""
        if self.unreported is None or adapter is not self.adapters[0]:
            return
        if self.last_E is not None and torch.equal(adapter.E, self.last_E):
            return
        self.unreported, self.last_E = self.unreported + (self.last_E is not None), adapter.E.detach().clone()
        if self.unreported == UNREPORTED_STEPS:
            self.unreported = None
            warnings.warn(
                "an AdaLoRA adapter is being trained, but its ranks do not change, because nothing reports the optimiser steps to it. "
                "With a Trainer, pass callbacks=[graft.callback()]. In a loop of your own, add graft.penalty(model, name) to the loss and "
                "call graft.after_step(model, name, step, steps) after optimizer.step(). To keep all ranks, set target_rank: null",
                stacklevel=2,
            )

    def after_step(self, step: int, steps: int) -> None:
        self.unreported = None
        warmup, end = self.schedule(steps)
        if step < end:
            for adapter in self.adapters:
                adapter.note_gradient(self.config.beta1, self.config.beta2)
        if step == end or (warmup < step < end and step % self.config.interval == 0):
            self._choose(self.budget(step, steps), last=step == end)
        elif step > end:
            self._hold()

    def schedule(self, steps: int) -> tuple[int, int]:
        """Return (last step of the warm-up, step of the last choice). Raises `GraftError` if no step is left between them."""
        warmup, final = (
            round(value * steps) if isinstance(value, float) and value < 1 else int(value)
            for value in (self.config.warmup, self.config.final)
        )
        if warmup >= steps - final:
            raise GraftError(
                f"AdaLoRA with {warmup} warm-up and {final} final steps has no steps left to move ranks in a run of {steps} steps: "
                "lower `warmup` or `final`, or train longer"
            )
        return warmup, steps - final

    def budget(self, step: int, steps: int) -> int:
        """Return the number of triplets, over all sites, that are kept after a step."""
        warmup, end = self.schedule(steps)
        start, target = self.config.init_rank * len(self.adapters), self.target * len(self.adapters)
        left = 1 - (min(max(step, warmup), end) - warmup) / (end - warmup)  # from 1 to 0
        return int((start - target) * left**3 + target)

    @torch.no_grad()
    def _choose(self, budget: int, last: bool) -> None:
        """Set the E of all but the best triplets to zero. `last` makes the choice permanent.

        With 2 sites of rank 3, scores [[5, 1, 4], [3, 0, 2]] and a budget of 4, site 0 keeps triplets 0 and 2, site 1 keeps 0 and 2.
        """
        score_NR = torch.stack([adapter.scores().to(self.adapters[0].E.device) for adapter in self.adapters])
        chosen = torch.zeros(score_NR.numel(), dtype=torch.bool, device=score_NR.device)
        chosen[score_NR.flatten().argsort(descending=True, stable=True)[:budget]] = (
            True  # stable: ties go to the earlier site
        )
        for adapter, kept_R in zip(self.adapters, chosen.view_as(score_NR), strict=True):
            adapter.E.masked_fill_(~kept_R.to(adapter.E.device), 0.0)
            if last:
                adapter.kept.copy_(kept_R)

    @torch.no_grad()
    def _hold(self) -> None:
        """Set the E that the last choice left out to zero again, since an optimiser's momentum may have moved them."""
        for adapter in self.adapters:
            adapter.E.masked_fill_(~adapter.kept, 0.0)
