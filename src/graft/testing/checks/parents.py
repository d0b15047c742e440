"""Parents: a new, copied or loaded adapter takes the mode, the dtype and the device of its parent."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graft.attaching.attach import attach
from graft.attaching.parameters import parameters
from graft.attaching.renaming import copy
from graft.attaching.saving import save
from graft.formats.loading import load
from graft.injection.container import AdapterContainer
from graft.testing.bases import ids, logits, loss, new_base, tiny_base
from graft.testing.case import Case, DoesNotApply
from graft.testing.checks.promise import holds, listed, promise


def adapters_of(model: nn.Module) -> list[nn.Module]:
    """Return every module inside the adapters of a model."""
    containers = [module for module in model.modules() if isinstance(module, AdapterContainer)]
    return [inner for module in containers for inner in module.modules() if inner is not module]


@promise("A new, copied or loaded adapter takes the mode (training or evaluation) of its parent.")
def check_takes_the_mode_of_its_parent(case: Case) -> None:
    for training in (False, True):
        mode_is_that_of_the_parent(case, training)


def mode_is_that_of_the_parent(case: Case, training: bool) -> None:
    """Raise AssertionError unless new, copied and loaded adapters take this mode from their parent."""
    model = tiny_base(case.family).train(training)
    with tempfile.TemporaryDirectory() as folder:
        attach(model, {"a": case.adapter})
        copy(model, "a", "b")
        load(model, save(model, "a", Path(folder) / "a"), name="c")
    wrong = sorted({type(module).__name__ for module in model.modules() if module.training != training})
    mode = "training" if training else "evaluation"
    holds(not wrong, f"in a model in {mode} mode, all modules are in that mode; found the other one in {listed(wrong)}")


@promise("Parameters are float32, or float64 on a float64 base; the output has the base's dtype.")
def check_masters_are_float32(case: Case) -> None:
    for dtype in (torch.bfloat16, torch.float32, *(() if case.quantised else (torch.float64,))):
        masters_fit_the_base(case, dtype)


def masters_fit_the_base(case: Case, dtype: torch.dtype) -> None:
    """Raise AssertionError unless parameters, gradients and output have the dtypes that belong to a base of this dtype."""
    model = case.attached(dtype=dtype)
    masters = torch.float64 if dtype == torch.float64 else torch.float32
    wrong = {name: p.dtype for name, p in parameters(model, "a") if p.dtype != masters}
    holds(
        not wrong,
        f"on a base of {dtype} the parameters are {masters}; found {next(iter(wrong.values()), None)} at {listed(wrong)}. "
        "Make them with dtype=spec.dtype",
    )
    device = next(model.parameters()).device
    away = [name for name, p in parameters(model, "a") if p.device != device]
    holds(not away, f"the parameters are on the base's device {device}; they are not at {listed(away)}")
    out = logits(model, ids())
    holds(out.dtype == dtype, f"on a base of {dtype} the output is {dtype}; found {out.dtype}. Cast to h.dtype")
    loss(model, ids()).backward()
    apart = sorted(name for name, p in parameters(model, "a") if p.grad is not None and p.grad.dtype != masters)
    holds(not apart, f"on a base of {dtype} the gradients are {masters}; they are not at {listed(apart)}")


@promise("An adapter is built on the device of its parent.")
def check_is_built_on_the_device_of_its_parent(case: Case) -> None:
    if case.quantised:
        raise DoesNotApply("weights in few bits are made of real ones, not on torch's meta device")
    with torch.device("meta"):  # a device that every machine has, and that is not the default one
        model: Any = new_base(case.family)
    attach(model, {"a": case.adapter})
    away = [name for name, p in parameters(model, "a") if p.device.type != "meta"]
    holds(
        not away, f"on a base on torch's meta device, these parameters are elsewhere: {listed(away)}. Use spec.device"
    )
