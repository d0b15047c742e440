"""What a job trains: an adapter, or parameters of the base itself.

Jobs, checkpoints, offloading and publishing go through this contract and know no more of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from graft.adapters.base import AdapterModule
from graft.adapters.nesting import every_config
from graft.architectures.parts import parameters_of
from graft.architectures.walk import base_parameters
from graft.attaching.parameters import adapter_modules, lr_factors, parameter_groups, parameters, tensors
from graft.attaching.saving import load_training_state, training_state
from graft.attaching.stored import copy_strictly
from graft.config.methods import QFTMethod
from graft.config.train import TrainConfig
from graft.errors import GraftError
from graft.injection.state import site_table_of, state_of, unwrapped
from graft.training.updates.int8 import Int8Weight
from graft.training.updates.int8_layers import Held, hold_in_int8
from graft.training.updates.qft_lion import QFTLion


class Trainable(Protocol):
    """What a job trains."""

    params: dict[str, nn.Parameter]
    """Trainable parameters by name, in the order of the optimiser's groups."""
    count: int
    """Number of values that train."""
    modules: list[AdapterModule]
    """The modules of the adapter; none where the base trains."""
    compares_rows: bool
    """Whether a loss of the adapter compares the rows of a step, which then run in one pass."""

    @property
    def adapter(self) -> str | None:
        """The adapter that the job's rows run through; None is the bare base."""
        ...

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the parameters as groups for an optimiser, each with its learning rate."""
        ...

    def begin(self, optimizer: Optimizer) -> None:
        """Make the parameters ready for steps of this optimiser, once. The base has been identified by then."""
        ...

    def whole(self) -> dict[str, Tensor] | None:
        """Return the state dict of the model to save, where its parameters do not hold its weights; else None."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return all tensors as they train, detached, for checkpoints."""
        ...

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Load what `state` returned. Raises `GraftError` for missing, extra or misshapen tensors."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors themselves, which offloading empties."""
        ...

    def note_offloaded(self, offloaded: bool) -> None:
        """Note that the tensors are in a file for now, or that they are back."""
        ...


class TrainedAdapter:
    """An attached adapter."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.adapter = model, name
        factors = lr_factors(model, name)
        # Parameters with the plain learning rate come first, then one optimiser group per factor.
        self.params = dict(
            sorted(parameters(model, name), key=lambda item: (factors[item[0]] != 1.0, factors[item[0]]))
        )
        self.modules, self.count = adapter_modules(model, name), _count(self.params)
        self.compares_rows = any(each.compares_rows for each in every_config(state_of(model).adapter(name).config))
        if not self.params:
            raise GraftError(
                f"nothing of adapter '{name}' trains: all of it is there by reference (from), and frozen. Write a list with an adapter "
                "that trains on top, as [{from: FOLDER}, {kind: lora}], or go on from a copy (graft jobs clone, train.init_from)"
            )

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """One group per factor of the learning rate (LoRA+ has two)."""
        return parameter_groups(self.model, self.adapter, lr)

    def begin(self, optimizer: Optimizer) -> None:
        """They are."""

    def whole(self) -> None:
        """An adapter is saved without its base."""

    def state(self) -> dict[str, Tensor]:
        """All tensors of the adapter, reparametrisations included."""
        return training_state(self.model, self.adapter)

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Load them."""
        load_training_state(self.model, self.adapter, stored)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The adapter's parameters and persistent buffers."""
        return tensors(unwrapped(self.model), state_of(self.model), self.adapter)

    def note_offloaded(self, offloaded: bool) -> None:
        """No forward context may name it while it is offloaded."""
        state_of(self.model).adapters[self.adapter].offloaded = offloaded


class TrainedBase:
    """Parameters of the base itself. `by_part` holds them for each name under `parts` of the method."""

    compares_rows = False

    def __init__(self, model: nn.Module, config: TrainConfig, also: Sequence[str] = ()) -> None:
        assert config.method.parts is not None
        self.model, self.adapter = model, None
        self.by_part = parameters_of(site_table_of(model), config.method.kind, config.method.parts)
        for path in also:  # a fresh head is random, so it trains whatever the parts are
            named = unwrapped(model).get_submodule(path).named_parameters()
            self.by_part.setdefault("head", {}).update({f"{path}.{key}": each for key, each in named})
        unique = {key: each for found in self.by_part.values() for key, each in found.items()}
        self.params = {key: each for key, each in unwrapped(model).named_parameters() if key in unique}
        self.modules: list[AdapterModule] = []
        self.count, self.base_count = _count(self.params), _count(dict(base_parameters(unwrapped(model))))
        self.part_counts = {part: _count(found) for part, found in self.by_part.items()}
        for parameter in self.params.values():
            parameter.requires_grad_(True)

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """One group."""
        return [{"params": list(self.params.values()), "lr": lr}]

    def begin(self, optimizer: Optimizer) -> None:
        """They are."""

    def whole(self) -> dict[str, Tensor] | None:
        """The parameters hold the weights."""
        return None

    def state(self) -> dict[str, Tensor]:
        """The parameters that train; the others are in the base's own files."""
        return {key: each.detach() for key, each in self.params.items()}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Load them."""
        copy_strictly(stored, self.params, "the trained parameters of the base")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same."""
        return iter(self.params.items())

    def note_offloaded(self, offloaded: bool) -> None:
        """A base that trains is never offloaded: no other job can share it."""
        assert not offloaded


class TrainedInt8Base(TrainedBase):
    """A base with its matrices in 8 bits, once training has begun."""

    def __init__(self, model: nn.Module, config: TrainConfig, also: Sequence[str] = ()) -> None:
        super().__init__(model, config, also)
        assert isinstance(config.method, QFTMethod)
        self.method, self.held = config.method, dict[str, Held]()

    def begin(self, optimizer: Optimizer) -> None:
        """Put the matrices into 8 bits, one after the other, and let their gradients come to the optimiser."""
        assert isinstance(optimizer, QFTLion)
        if not self.held:
            make = partial(Int8Weight, outliers=self.method.outliers, rounding=self.method.rounding)
            self.held = hold_in_int8(unwrapped(self.model), self.params, make)
            optimizer.hold(self.held)

    def whole(self) -> dict[str, Tensor] | None:
        """The state dict with all matrices in the base's own format."""
        made = {id(each.anchor): each.weight.dequantised().to(each.weight.dtype) for each in self.held.values()}
        given = unwrapped(self.model).state_dict(keep_vars=True)
        return {name: made[id(each)] if id(each) in made else each.detach() for name, each in given.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Codes, scales, zeros and outliers of the matrices, and the other parameters."""
        for key, each in self.params.items():
            if key in self.held:
                yield from ((f"{key}:{name}", tensor) for name, tensor in self.held[key].weight.tensors().items())
            else:
                yield key, each

    def state(self) -> dict[str, Tensor]:
        """The same."""
        return {key: each.detach() for key, each in self.tensors()}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Load them."""
        copy_strictly(stored, dict(self.tensors()), "the trained parameters of the base")


def _count(params: Mapping[str, Tensor]) -> int:
    return sum(each.numel() for each in params.values())


def trainable_of(model: nn.Module, name: str, config: TrainConfig, also: Sequence[str] = ()) -> Trainable:
    """Return what a job of this name and configuration trains in a model. An adapter is attached by then. also: see `Job.make`."""
    if config.method.parts is None:
        return TrainedAdapter(model, name)
    return (TrainedInt8Base if isinstance(config.method, QFTMethod) else TrainedBase)(model, config, also)
