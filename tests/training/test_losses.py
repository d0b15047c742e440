"""The chunked loss against torch's own cross entropy."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from graft.ops import cross_entropy as losses
from graft.ops.cross_entropy import LogitTransform, cross_entropy, linear_cross_entropy

TAILS = [LogitTransform(), LogitTransform(cap=3.0), LogitTransform(scale=0.25), LogitTransform(scale=2.0, cap=5.0)]


@pytest.fixture(params=[1, 7, 1000])
def _rows_per_chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", request.param * 11 * 8)


def inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden, head, bias = torch.randn(20, 5).double(), torch.randn(11, 5).double(), torch.randn(11).double()
    return hidden.requires_grad_(), head, bias, torch.randint(0, 11, (20,)), torch.rand(20).double()


def plain(
    logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, tail: LogitTransform
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits * tail.scale
    logits = logits if tail.cap is None else tail.cap * torch.tanh(logits / tail.cap)
    each = F.cross_entropy(logits, target, reduction="none")
    return (each * weight).sum(), each


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.usefixtures("_rows_per_chunk")
def test_loss_and_gradient_equal_cross_entropy_whatever_the_chunk(tail: LogitTransform) -> None:
    hidden, head, bias, target, weight = inputs()
    wanted, each = plain(hidden @ head.T + bias, target, weight, tail)
    (gradient,) = torch.autograd.grad(wanted, hidden)
    per_token = linear_cross_entropy(hidden, head, bias, target, tail)
    (3 * (per_token * weight).sum()).backward()
    torch.testing.assert_close(per_token, each.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden.grad, 3 * gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_rows_per_chunk")
class Watching(TorchDispatchMode):
    """The most logits in memory at any moment: tensors that are as wide as the vocabulary, and the rows of one."""

    def __init__(self, head: torch.Tensor) -> None:
        super().__init__()
        self.head, self.made, self.most, self.rows = head, list[Any](), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == len(self.head):
            self.made.append(weakref.ref(out))
            self.most = max(self.most, len(self.alive))
            self.rows = max(self.rows, *(len(logits) for logits in self.alive.values()), 0)
        return out

    @property
    def alive(self) -> dict[int, torch.Tensor]:
        """By place in memory, views of the head's weight left out."""
        there = {each.data_ptr(): each for ref in self.made if (each := ref()) is not None}
        return {place: logits for place, logits in there.items() if place != self.head.data_ptr()}


def test_one_chunk_of_logits_is_alive_at_a_time_and_none_is_kept_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", 7 * 11 * 8)
    hidden, head, _, target, _ = inputs()
    with Watching(head) as seen:
        loss = linear_cross_entropy(hidden, head, None, target).sum()
        assert (seen.most, seen.rows) == (1, 7) and not seen.alive
        loss.backward()
        assert (seen.most, seen.rows) == (1, 7)


def test_loss_of_ready_logits_equals_cross_entropy_and_leaves_them_alone() -> None:
    _, _, _, target, weight = inputs()
    logits = torch.randn(20, 11).double().requires_grad_()
    before = logits.detach().clone()
    wanted, _ = plain(logits, target, weight, LogitTransform())
    (gradient,) = torch.autograd.grad(wanted, logits)
    total = (cross_entropy(logits, target) * weight).sum()
    total.backward()
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(logits.grad, gradient)
    assert torch.equal(logits.detach(), before)


def test_loss_without_gradient_is_the_same() -> None:
    hidden, head, bias, target, weight = inputs()
    with torch.no_grad():
        total = (linear_cross_entropy(hidden, head, bias, target) * weight).sum()
    torch.testing.assert_close(total, plain(hidden @ head.T + bias, target, weight, LogitTransform())[0])


def test_bfloat16_input_gives_float32_losses_and_a_bfloat16_gradient() -> None:
    hidden, head, bias, target, weight = inputs()
    low = hidden.detach().bfloat16().requires_grad_()
    each = linear_cross_entropy(low, head.bfloat16(), bias.bfloat16(), target)
    total = (each * weight).sum()
    total.backward()
    assert each.dtype == torch.float32 and low.grad is not None and low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(
        total.double(), plain(hidden @ head.T + bias, target, weight, LogitTransform())[0], rtol=2e-2, atol=2e-2
    )


def test_logits_of_large_size_do_not_overflow() -> None:
    hidden = torch.full((2, 1), 1e4, requires_grad=True)
    head = torch.tensor([[1.0], [-1.0]])
    each = linear_cross_entropy(hidden, head, None, torch.tensor([0, 1]))
    each.sum().backward()
    assert each.tolist() == [0.0, 2e4] and torch.isfinite(hidden.grad).all()


def test_no_supervised_token_gives_zero_loss_and_gradient() -> None:
    hidden, head, bias, _, _ = inputs()
    nothing = hidden.detach()[:0].requires_grad_()
    each = linear_cross_entropy(nothing, head, bias, torch.zeros(0, dtype=torch.long))
    each.sum().backward()
    assert each.numel() == 0 and nothing.grad is not None


@pytest.mark.usefixtures("_rows_per_chunk")
def test_whatever_is_made_of_the_losses_reaches_the_gradient() -> None:
    """A function that is not linear in them: its gradient is no fixed weight per token."""
    hidden, head, bias, target, _ = inputs()

    def objective(each: torch.Tensor) -> torch.Tensor:
        return F.logsigmoid(each[:8].sum() - each[8:].sum()) + each.square().mean()

    (wanted,) = torch.autograd.grad(
        objective(F.cross_entropy(hidden @ head.T + bias, target, reduction="none")), hidden
    )
    (given,) = torch.autograd.grad(objective(linear_cross_entropy(hidden, head, bias, target)), hidden)
    torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)
