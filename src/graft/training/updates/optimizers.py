"""The optimisers of `train.optimizer`: how each is made, and how many bytes its state takes.

torch, transformers and bitsandbytes implement them; only Lion is ours, since none of the packages that Graft always needs has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from graft.config.methods import FullMethod, MeZOMethod, QFTMethod
from graft.config.optimizers import AdafactorConfig, AdamWConfig, LionConfig, SGDConfig
from graft.config.train import TrainConfig
from graft.training.updates.lion import Lion
from graft.training.updates.noise_sgd import NoiseSGD
from graft.training.updates.qft_lion import QFTLion
from graft.utils.bits import bitsandbytes

FEWEST_IN_8_BITS = 4096
"""bitsandbytes keeps the state of smaller tensors in 32 bits."""
BLOCK = 256
"""Values that share one scale in a state of 8 bits."""


def build_optimizer(groups: Sequence[dict[str, Any]], config: TrainConfig) -> Optimizer:
    """Make the optimiser that the config names.

    groups: parameter groups as `attaching.parameters.parameter_groups` makes them, each with its learning rate. Raises `MissingExtra`
    where bitsandbytes is needed and not installed.
    """
    chosen = config.optimizer or config.usual_optimizer
    parameters = [parameter for group in groups for parameter in group["params"]]
    decay = _first(chosen.weight_decay, config.weight_decay, 0.0)
    if isinstance(config.method, MeZOMethod):
        return NoiseSGD(groups, config.lr, decay, config.method)
    if isinstance(chosen, SGDConfig):
        return SGD(groups, config.lr, chosen.momentum, weight_decay=decay, nesterov=chosen.nesterov)
    if isinstance(chosen, AdafactorConfig):
        from transformers.optimization import Adafactor

        return Adafactor(
            groups, config.lr, clip_threshold=chosen.clip_threshold, decay_rate=chosen.decay_rate, beta1=chosen.beta1,
            weight_decay=decay, scale_parameter=False, relative_step=False,
        )  # fmt: skip
    if isinstance(chosen, LionConfig):
        betas = _first(chosen.betas, config.betas, (0.9, 0.99))
        if isinstance(config.method, QFTMethod):
            return QFTLion(groups, config.lr, betas, decay, config.seed)
        if chosen.kind == "lion":
            return Lion(groups, config.lr, betas, decay)
        return _bitsandbytes().Lion8bit(groups, config.lr, betas, decay)
    betas, eps = _first(chosen.betas, config.betas, (0.9, 0.999)), _first(chosen.eps, config.eps, 1e-8)
    if chosen.kind == "adamw":
        # fused: one kernel for all tensors, with the same arithmetic
        fused = all(parameter.device.type in ("cpu", "cuda", "mps") for parameter in parameters)
        return AdamW(groups, config.lr, betas, eps, decay, fused=fused)
    cls = _bitsandbytes().AdamW8bit if chosen.kind.endswith("8bit") else _bitsandbytes().AdamW
    paged = "paged" in chosen.kind and all(parameter.device.type == "cuda" for parameter in parameters)
    return cls(groups, config.lr, betas, eps, decay, is_paged=paged)


def state_bytes(parameters: Iterable[Tensor], config: TrainConfig) -> int:
    """Return the bytes that the optimiser's state of these parameters takes from the first step on."""
    if isinstance(config.method, QFTMethod):
        return sum(_int8_bytes(each, other=4) for each in parameters)
    if (
        isinstance(config.method, FullMethod) and config.method.rounding == "stochastic"
    ):  # the state is that of copies in float32
        parameters = [torch.empty_like(each, dtype=torch.float32, device="meta") for each in parameters]
    return sum(_bytes_of(parameter, config.optimizer or config.usual_optimizer) for parameter in parameters)


def update_bytes(parameters: Sequence[Tensor], config: TrainConfig) -> int:
    """Return what a step holds besides the parameters: gradients, or what stands in for them, and the optimiser's state."""
    if isinstance(config.method, QFTMethod):
        gradients = [_int8_bytes(each, other=each.element_size()) for each in parameters]
    else:
        gradients = [each.numel() * each.element_size() for each in parameters]
    size = max(gradients, default=0) if config.method.rule == "in_backward" else sum(gradients)
    if isinstance(config.method, MeZOMethod) and config.method.restore == "subtract":
        size = 0
    if config.accumulate_in == "float32":
        size += 4 * sum(parameter.numel() for parameter in parameters)
    return size + state_bytes(parameters, config)


def weight_bytes(parameters: Sequence[Tensor], config: TrainConfig) -> int:
    """Return what the parameters take while they train: of QFT, codes, scale and zero of each row, and outliers with their places."""
    size = sum(each.numel() * each.element_size() for each in parameters)
    if not isinstance(config.method, QFTMethod):
        return size
    matrices = [each for each in parameters if each.dim() == 2]
    size -= sum(each.numel() * each.element_size() for each in matrices)
    outliers = sum(round(config.method.outliers * each.numel()) for each in matrices)
    return size + sum(_int8_bytes(each, other=0) + 4 * len(each) for each in matrices) + 8 * outliers


def _int8_bytes(parameter: Tensor, other: int) -> int:
    """The bytes of a matrix in 8 bits with a scale per row; of a parameter that is no matrix, `other` for each value."""
    return parameter.numel() + 4 * len(parameter) if parameter.dim() == 2 else other * parameter.numel()


def _bytes_of(parameter: Tensor, chosen: AdamWConfig | LionConfig | AdafactorConfig | SGDConfig) -> int:
    """The bytes of one parameter's state, without counters."""
    count, size = parameter.numel(), parameter.numel() * parameter.element_size()
    if isinstance(chosen, SGDConfig):
        return size if chosen.momentum else 0
    if isinstance(chosen, AdafactorConfig):
        first = 4 * count if chosen.beta1 is not None else 0
        if parameter.dim() < 2:
            return first + 4 * count
        rows, columns = count // parameter.shape[-1], count // parameter.shape[-2]
        return first + 4 * (rows + columns)
    moments = 1 if isinstance(chosen, LionConfig) else 2
    if chosen.kind.endswith("8bit") and count >= FEWEST_IN_8_BITS:
        return moments * (count + 4 * math.ceil(count / BLOCK))
    # torch's and ours keep a moment in the parameter's format, bitsandbytes' in float32
    return moments * (size if chosen.kind in ("adamw", "lion") else 4 * count)


def _first(*values: Any) -> Any:
    """The first value that is set."""
    return next(value for value in values if value is not None)


def _bitsandbytes() -> Any:
    return bitsandbytes().optim
