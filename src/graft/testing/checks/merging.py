"""Merging: a merged adapter computes the same and unmerges bit for bit, or merging says why not."""

from __future__ import annotations

import re

import torch
from torch import nn

from graft.adapters.base import CannotFold
from graft.attaching.merge import merge, unmerge
from graft.attaching.parameters import parameters
from graft.errors import GraftError
from graft.injection.state import state_of
from graft.ops.packed import packed_weight
from graft.testing.bases import base_tensors, changed_tensors, ids, logits, same_base
from graft.testing.case import Case
from graft.testing.checks.promise import close, equal, holds, listed, promise


def obstacle(model: nn.Module, case: Case) -> str | None:
    """Return why the base's weights cannot take this adapter in, as a pattern for the error; None where they can.

    The reasons are: the kind does not fold, the layer is quantised, the adapter learned a bias at a layer without one, or the layer's
    weight is shared.
    """
    if not case.config.folds:
        return "keep the adapter beside the base"
    hosts = {
        installed.site.module: model.get_submodule(installed.site.module)
        for installed in state_of(model).adapter("a").installs
    }
    if any(packed_weight(host) is not None for host in hosts.values()):
        return "has quantised weights, which cannot|learned a bias at .* where the base has none|shares its weight with"
    names = (name.replace(".of.", ".") for name, _ in parameters(model, "a"))  # as if nothing were around the kind
    learned = {name.rsplit(".", 2)[0] for name in names if name.endswith((".bias", ".shift"))}
    if case.config.learns_bias and any(getattr(hosts[path], "bias", None) is None for path in learned & set(hosts)):
        return "learned a bias at .* where the base has none"
    if all(name.endswith(".bias") for name, _ in parameters(model, "a")):
        return None
    shared = {id(host.weight) for host in hosts.values() if isinstance(getattr(host, "weight", None), torch.Tensor)}
    users = {path for path, module in model.named_modules() if id(getattr(module, "weight", None)) in shared}
    return None if users <= set(hosts) else "shares its weight with"


@promise(
    "A merged adapter computes the same, merging twice is merging once, unmerge restores bit for bit; or merging is refused."
)
def check_merges_or_refuses(case: Case) -> None:
    model, inputs = case.attached(), ids()
    expected, why_not = logits(model, inputs), obstacle(model, case)
    if why_not is not None:
        _refuses(model, why_not)
        holds(same_base(model, case.family), f"a refused merge changed the base at {_changed(model, case)}")
        holds(state_of(model).merged is None, "a refused merge left the adapter marked as merged")
        equal(logits(model, inputs), expected, "after a refused merge the output is the same")
        return
    try:
        merge(model, "a")
    except CannotFold as error:
        raise AssertionError(
            f"the config declares `folds` True, but merging is refused: {error}. Write `fold`"
        ) from error
    merged = {name: tensor.clone() for name, tensor in base_tensors(model)}
    close(
        logits(model, inputs), expected, 2e-4, "the merged weights (`fold`) compute what `before` and `adapt` compute"
    )
    merge(model, "a")
    twice = [name for name, tensor in base_tensors(model) if not torch.equal(tensor, merged[name])]
    holds(not twice, f"merging a second time changed the weights again at {listed(twice)}")
    holds(not same_base(model, case.family), "merging changed no weight of the base")
    unmerge(model, "a")
    holds(same_base(model, case.family), f"unmerge did not restore the base at {_changed(model, case)}")
    equal(logits(model, inputs), expected, "after unmerge the output is the same as before merging")


def _refuses(model: nn.Module, why_not: str) -> None:
    try:
        merge(model, "a")
    except GraftError as error:
        holds(
            isinstance(error, CannotFold) or "shares" in why_not or "quantised" in why_not,
            f"the refusal is a CannotFold; found {error!r}",
        )
        holds(re.search(why_not, str(error)) is not None, f"the refusal says '{why_not}'; found: {error}")
        return
    raise AssertionError(
        "merging went through, although this adapter has no equal in the base's weights: declare `folds` True, "
        "or leave `fold` and `fold_all` as they are"
    )


def _changed(model: nn.Module, case: Case) -> str:
    return listed(changed_tensors(model, case.family))
