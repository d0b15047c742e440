"""Turn a base in few bits into a plain one, in place: each quantised layer becomes the layer that it stands for.

Adapters stay where they are. What is left is an ordinary model of transformers, which `save_pretrained` writes without a trace of its
quantisation.

Legend: I input features, O output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graft.architectures.layers import is_transposed
from graft.architectures.walk import base_modules
from graft.bases.quantised import method_of_layer
from graft.errors import GraftError
from graft.injection.state import unwrapped
from graft.injection.substitution import rebase
from graft.ops.packed import dequantised

_KEPT = ("training", "in_features", "out_features")
"""Attributes of a quantised layer that the plain one has too, beside what every module has and what Graft keeps there."""


@torch.no_grad()
def dequantise(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every quantised layer its weight in `dtype`. Raises `GraftError`, before anything is changed, if Graft cannot dequantise one."""
    root: Any = unwrapped(model)
    layers = [(path, module) for path, module in base_modules(root) if method_of_layer(module) is not None]
    for path, module in layers:
        if dequantised(module, dtype) is None:
            raise GraftError(
                f"'{path}' ({type(module).__name__}) holds weights that Graft cannot dequantise: name the base that it was quantised from"
            )
    for _, module in layers:
        _become_plain(module, dtype)
    quantizer = getattr(root, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(root)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        root.__dict__.pop(name, None)


def _become_plain(module: Any, dtype: torch.dtype) -> None:
    weight = dequantised(module, dtype)
    assert weight is not None
    cls: Any = module.__dict__.get("source_cls", nn.Linear)
    plain = nn.Module()
    own = {key: value for key, value in module.__dict__.items() if key.startswith("graft") or key in _KEPT}
    for key, value in plain.__dict__.items():
        own[key] = module.__dict__[key] if key in ("_modules", "_forward_hooks", "_forward_pre_hooks") else value
    own["training"], bias = module.training, module._parameters.get("bias")
    outputs, inputs = weight.shape
    module.__dict__.clear()
    module.__dict__.update(own)
    rebase(module, cls)
    if is_transposed(module):  # transformers' Conv1D stores [I, O]
        del module.in_features, module.out_features
        module.nf, module.nx = outputs, inputs
        weight = weight.t().contiguous()
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
