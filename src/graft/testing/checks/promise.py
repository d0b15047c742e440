"""A promise of the contract as a function, and the comparisons that its message is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.attaching.parameters import names, parameters
from graft.errors import GraftError
from graft.errors import listed as all_listed
from graft.testing.case import Case, DoesNotApply


@dataclass(frozen=True)
class Check:
    """One promise. Calling it with a case raises AssertionError when the promise is broken, DoesNotApply when it says nothing."""

    name: str
    """The function's name without `check_`."""
    promise: str
    """What is promised, in one sentence."""
    function: Callable[[Case], None]

    def __call__(self, case: Case) -> None:
        self.function(case)


CHECKS: dict[str, Check] = {}
"""Every check by its name, in the order in which they run."""


def promise(sentence: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Enter a function in the table of checks with the promise that it checks."""

    def entered(function: Callable[[Case], None]) -> Callable[[Case], None]:
        name = function.__name__.removeprefix("check_")
        assert name not in CHECKS, name
        CHECKS[name] = Check(name, sentence, function)
        function.__doc__ = sentence
        return function

    return entered


def holds(condition: bool, message: str) -> None:
    """Raise AssertionError with this message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def equal(found: Tensor, wanted: Tensor, what: str, advice: str = "") -> None:
    """Raise AssertionError unless two tensors are the same bit for bit. what: the beginning of the message; advice: its end."""
    same = torch.equal(found, wanted)
    holds(same, f"{what}, bit for bit: {difference(found, wanted)}{f'. To keep this, {advice}' if advice else ''}")


def close(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Raise AssertionError unless two tensors differ nowhere by more than `tolerance`. what: the beginning of the message."""
    same_kind = found.shape == wanted.shape and found.dtype == wanted.dtype
    # A NaN is within no tolerance.
    near = same_kind and bool(((found - wanted).abs() <= tolerance).all())
    holds(near, f"{what}: {difference(found, wanted)} (allowed: {tolerance:.1g})")


def difference(found: Tensor, wanted: Tensor) -> str:
    """Say how two tensors differ."""
    if found.shape != wanted.shape:
        return f"found shape {tuple(found.shape)} instead of {tuple(wanted.shape)}"
    if found.dtype != wanted.dtype:
        return f"found dtype {found.dtype} instead of {wanted.dtype}"
    apart = (found.double() - wanted.double()).abs()
    number = int((apart != 0).sum())  # NaN counts too
    return f"{number} of {apart.numel()} numbers differ, by up to {float(apart.max()):.2g}"


def listed(found: Iterable[str], most: int = 3) -> str:
    """Write a list of names, the first few in full."""
    return all_listed(list(found), most)


@contextmanager
def raises(error: type[BaseException], message: str) -> Iterator[None]:
    """Expect an error in a block of code; raise AssertionError with this message when there is none."""
    try:
        yield
    except error:
        return
    raise AssertionError(message)


@contextmanager
def may_refuse(what: str) -> Iterator[None]:
    """Let a kind refuse something in a block of code with a GraftError, which says what to do instead."""
    try:
        yield
    except GraftError as error:
        raise DoesNotApply(f"the kind refuses {what}: {error}") from error


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return all adapters' gradients as "adapter.parameter" -> gradient, and clear them."""
    found = {
        f"{name}.{key}": p.grad.clone()
        for name in names(model)
        for key, p in parameters(model, name)
        if p.grad is not None
    }
    model.zero_grad()
    return found


def same_gradients(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: Any, what: str) -> None:
    """Raise AssertionError unless both hold the same parameters with the same gradients.

    tolerance: a function from the wanted gradient to the largest difference allowed. what: the beginning of the message.
    """
    apart = sorted(set(found) ^ set(wanted))
    holds(not apart, f"{what}: only one of the two passes gives a gradient to {listed(apart)}")
    for name, gradient in wanted.items():
        close(found[name], gradient, tolerance(gradient), f"{what}, at {name}")
