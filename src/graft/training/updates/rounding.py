"""Steps of any optimiser for one parameter at a time and, where it is wanted, with stochastic rounding of weights in bfloat16.

A weight in bfloat16 has 8 significant bits, so rounding to the nearest loses every update below half a step. Stochastic rounding adds 16
random bits below those that are kept, and cuts them off: the mean is exact.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graft.config.methods import FullMethod
from graft.training.job import Job

_DOMAIN = 0x42463136
"""Keeps these random numbers apart from others that come from the same seed and step."""


def rounds_stochastically(job: Job) -> bool:
    """Whether the job's weights are rounded stochastically after each step."""
    method = job.config.method
    return isinstance(method, FullMethod) and method.rounding == "stochastic"


class Alone:
    """Steps an optimiser for one parameter at a time, by showing it a group that holds nothing else."""

    def __init__(self, job: Job) -> None:
        self.optimizer: Optimizer = job.optimizer
        self.groups = {id(each): group for group in self.optimizer.param_groups for each in group["params"]}
        self.numbers = {id(each): number for number, each in enumerate(job.params.values())}
        self.key = (_DOMAIN, job.config.seed, job.step) if rounds_stochastically(job) else None

    def __call__(self, parameter: nn.Parameter) -> None:
        """Take the step of one parameter, on its gradient."""
        if self.key is None or parameter.dtype != torch.bfloat16:
            self._step(parameter, self.groups[id(parameter)])
            return
        assert parameter.grad is not None
        # The optimiser sees a copy in float32; so its state is in float32 too.
        wide = nn.Parameter(parameter.detach().float())
        wide.grad = parameter.grad.float()
        state = self.optimizer.state
        if parameter in state:
            state[wide] = state.pop(parameter)
        self._step(wide, self.groups[id(parameter)])
        if wide in state:
            state[parameter] = state.pop(wide)
        seed = np.random.SeedSequence((*self.key, self.numbers[id(parameter)])).generate_state(1, np.uint64)[0]
        random = torch.Generator(parameter.device).manual_seed(int(seed >> np.uint64(1)))
        with torch.no_grad():
            parameter.copy_(stochastic_bfloat16(wide.detach(), random))

    def _step(self, parameter: nn.Parameter, group: dict[str, object]) -> None:
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [{**group, "params": [parameter]}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups


def stochastic_bfloat16(values: Tensor, random: torch.Generator) -> Tensor:
    """Round float32 to one of the two neighbours in bfloat16, each with a probability such that the mean is exact."""
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=random, device=bits.device, dtype=torch.int32)
    return (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
