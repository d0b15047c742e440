"""Several adapters on one base: they do not touch each other, and a mixed batch equals each alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.attaching.active import route, set_active, set_trainable, use
from graft.attaching.attach import detach
from graft.attaching.parameters import names, parameters
from graft.attaching.renaming import copy, rename
from graft.testing.bases import ids, logits, loss, outputs
from graft.testing.case import Case
from graft.testing.checks.promise import close, equal, gradients, holds, listed, promise, same_gradients

MIXED = ("a", None, "b", "a")
"""Which adapter serves each row of a mixed batch."""


def alone(model: nn.Module, name: str | None, inputs: Tensor) -> Tensor:
    """Return the logits with one adapter for all rows."""
    with use(model, name):
        return logits(model, inputs)


def trained(model: Any, name: str, batch: Tensor) -> None:
    """Train one adapter for two steps."""
    set_active(model, name)
    optimizer = torch.optim.AdamW([p for _, p in parameters(model, name)], lr=1e-2)
    for _ in range(2):
        loss(model.train(), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@promise("Training one adapter leaves another on the same base untouched, bit for bit.")
def check_training_leaves_others_untouched(case: Case) -> None:
    model, inputs = case.attached("a", "b"), ids()
    expected = alone(model, "b", inputs)
    tensors = {name: p.detach().clone() for name, p in parameters(model, "b")}
    trained(model, "a", inputs)
    changed = [name for name, p in parameters(model, "b") if not torch.equal(p, tensors[name])]
    holds(not changed, f"training adapter 'a' changed adapter 'b' at {listed(changed)}")
    equal(alone(model, "b", inputs), expected, "after training 'a', the output with 'b' is the same")


@promise("Each row of a mixed batch gets what its own adapter, or the bare base, computes alone.")
def check_mixed_batch_equals_each_alone(case: Case) -> None:
    model, inputs = case.attached("a", "b"), ids(4)
    with route(model, MIXED):
        mixed = logits(model, inputs)
    for number, name in enumerate(MIXED):
        whole = alone(model, name, inputs)
        # One row by itself, which also shows a kind that mixes the rows of one adapter.
        single = alone(model, name, inputs[number : number + 1])[0]
        what = f"row {number} of a mixed batch, with {name or 'the bare base'}"
        close(mixed[number], whole[number], 2e-5, f"{what}, equals that row in a batch of that adapter alone")
        close(
            whole[number],
            single,
            3e-5,
            f"row {number} of a batch, with {name or 'the bare base'}, equals the row by itself",
        )


@promise("The gradients of a mixed batch are those of each adapter's rows alone.")
def check_mixed_gradients_equal_each_alone(case: Case) -> None:
    model, inputs = case.attached("a", "b"), ids(4)
    set_trainable(model, ["a", "b"])

    def taken(rows: tuple[str | None, ...], batch: Tensor) -> dict[str, Tensor]:
        with route(model, rows):
            outputs(model, batch).square().sum().backward()
        return gradients(model)

    together, apart = taken(MIXED, inputs), {}
    for name in "ab":
        chosen = [number for number, other in enumerate(MIXED) if other == name]
        part = taken((name,) * len(chosen), inputs[chosen])
        apart |= {key: tensor for key, tensor in part.items() if key.startswith(f"{name}.")}
    what = "the gradients of a mixed batch are those of each adapter's rows alone"
    same_gradients(together, apart, lambda gradient: 2e-3 * float(gradient.abs().max()), what)


@promise("A copy and a renamed adapter compute the same, and the copy then trains by itself.")
def check_copy_and_rename(case: Case) -> None:
    model, inputs = case.attached(), ids()
    expected = logits(model, inputs)
    copy(model, "a", "b")
    rename(model, "a", "z")
    holds(names(model) == ("z", "b"), f"after copying 'a' to 'b' and renaming it to 'z', there are {names(model)}")
    for name in names(model):
        equal(alone(model, name, inputs), expected, f"'{name}', a copy or the renamed original, gives the same output")
    trained(model, "b", inputs)
    equal(alone(model, "z", inputs), expected, "after training the copy, the original gives the same output")
    holds(not torch.equal(alone(model, "b", inputs), expected), "two training steps do not change the copy's output")
    detach(model, "z")
    holds(names(model) == ("b",), f"after detaching 'z', there are {names(model)}")
