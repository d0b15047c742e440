"""The functions of the package liger_kernel, and where they run.

Under Triton's interpreter (TRITON_INTERPRET=1) kernels run on a CPU, slowly: for tests.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graft.errors import GraftError, require

OLDEST = (0, 6, 5)
"""Of liger-kernel."""
NORMS, ROTARY, SWIGLU = "norms", "rotary positions", "SwiGLU"
"""What is computed, as people are told."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Kernels:
    """Liger's functions by what they compute, for tensors that `take` accepts."""

    version: str
    device: str
    """The type of the device whose tensors they take."""
    functions: dict[str, Callable[..., Any]]
    """As the package names them. Those of rope work where their arguments lie."""
    uses: Counter[str] = field(default_factory=Counter)
    """How often each sort was computed."""

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

    def norm(self, x_RD: Tensor, weight_D: Tensor, eps: float, offset: float, casting: str) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * (offset + weight), differentiable. Its backward leaves dy as it is: dy may be another node's too."""
        in_place = False
        return self._run(NORMS, "rms_norm", x_RD, weight_D, eps, offset, casting, in_place)

    def rotate_(self, q_BHLD: Tensor, k_BHLD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The half rotation by these angles; q and k are written over where they lie as [B, L, H, D]."""
        q, k, *_ = self._run(ROTARY, "rope_forward", q_BHLD, k_BHLD, cos, sin)
        return q, k

    def rotate_back_(self, dq_BHLD: Tensor, dk_BHLD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Its gradient, likewise."""
        return self._run(ROTARY, "rope_backward", dq_BHLD, dk_BHLD, cos, sin)

    def silu_product(self, e: Tensor, u: Tensor) -> Tensor:
        """silu(e) * u of contiguous tensors, without autograd."""
        return self._run(SWIGLU, "swiglu_forward", e, u)[2]

    def _run(self, sort: str, function: str, *args: Any) -> Any:
        self.uses[sort] += 1
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device
            return self.functions[function](*args)


def load(device: str = "cuda") -> Kernels:
    """Liger's functions for a type of device. Raises `GraftError` where the package is not installed, or too old."""
    require("liger_kernel", "gpu")
    norm = require("liger_kernel.ops.rms_norm", "gpu")
    rope, swiglu = require("liger_kernel.ops.rope", "gpu"), require("liger_kernel.ops.swiglu", "gpu")
    version = importlib.metadata.version("liger-kernel")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < OLDEST:
        raise GraftError(
            f"liger-kernel {version} compiles the gradient of norms anew for each length of a batch; needed is "
            f"{'.'.join(map(str, OLDEST))} or later: pip install 'graft-llm[gpu]'"
        )
    functions = {
        "rms_norm": norm.LigerRMSNormFunction.apply,
        "rope_forward": rope.rope_forward,
        "rope_backward": rope.rope_backward,
        "swiglu_forward": swiglu.swiglu_forward,
    }
    return Kernels(version, device, functions)


def chosen(wanted: str, device: torch.device) -> Kernels | None:
    """The kernels that `train.kernels` (auto, off or liger) means for a base on a device; None is torch's own operations.

    Raises `GraftError` where liger is demanded and cannot run there, is not installed or too old.
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
    except GraftError:
        if wanted == "liger":
            raise
        return None


def described() -> str:
    """Which kernels `train.kernels: auto` uses on this machine, for people."""
    if not torch.cuda.is_available():
        return "torch's own operations (no CUDA device)"
    try:
        return f"Liger {load().version} for norms, rotary positions and SwiGLU"
    except GraftError as error:
        return f"torch's own operations; for Liger's: {error}"
