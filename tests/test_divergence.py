"""The divergence of two passes against torch's own KL, with the targets of each detached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graft.ops import divergence
from graft.ops.cross_entropy import LogitTransform
from graft.ops.divergence import two_pass_losses


def reference(z: Tensor, w: Tensor, target: Tensor, e: float) -> tuple[Tensor, Tensor]:
    log_p, log_q = F.log_softmax(z, 1), F.log_softmax(w, 1)
    apart = F.kl_div(log_p, log_q.detach().exp(), reduction="none") + F.kl_div(
        log_q, log_p.detach().exp(), reduction="none"
    )
    return F.cross_entropy(z, target, label_smoothing=e, reduction="none"), apart.sum(1) / 2


@pytest.mark.parametrize("chunk", [10**9, 700])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.5), LogitTransform(scale=2.0, cap=3.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_and_gradients_are_those_of_torch(
    chunk: int, transform: LogitTransform, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "CHUNK_BYTES", chunk)
    torch.manual_seed(0)
    head, bias, target = torch.randn(11, 6).double(), torch.randn(11).double(), torch.randint(11, (7,))
    x, y = (torch.randn(7, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.rand(2, 7).double()

    def total(found: Any) -> Tensor:
        return sum((each * weight).sum() for each, weight in zip(found, weights, strict=True))  # pyright: ignore

    def bent(z: Tensor) -> Tensor:
        z = z * transform.scale
        return z if transform.cap is None else transform.cap * torch.tanh(z / transform.cap)

    wanted = reference(*(bent(F.linear(each, head, bias)) for each in (x, y)), target, smoothing)
    found = two_pass_losses(x, y, target, torch.full((7,), smoothing), head, bias, transform)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(total(found), (x, y)), torch.autograd.grad(total(wanted), (x, y)), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-12)


def test_equal_passes_do_not_diverge_and_the_gradient_is_half_the_difference() -> None:
    z, w = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    target, none = torch.zeros(5, dtype=torch.long), torch.zeros(5)
    assert not two_pass_losses(z, z.detach(), target, none)[1].any()
    two_pass_losses(z, w, target, none)[1].mean().backward()
    apart = (z.softmax(1) - w.softmax(1)).detach() / (2 * 5)
    assert z.grad is not None and w.grad is not None
    assert torch.allclose(z.grad, apart, atol=1e-12) and torch.allclose(w.grad, -apart, atol=1e-12)
