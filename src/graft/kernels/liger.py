"""The functions of the package liger_kernel, and the devices they run on.

Triton's interpreter (TRITON_INTERPRET=1) runs kernels on a CPU, slowly, for tests.
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

from graft.architectures.torch_internals import in_function_transform
from graft.errors import GraftError, require

OLDEST = (0, 6, 5)
"""The oldest version of liger-kernel that is accepted."""
NORMS, ROTARY, SWIGLU = "norms", "rotary positions", "SwiGLU"
"""The operations, as they are called in messages."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Kernels:
    """Liger's functions, to be called with tensors that `accepts` allows."""

    version: str
    device: str
    """The type of the device that the tensors must be on."""
    functions: dict[str, Callable[..., Any]]
    """The functions by the package's names. Those of rope write over their arguments."""
    uses: Counter[str] = field(default_factory=Counter)
    """How often each operation was computed."""

    def accepts(self, *tensors: Tensor) -> bool:
        """Whether a kernel can compute these tensors: plain tensors on the device, not empty, all of one known dtype.

        No kernel runs while torch.compile, a function transform or autocast has to see the operations.
        """
        watched = torch.compiler.is_compiling() or in_function_transform()
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

    def norm(self, x_ND: Tensor, weight_D: Tensor, eps: float, offset: float, casting: str) -> Tensor:
        """Return x / sqrt(mean(x^2) + eps) * (offset + weight), differentiable. The backward keeps dy intact, which others may hold."""
        in_place = False
        return self._run(NORMS, "rms_norm", x_ND, weight_D, eps, offset, casting, in_place)

    def rotate_(self, q_BHLD: Tensor, k_BHLD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate halves by these angles. q and k are overwritten if their memory is laid out as [B, L, H, D]."""
        q, k, *_ = self._run(ROTARY, "rope_forward", q_BHLD, k_BHLD, cos, sin)
        return q, k

    def rotate_back_(self, dq_BHLD: Tensor, dk_BHLD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the inputs of `rotate_`, overwriting dq and dk in the same way."""
        return self._run(ROTARY, "rope_backward", dq_BHLD, dk_BHLD, cos, sin)

    def silu_product(self, e: Tensor, u: Tensor) -> Tensor:
        """Return silu(e) * u for contiguous tensors, without autograd."""
        return self._run(SWIGLU, "swiglu_forward", e, u)[2]

    def _run(self, operation: str, function: str, *args: Any) -> Any:
        self.uses[operation] += 1
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device
            return self.functions[function](*args)


def load(device: str = "cuda") -> Kernels:
    """Load Liger's functions for a type of device. Raises `GraftError` if the package is not installed or too old."""
    require("liger_kernel", "gpu")
    norm = require("liger_kernel.ops.rms_norm", "gpu")
    rope, swiglu = require("liger_kernel.ops.rope", "gpu"), require("liger_kernel.ops.swiglu", "gpu")
    version = importlib.metadata.version("liger-kernel")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < OLDEST:
        raise GraftError(
            f"liger-kernel {version} recompiles the gradient of norms for each length of a batch. Install "
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
    """Return the kernels for `train.kernels` (auto, off or liger) on a device, or None for torch's own operations.

    Raises `GraftError` if the user wants liger and it cannot run there, is not installed or too old.
    """
    runs = device.type == "cuda" or device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if wanted == "off" or (wanted == "auto" and not runs):
        return None
    if not runs:
        raise GraftError(
            f"train.kernels: liger needs a CUDA device, but the base is on {device}: use kernels: auto or off"
        )
    try:
        return load(device.type)
    except GraftError:
        if wanted == "liger":
            raise
        return None


def described() -> str:
    """Describe in words which kernels `train.kernels: auto` uses on this machine."""
    if not torch.cuda.is_available():
        return "torch's own operations (no CUDA device)"
    try:
        return f"Liger {load().version} for norms, rotary positions and SwiGLU"
    except GraftError as error:
        return f"torch's own operations; to use Liger's: {error}"
