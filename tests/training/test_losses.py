"""The chunked loss against torch's own cross entropy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from graft.training import losses
from graft.training.losses import Tail, cross_entropy, linear_cross_entropy

TAILS = [Tail(), Tail(cap=3.0), Tail(scale=0.25), Tail(scale=2.0, cap=5.0)]


@pytest.fixture(params=[1, 7, 1000])
def _rows_per_chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", request.param * 11 * 8)


def inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden, head, bias = torch.randn(20, 5).double(), torch.randn(11, 5).double(), torch.randn(11).double()
    return hidden.requires_grad_(), head, bias, torch.randint(0, 11, (20,)), torch.rand(20).double()


def plain(
    logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, tail: Tail
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits * tail.scale
    logits = logits if tail.cap is None else tail.cap * torch.tanh(logits / tail.cap)
    each = F.cross_entropy(logits, target, reduction="none")
    return (each * weight).sum(), each


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.usefixtures("_rows_per_chunk")
def test_loss_and_gradient_equal_cross_entropy_whatever_the_chunk(tail: Tail) -> None:
    hidden, head, bias, target, weight = inputs()
    wanted, each = plain(hidden @ head.T + bias, target, weight, tail)
    (gradient,) = torch.autograd.grad(wanted, hidden)
    per_token = linear_cross_entropy(hidden, head, bias, target, tail)
    (3 * (per_token * weight).sum()).backward()
    torch.testing.assert_close(per_token, each.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden.grad, 3 * gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_rows_per_chunk")
def test_loss_of_ready_logits_equals_cross_entropy_and_leaves_them_alone() -> None:
    _, _, _, target, weight = inputs()
    logits = torch.randn(20, 11).double().requires_grad_()
    before = logits.detach().clone()
    wanted, _ = plain(logits, target, weight, Tail())
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
    torch.testing.assert_close(total, plain(hidden @ head.T + bias, target, weight, Tail())[0])


def test_bfloat16_input_gives_float32_losses_and_a_bfloat16_gradient() -> None:
    hidden, head, bias, target, weight = inputs()
    low = hidden.detach().bfloat16().requires_grad_()
    each = linear_cross_entropy(low, head.bfloat16(), bias.bfloat16(), target)
    total = (each * weight).sum()
    total.backward()
    assert each.dtype == torch.float32 and low.grad is not None and low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(
        total.double(), plain(hidden @ head.T + bias, target, weight, Tail())[0], rtol=2e-2, atol=2e-2
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
