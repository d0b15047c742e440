"""Couplings of invertible adapters: the inverse undoes them, and each computes its equation."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch

from graft.adapters.kinds.invertible import Coupling, Invertible
from graft.architectures.site import SiteSpec


def coupling(form: Literal["nice", "glow"], size: float) -> Coupling:
    spec = SiteSpec("embed", "embedding", "wte", 8, 8, None, 0, torch.float64, torch.device("cpu"))
    made = Coupling(Invertible(coupling=form, activation="tanh"), spec, 8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * size)
    return made


@pytest.mark.parametrize("form", ["nice", "glow"])
@pytest.mark.parametrize("size", [0.3, 30.0])
def test_the_inverse_undoes_the_coupling(form: Any, size: float) -> None:
    made, x = (
        coupling(form, size),
        torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    )
    torch.testing.assert_close(made.inverse(made(x)), x, atol=1e-9 * size, rtol=0)


@torch.no_grad()
def test_glow_scales_and_moves_each_half_by_the_other() -> None:
    made = coupling("glow", 0.5)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = made(x)
    for row in range(4):
        s, t = made.F(x[row, 4:])[:4], made.F(x[row, 4:])[4:]
        first = [
            math.exp(10 / math.pi * math.atan(float(a) / 5)) * float(b) for a, b in zip(s, x[row, :4], strict=True)
        ]
        assert y[row, :4].tolist() == pytest.approx([a + float(b) for a, b in zip(first, t, strict=True)])
        s, t = made.G(y[row, :4])[:4], made.G(y[row, :4])[4:]
        second = [
            math.exp(10 / math.pi * math.atan(float(a) / 5)) * float(b) for a, b in zip(s, x[row, 4:], strict=True)
        ]
        assert y[row, 4:].tolist() == pytest.approx([a + float(b) for a, b in zip(second, t, strict=True)])
