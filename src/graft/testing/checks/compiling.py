"""Compiling: `torch.compile` gives the same loss and gradients, and one graph serves every adapter, every routing and none."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.exc import RecompileError, TorchDynamoException

from graft.attaching.active import route, set_trainable, use
from graft.testing.bases import ids, loss
from graft.testing.case import Case, DoesNotApply
from graft.testing.checks.promise import close, gradients, holds, may_refuse, promise

Choice = str | None | tuple[str | None, ...]
"""One adapter for all rows, none, or one entry per row."""


def measured(model: nn.Module, run: Any, choice: Choice, inputs: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients under one choice, which is left before backward. run: the model, or what it was compiled to."""
    with route(model, choice) if isinstance(choice, tuple) else use(model, choice):
        value = loss(run, inputs, use_cache=False)
    if value.requires_grad:
        value.backward()
    return value.item(), gradients(model)


def same_under_every_choice(
    model: nn.Module, compiled: Any, choices: Sequence[Choice], inputs: Tensor, tolerance: float
) -> None:
    """Raise AssertionError unless the compiled model gives the plain one's loss and gradients under every choice, with one graph.

    A graph computes every adapter for all rows and selects, so it also gives zero gradients to those that serve no row.
    """
    for number, choice in enumerate(choices):
        value, wanted = measured(model, model, choice, inputs)
        with dynamo.patch(error_on_recompile=True) if number else nullcontext():
            other, found = measured(model, compiled, choice, inputs)
        what = f"compiled, with {choice or 'the bare base'},"
        holds(abs(other - value) <= tolerance, f"{what} the loss is {other} instead of {value}")
        for name, gradient in found.items():
            expected = wanted.get(name, torch.zeros_like(gradient))
            close(
                gradient,
                expected,
                tolerance * max(1.0, float(expected.abs().max())),
                f"{what} the gradient of {name} is the same",
            )
        missing = sorted(set(wanted) - set(found))
        holds(not missing, f"{what} no gradient reaches {missing}")


@promise(
    "torch.compile makes one full graph that gives the same loss and gradients and serves every adapter and routing."
)
def check_one_compiled_graph_serves_every_choice(case: Case) -> None:
    model = case.attached("a", "b")
    set_trainable(model, ("a", "b"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    try:
        with may_refuse("to be compiled"):
            same_under_every_choice(model, compiled, ("a", "b", None, ("b", None, "a", "b")), ids(4), 2e-5)
    except RecompileError as error:
        raise AssertionError(
            f"switching to another adapter or routing compiled the model again: {first_line(error)}"
        ) from error
    except TorchDynamoException as error:
        refusal = next((line for line in str(error).splitlines() if "GraftError" in line), None)
        if refusal is not None:
            raise DoesNotApply(f"the kind refuses to be compiled: {refusal.strip()}") from error
        raise AssertionError(f"torch.compile cannot make one full graph of the model: {first_line(error)}") from error
    finally:
        torch._dynamo.reset()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
