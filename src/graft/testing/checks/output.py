"""The output and the base: a fresh adapter is the identity, off is the base, nothing of a pass is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graft.attaching.active import route, use
from graft.attaching.attach import attach, detach
from graft.attaching.parameters import adapter_modules
from graft.errors import DoesNotWork, GraftError
from graft.injection.container import AdapterContainer
from graft.testing.bases import base_tensors, changed_tensors, ids, logits, loss, same_base, tiny_base
from graft.testing.case import Case, DoesNotApply, active
from graft.testing.checks.promise import close, difference, equal, holds, listed, promise, raises

INNER_LAYERS = ("up_proj", "dense_h_to_4h", "fc_in", "c_fc", "intermediate.dense", "wi_0")
"""How the name of an MLP's first linear layer ends, by family."""


class _OnTheWay(Exception):
    """Raised on purpose, inside a block or a forward pass."""


@promise("An adapter attaches; where it cannot, the refusal leaves the base as it was.")
def check_attaches(case: Case) -> None:
    if case.missing_sites:
        raise DoesNotApply(
            f"{case.family} has no site '{case.missing_sites[0]}', which the kind declares that it needs"
        )
    model: Any = tiny_base(case.family)
    before = type(model)
    try:
        attach(model, {"a": case.adapter})
    except DoesNotWork as error:
        raise error.__cause__ or error from None  # the report says where the kind itself failed
    except GraftError as error:
        holds(
            same_base(model, case.family) and type(model) is before,
            f"attaching was refused ({error}), but changed the base at {listed(changed_tensors(model, case.family))}",
        )
        raise DoesNotApply(f"attaching to {case.family} is refused: {error}") from error


@promise(
    "A fresh adapter leaves the output unchanged bit for bit, or declares that it does not (`starts_as_identity`)."
)
def check_fresh_adapter_is_identity_or_declares_it(case: Case) -> None:
    model, inputs = case.attached(fresh=True), ids()
    found, wanted = logits(model, inputs), case.base_logits(inputs)
    same = torch.equal(found, wanted)
    if case.config.starts_as_identity:
        holds(
            same,
            "the config declares `starts_as_identity` True, but a fresh adapter changes the output: "
            f"{difference(found, wanted)}. Start at a value without effect, or return False",
        )
    else:
        holds(
            not same,
            "the config declares `starts_as_identity` False, but a fresh adapter changes nothing: leave the declaration out",
        )


@promise("A trained adapter changes the output; with the adapter off, the output is the base's bit for bit.")
def check_off_is_the_base(case: Case) -> None:
    model, inputs = case.attached(), ids()
    with use(model, None):
        equal(logits(model, inputs), case.base_logits(inputs), "with graft.use(model, None) the output is the base's")
    holds(case.shows(model), "an adapter whose parameters were moved at random does not change the output")


@promise("Switching off and on again is stable, and an exception in a block restores the adapter chosen before.")
def check_choice_comes_back(case: Case) -> None:
    model, inputs = case.attached("a", "b"), ids()
    on = logits(model, inputs)
    with raises(_OnTheWay, "a block swallowed an exception"), use(model, "b"), use(model, None):
        with route(model, ["a", None, "b"]):
            logits(model, inputs)
        raise _OnTheWay
    holds(active(model) == "a", f"after an exception in a block 'a' is active again; found {active(model)!r}")
    equal(logits(model, inputs), on, "after switching away from an adapter and back, the output is the same")
    with use(model, "b"):
        holds(
            not torch.allclose(logits(model, inputs), on, atol=1e-3),
            "two adapters with different parameters give the same output",
        )


@promise("An exception in the middle of a forward pass leaves the next pass right.")
def check_exception_in_a_forward_pass(case: Case) -> None:
    model, inputs = case.attached(), ids()
    expected = logits(model, inputs)

    def fail(*_: Any) -> None:
        raise _OnTheWay

    module = [module for name, module in model.named_modules() if name.endswith(INNER_LAYERS)][-1]
    handle = module.register_forward_pre_hook(fail)
    with raises(_OnTheWay, "an exception inside the base's forward pass was swallowed"), use(model, None):
        logits(model, inputs)
    with raises(_OnTheWay, "an exception inside the forward pass was swallowed"):
        logits(model, inputs)
    handle.remove()
    equal(
        logits(model, inputs), expected, "after an exception inside a forward pass, the next pass gives the same output"
    )


@promise("A forward pass leaves nothing behind: the next output does not depend on it, and it keeps no graph alive.")
def check_nothing_is_left_behind(case: Case) -> None:
    model, inputs = case.attached(), ids()
    first, stored = logits(model, inputs), _stored(model)
    logits(model, ids(2, 5, seed=9))
    loss(model, ids(2, 6, seed=10)).backward()
    kept = [name for name, tensor in _held(model) if tensor.grad_fn is not None]
    holds(
        not kept,
        f"after a forward pass the adapter still holds a tensor of it in {listed(kept)}: that keeps the pass in memory "
        "and breaks copying the model. Use a local variable",
    )
    model.zero_grad()
    changed = [name for name, tensor in _stored(model).items() if not torch.equal(tensor, stored[name])]
    holds(not changed, f"a forward pass in evaluation mode changed the adapter's {listed(changed)}")
    equal(logits(model, inputs), first, "after passes on other inputs, the same input gives the same output")


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Copy the adapter's parameters and buffers."""
    modules = enumerate(adapter_modules(model, "a"))
    return {
        f"{type(module).__name__} {number}: {name}": tensor.clone()
        for number, module in modules
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (class.attribute, tensor) for the tensors in plain attributes of an adapter's modules."""
    for outer in adapter_modules(model, "a"):
        for module in outer.modules():
            for name, value in vars(module).items():
                if name in ("_parameters", "_buffers", "_modules"):
                    continue
                inner = (
                    value.values()
                    if isinstance(value, dict)
                    else value
                    if isinstance(value, list | tuple)
                    else (value,)
                )
                for each in inner:
                    if isinstance(each, Tensor) and not isinstance(each, nn.Parameter):
                        yield f"{type(module).__name__}.{name}", each


@promise("Evaluation and training never change the base, and detaching leaves nothing of the adapter.")
def check_base_never_changes(case: Case) -> None:
    model = case.attached(fresh=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, weight_decay=0.1)
    for mode in (False, True, False):
        model.train(mode)
        loss(model, ids()).backward()
        optimizer.step()
        optimizer.zero_grad()
    _base_is_intact(model, case, "three steps in evaluation and training mode")
    graded = [name for name, p in model.named_parameters() if p.grad is not None and "graft" not in name.split(".")]
    holds(not graded, f"the frozen base got gradients at {listed(graded)}")
    detach(model)
    _base_is_intact(model, case, "detaching")
    left = [name for name, module in model.named_modules() if isinstance(module, AdapterContainer)]
    holds(not left, f"after detaching, adapters are left at {listed(left)}")
    close(logits(model, ids()), case.base_logits(ids()), 0.0, "after detaching, the output is the base's")


def _base_is_intact(model: nn.Module, case: Case, event: str) -> None:
    changed = changed_tensors(model, case.family)
    holds(not changed, f"after {event}, the base has changed at {listed(changed)}")
    holds(
        same_base(model, case.family),
        f"after {event}, the base's tensors have another order: {list(base_tensors(model))}",
    )
