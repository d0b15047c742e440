"""The functions of the package liger_kernel, and where they run.

Under Triton's interpreter (TRITON_INTERPRET=1) kernels run on a CPU, slowly: for tests.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.errors import GraftError, MissingExtra, require

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Kernels:
    """Liger's functions, by what they compute. Several write into their arguments: callers hand them tensors of their own."""

    version: str
    device: str
    """The type of the device whose tensors they take."""
    rms_norm: Callable[..., Any]
    """(x, weight, eps, offset, casting, in_place) -> y, differentiable; in_place says whether backward may write into dy."""
    rope_forward: Callable[..., Any]
    """(q, k, cos, sin) -> q, k, cos, sin; rotates in place where the memory lies as it wants."""
    rope_backward: Callable[..., Any]
    """(dq, dk, cos, sin) -> dq, dk; in place likewise."""
    swiglu_forward: Callable[..., Any]
    """(e, u) -> e, u, silu(e) * u."""

    def take(self, *tensors: Tensor) -> bool:
        """Whether these tensors are theirs to compute: plain, here, of one dtype that they know, and nobody looks into what runs."""
        watched = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if watched or torch.is_autocast_enabled(self.device):
            return False
        dtype = tensors[0].dtype
        return dtype in DTYPES and all(
            type(each) in (Tensor, nn.Parameter)
            and each.dtype == dtype
            and each.device.type == self.device
            and each.numel() > 0
            for each in tensors
        )


def load(device: str = "cuda") -> Kernels:
    """Liger's functions for a type of device. Raises `MissingExtra` where the package is not installed."""
    norm = require("liger_kernel.ops.rms_norm", "gpu")
    rope, swiglu = require("liger_kernel.ops.rope", "gpu"), require("liger_kernel.ops.swiglu", "gpu")
    return Kernels(
        version=importlib.metadata.version("liger-kernel"),
        device=device,
        rms_norm=norm.LigerRMSNormFunction.apply,
        rope_forward=rope.rope_forward,
        rope_backward=rope.rope_backward,
        swiglu_forward=swiglu.swiglu_forward,
    )


def chosen(wanted: str, device: torch.device) -> Kernels | None:
    """The kernels that `train.kernels` (auto, off or liger) means for a base on a device; None is torch's own operations.

    Raises `GraftError` where liger is demanded and cannot run there, `MissingExtra` where it is not installed.
    """
    runs = device.type == "cuda" or device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if wanted == "off" or (wanted == "auto" and not runs):
        return None
    if not runs:
        raise GraftError(
            f"train.kernels is liger, whose kernels run on a CUDA device, but the base is on {device}: use kernels: auto or off"
        )
    try:
        return load(device.type)
    except MissingExtra:
        if wanted == "liger":
            raise
        return None


def described() -> str:
    """Which kernels `train.kernels: auto` uses on this machine, for people."""
    if not torch.cuda.is_available():
        return "torch's own operations (no CUDA device)"
    try:
        return f"Liger {load().version} for norms, rotary positions and SwiGLU"
    except MissingExtra:
        return "torch's own operations; for Liger's: pip install 'graft-llm[gpu]'"
