"""A stand-in for the package liger_kernel: torch functions with its contracts, and its habit of writing into arguments."""

from __future__ import annotations

import importlib.metadata
import sys
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

CALLS: Counter[str] = Counter()
"""How often each function ran, by name."""


class LigerRMSNormFunction(torch.autograd.Function):
    """y = x r (offset + w) with r = 1 / sqrt(mean(x^2) + eps); "llama" rounds x r to x's dtype, "gemma" the result."""

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, W: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama",
        in_place: bool = True, row_mode: bool | None = None,
    ) -> Tensor:  # fmt: skip
        CALLS["rms_norm"] += 1
        wide = X.float()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(X, W, rstd)
        ctx.offset, ctx.in_place = offset, in_place
        if casting_mode == "llama":
            return (wide * rstd).to(X.dtype) * (offset + W)
        return (wide * rstd * (offset + W.float())).to(X.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dY,), (X, W, rstd) = grads, ctx.saved_tensors
        wide, m = X.float(), dY.float() * (ctx.offset + W.float())
        dX = rstd * (m - wide * rstd.square() * (m * wide).mean(-1, keepdim=True))
        dW = (dY.float() * wide * rstd).flatten(0, -2).sum(0).to(W.dtype)
        if ctx.in_place:
            return dY.copy_(dX), dW, None, None, None, None, None
        return dX.to(X.dtype), dW, None, None, None, None, None


def _turn_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate where x lies, if that is laid out [B, L, H, D]; else in a copy that is."""
    rows = x.transpose(1, 2).contiguous()
    half = rows.shape[-1] // 2
    first, second = rows[..., :half].clone(), rows[..., half:].clone()
    cos, sin = cos[..., :half].unsqueeze(2), sin[..., :half].unsqueeze(2)
    rows[..., :half] = first * cos - second * sin
    rows[..., half:] = second * cos + first * sin
    return rows.transpose(1, 2)


def rope_forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    CALLS["rope_forward"] += 1
    return _turn_(q, cos, sin), _turn_(k, cos, sin), cos, sin


def rope_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    CALLS["rope_backward"] += 1
    return _turn_(dq, cos, -sin), _turn_(dk, cos, -sin)


def swiglu_forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    CALLS["swiglu_forward"] += 1
    return a, b, (a.float() * torch.sigmoid(a.float())).to(b.dtype) * b


def put_in_place(monkeypatch: pytest.MonkeyPatch, version: str = "9.0", **changed: Any) -> None:
    """Let `import liger_kernel` find the stand-in, and kernels run on a CPU, as Triton's interpreter does. `changed` replaces functions."""
    functions = {
        "rms_norm": {"LigerRMSNormFunction": LigerRMSNormFunction},
        "rope": {"rope_forward": rope_forward, "rope_backward": rope_backward},
        "swiglu": {"swiglu_forward": swiglu_forward},
    }
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, found in functions.items():
        module = ModuleType(f"liger_kernel.ops.{name}")
        module.__dict__.update({key: changed.get(key, value) for key, value in found.items()})
        monkeypatch.setitem(sys.modules, module.__name__, module)
    own = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda package: version if package == "liger-kernel" else own(package)
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    CALLS.clear()
