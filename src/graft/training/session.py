"""The step, driven from outside: whoever has the samples asks for passes and updates, adapter by adapter.

A run knows its data and its end. A session does not: a service trains the adapters of its clients (tenants) on samples as they come.
Tenants of any kinds share the passes over the base, and each gets what it would get alone.

    session.open("a", graft.LoRA(rank=8))
    session.gradients([Ask("a", samples), Ask("b", others, "ppo")])       add to the gradients of both
    session.update("a", AdamSettings(learning_rate=1e-3))                 one step of AdamW, and the gradients are gone

Losses are sums over targets, never means, so a sample counts the same however its step is cut into asks. Dropout is drawn from the
tenant's seed, its step, the number of the ask in the step and the place of the sample in the ask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.attaching.active import set_trainable
from graft.attaching.attach import attach, detach
from graft.bases.context import context_length
from graft.data.batches import Batch, Layout
from graft.errors import GraftError
from graft.injection.modes import evaluation_mode, set_modes
from graft.injection.state import state_of, unwrapped
from graft.routing.context import ForwardContext
from graft.training.batching import Batcher
from graft.training.forward.causal import Forward
from graft.training.forward.layout import laid_out
from graft.training.forward.modes import set_training
from graft.training.forward.packed import refuse_without_gradients
from graft.training.job import PASS_PART
from graft.training.layouts import Layouts
from graft.training.rows import Row, by_job, row_seed
from graft.training.tenant import AdamSettings, Tenant
from graft.training.tokens import Ask, Given, TokenSample, check_ask, example_of, loss_of, with_targets
from graft.training.trainable import TrainedAdapter


class Session:
    """Trains adapters on a causal base. It belongs to one thread; between its calls the model may be used for other things."""

    def __init__(
        self, model: nn.Module, *, pad_id: int = 0, token_budget: int = 4096, layout: Literal["auto", "padded"] = "auto"
    ) -> None:
        """token_budget: most tokens of a pass, padding counted. layout: auto runs padding-free where that is proved equal.

        Raises `GraftError` for a model without a language-model head.
        """
        self.model, self.root = model, unwrapped(model)
        self.batcher = Batcher(token_budget, "padded", pad_id)
        self.layouts = None if layout == "padded" else Layouts(self.batcher)
        self.tenants: dict[str, Tenant] = {}
        self.vocabulary = int(self.root.get_input_embeddings().weight.shape[0])  # pyright: ignore
        self._forward: Forward | None = None

    def open(self, name: str, adapter: AdapterConfig, seed: int = 0) -> Tenant:
        """Attach a new adapter and make it a tenant. seed: of its initial values and of its dropout.

        Raises `GraftError` for a name that is taken, and for a kind whose schedule needs the number of all steps (AdaLoRA).
        """
        if adapter.needs_gradients:
            raise GraftError(
                f"{adapter.kind} moves its ranks by a schedule over all steps of a run, whose number a session does not know: "
                "choose another kind, or set target_rank to null"
            )
        torch.manual_seed(seed)
        attach(self.model, {name: adapter})
        self.tenants[name] = Tenant(name, TrainedAdapter(self.model, name), seed, context_length(self.model, name))
        return self.tenants[name]

    def close(self, name: str) -> None:
        """Detach a tenant's adapter and forget it."""
        self._tenant(name)
        detach(self.model, name)
        del self.tenants[name]

    def forward(self, asks: Sequence[Ask]) -> list[Given | GraftError]:
        """Compute the losses of all asks in shared passes, without dropout and without gradients. An ask that fails gives its error."""
        with torch.no_grad(), evaluation_mode(self.model):
            return self._by_waves(asks, learning=False)

    def gradients(self, asks: Sequence[Ask]) -> list[Given | GraftError]:
        """Add the gradients of all asks to those of their tenants, in shared passes. An ask that fails gives its error, and leaves the
        gradients of its tenant as they were."""
        names = list(self.tenants)
        set_trainable(self.model, names)
        set_training(self.model, names)
        try:
            return self._by_waves(asks, learning=True)
        finally:
            set_modes(self.root, state_of(self.model), False, ())

    def update(self, name: str, settings: AdamSettings) -> dict[str, float]:
        """Take one step of AdamW on the sums of a tenant's gradients and clear them; see `Tenant.update`."""
        return self._tenant(name).update(settings)

    def save(self, name: str, folder: Path, optimizer: bool = True) -> None:
        """Write a tenant's adapter as an ordinary adapter folder. optimizer: with what training needs to go on."""
        self._tenant(name).save(folder, optimizer)

    def load(self, name: str, folder: Path, optimizer: bool = True) -> None:
        """Put a tenant where `save` left one with the same adapter; see `Tenant.load`."""
        self._tenant(name).load(folder, optimizer)

    def _tenant(self, name: str) -> Tenant:
        if name not in self.tenants:
            raise GraftError(f"there is no tenant '{name}'")
        return self.tenants[name]

    def _by_waves(self, asks: Sequence[Ask], learning: bool) -> list[Given | GraftError]:
        """Run asks so that those of one tenant follow each other, and those of different tenants share passes."""
        found: dict[int, Given | GraftError] = {}
        waiting: list[int] = []
        for number, ask in enumerate(asks):
            try:
                check_ask(ask, self.vocabulary, self._tenant(ask.tenant).longest)
                waiting.append(number)
            except GraftError as error:
                found[number] = error
        while waiting:
            wave = {asks[number].tenant: number for number in reversed(waiting)}  # the first ask of each tenant
            chosen = sorted(wave.values())
            waiting = [number for number in waiting if number not in chosen]
            for layout, own in self._by_layout(asks, chosen).items():
                with laid_out(self.model, layout):
                    given = self._together([asks[number] for number in own], learning, layout)
                found.update(zip(own, given, strict=True))
        return [found[number] for number in range(len(asks))]

    def _by_layout(self, asks: Sequence[Ask], numbers: Sequence[int]) -> dict[Layout, list[int]]:
        """Sort asks by the layout that their tenants' kinds run in."""
        if (layouts := self.layouts) is None:
            return {"padded": list(numbers)}
        known: dict[int, Layout | None] = {number: self._layout(layouts, asks[number]) for number in numbers}
        found: dict[Layout, list[int]] = {}
        for number, own in known.items():
            found.setdefault(layouts.usual if own is None else own, []).append(number)
        return found

    def _layout(self, layouts: Layouts, ask: Ask) -> Layout | None:
        try:
            forward = self._forward or self._proved(self._rows(ask)[0], ask.samples[0])
            return layouts.of(forward, self._tenant(ask.tenant), ask)
        except Exception:  # its pass will fail too, and say why
            return None

    def _together(self, asks: Sequence[Ask], learning: bool, layout: Layout) -> list[Given | GraftError]:
        """Run asks of different tenants in shared passes; where these fail and nobody is known to be the cause, each ask alone."""
        tenants = [self.tenants[ask.tenant] for ask in asks]
        try:
            given = self._passes(asks, learning, replace(self.batcher, layout=layout))
        except Exception as error:
            for tenant in tenants:
                tenant.drop()
            if len(asks) > 1:
                return [each for ask in asks for each in self._together([ask], learning, layout)]
            return [error if isinstance(error, GraftError) else GraftError(f"the pass failed: {error}")]
        return [self._settled(tenant, found, learning) for tenant, found in zip(tenants, given, strict=True)]

    def _settled(self, tenant: Tenant, found: Given, learning: bool) -> Given | GraftError:
        """Keep the gradients of an ask, or drop them and say why."""
        if not math.isfinite(found.loss):
            tenant.drop()
            return GraftError(f"the loss is not finite ({found.loss})")
        try:
            if learning:
                tenant.take()
        except GraftError as error:
            return error
        return found

    def _passes(self, asks: Sequence[Ask], learning: bool, batcher: Batcher) -> list[Given]:
        """Run all samples of asks of different tenants, with backward where they learn, and gather what they gave."""
        by_tenant = {ask.tenant: ask for ask in asks}
        logprobs: dict[str, list[Tensor]] = {ask.tenant: [torch.empty(0)] * len(ask.samples) for ask in asks}
        losses = dict.fromkeys(by_tenant, 0.0)
        for micro in batcher.cut([row for ask in asks for row in self._rows(ask)]):
            samples = [by_tenant[row.job].samples[row.sample] for row in micro]
            forward = self._forward or self._proved(micro[0], samples[0])
            batch, context = inputs(batcher, micro, samples, forward.device, seeded=learning)
            logprob_C = -forward.losses(batch, context)
            if adding := [name for name, own in (context.losses or {}).items() if own]:
                raise GraftError(
                    f"'{adding[0]}' adds a loss that is a mean over a whole step, which a session does not know: choose another kind"
                )
            parts_C = logprob_C.split([sample.cells for sample in samples])
            total = logprob_C.new_zeros(())
            for tenant, own in by_job(micro).items():
                own_C = torch.cat([parts_C[at] for at in own])
                loss = loss_of(by_tenant[tenant], [samples[at] for at in own], own_C)
                total, losses[tenant] = total + loss, losses[tenant] + float(loss.detach())
            if learning and not total.requires_grad:
                raise GraftError(
                    f"the loss of '{asks[0].tenant}' depends on none of its parameters: choose other sites"
                )
            if learning:
                total.backward()
            for row, sample, part in zip(micro, samples, parts_C, strict=True):
                logprobs[row.job][row.sample] = part.detach().cpu().view(sample.targets.shape)
        return [Given(logprobs[ask.tenant], losses[ask.tenant]) for ask in asks]

    def _rows(self, ask: Ask) -> list[Row]:
        """The samples of an ask as rows of a batch, each with the seed of its dropout."""
        tenant = self.tenants[ask.tenant]
        now, name = (tenant.seed, tenant.step, tenant.asks), tenant.name
        common = row_seed(*now, 0, PASS_PART)
        return [
            Row(name, name, example_of(sample, name, at), at, at, 0, "adapter", row_seed(*now, at, 0), common)
            for at, sample in enumerate(ask.samples)
        ]

    def _proved(self, row: Row, sample: TokenSample) -> Forward:
        """Make the forward pass, and choose its way to the logits by a proof on one row."""
        refuse_without_gradients(self.root)
        self._forward = Forward(self.model)
        with torch.no_grad(), evaluation_mode(self.model):
            self._forward.prove_head(*inputs(self.batcher, [row], [sample], self._forward.device, seeded=False))
        return self._forward


def inputs(
    batcher: Batcher, rows: Sequence[Row], samples: Sequence[TokenSample], device: torch.device, seeded: bool
) -> tuple[Batch, ForwardContext]:
    """The batch of these samples with their targets on a device, and its context."""
    return with_targets(batcher.batch(rows), samples).to(device), batcher.context(rows, seeded)
