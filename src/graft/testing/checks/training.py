"""Training: every parameter learns, training goes on from a stored state, a row draws its dropout from its own seed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from graft.attaching.active import running, use
from graft.attaching.parameters import parameters
from graft.attaching.saving import load_training_state, training_state
from graft.routing.context import ForwardContext
from graft.testing.bases import ids, logits, loss
from graft.testing.case import Case, DoesNotApply
from graft.testing.checks.promise import close, equal, holds, listed, promise

STEPS = 3
"""Optimizer steps until every parameter must have moved. After a start at zero, the first gradient of the other factor is zero."""


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """Return an optimiser over one adapter's parameters."""
    return torch.optim.AdamW([p for _, p in parameters(model, name)], lr=1e-2)


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> float:
    """Take one optimizer step in training mode on a batch of this seed, and return its loss."""
    model.train()
    value = loss(model, ids(4, 8, seed))
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


@promise("Every parameter trains, also when evaluation and training alternate.")
def check_every_parameter_trains(case: Case) -> None:
    model = case.attached(fresh=True)
    before = {name: p.detach().clone() for name, p in parameters(model, "a")}
    holds(bool(before), "the adapter has no parameters")
    frozen = [name for name, p in parameters(model, "a") if not p.requires_grad]
    holds(not frozen, f"a new active adapter trains, but these do not require gradients: {listed(frozen)}")
    optimizer, seen = optimizer_of(model, "a"), []
    for seed in range(STEPS):
        model.eval()
        with torch.no_grad():
            seen.append(logits(model, ids(4, 8)))
        step(model, optimizer, seed)
    stuck = [name for name, p in parameters(model, "a") if torch.equal(p, before[name])]
    holds(
        not stuck,
        f"after {STEPS} steps, {len(stuck)} of {len(before)} parameters have not changed: {listed(stuck)}. Use each parameter "
        "in the forward pass, without .detach() or .data, and start no two factors of a product at zero; make a constant a buffer",
    )
    stale = any(torch.equal(earlier, later) for earlier, later in pairwise(seen))
    holds(not stale, "evaluation does not follow training: a step has changed no output")


@promise("Training goes on from a stored state to the losses of an unbroken run.")
def check_resumes_to_the_same_losses(case: Case) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = case.attached(fresh=True)
        torch.manual_seed(8)
        return model, optimizer_of(model, "a")

    model, optimizer = fresh()
    unbroken = [step(model, optimizer, seed) for seed in range(4)]
    model, optimizer = fresh()
    for seed in range(2):
        step(model, optimizer, seed)
    stored: dict[str, Tensor] = {name: tensor.clone() for name, tensor in training_state(model, "a").items()}
    moments, rng = optimizer.state_dict(), torch.get_rng_state()
    model, optimizer = fresh()
    load_training_state(model, "a", stored)
    optimizer.load_state_dict(moments)
    torch.set_rng_state(rng)
    resumed = [step(model, optimizer, seed) for seed in range(2, 4)]
    holds(
        resumed == unbroken[2:],
        f"resumed after two steps, the losses are {resumed} instead of {unbroken[2:]}: keep everything that training needs "
        "in parameters or persistent buffers",
    )


@promise("A row draws the same dropout in a joint run as alone: its mask depends on its own seed only (ctx.dropout).")
def check_dropout_follows_the_row_seed(case: Case) -> None:
    model, inputs = case.attached("a", "b").train(), ids(3)

    def drawn(
        rows: Any, lengths: tuple[int, ...], seeds: tuple[int, ...] | None, chosen: Tensor, rng: int, of_pass: int = 9
    ) -> Tensor:
        shared = None if seeds is None else (of_pass,) * len(seeds)  # what the rows of a pass draw together
        with torch.random.fork_rng(), running(model, ForwardContext(rows, lengths, seeds=seeds, pass_seeds=shared)):
            torch.manual_seed(rng)
            # In a causal model no real token sees the padding after it; elsewhere the mask hides it.
            mask = torch.tensor([[1] * length + [0] * (chosen.shape[1] - length) for length in lengths])
            return logits(model, chosen, **({} if case.causal else {"attention_mask": mask}))

    last = inputs[2:, :5]
    if torch.equal(drawn("a", (5,), None, last, 1), drawn("a", (5,), None, last, 2)):
        raise DoesNotApply("the adapter draws no random numbers in training")
    alone = drawn("a", (5,), (3,), last, 1)
    advice = "draw with ctx.dropout(x, p, self.site_index), not with nn.Dropout or torch.rand"
    equal(
        drawn("a", (5,), (3,), last, 2),
        alone,
        "with the same row seed, training mode draws the same dropout whatever torch's global seed is",
        advice,
    )
    batch = drawn(("a", "b", "a"), (7, 7, 5), (1, 2, 3), inputs, 1)
    close(batch[2, :5], alone[0], 2e-5, f"a row draws the same dropout in a joint batch as alone ({advice})")
    holds(
        not torch.allclose(batch[2, :5], drawn("a", (5,), (4,), last, 1, of_pass=10)[0], atol=1e-3),
        f"two seeds of a row give the same dropout ({advice})",
    )
    with use(model.eval(), None):
        equal(logits(model, inputs), case.base_logits(inputs), "after training passes, the bare base is what it was")
    with torch.random.fork_rng():
        first = logits(model, inputs)
        torch.manual_seed(99)
        equal(logits(model, inputs), first, "in evaluation mode nothing is dropped: two passes give the same output")
