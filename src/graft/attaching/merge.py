"""Fold an adapter into the base's weights, and undo it bit for bit.

`(W + D) - D` is not W in floating point, so the original weights are kept on the CPU, unless the caller does not want them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from graft.adapters.base import CannotFold
from graft.adapters.folding import fold_steps
from graft.architectures.layers import holds_numbers, is_transposed
from graft.architectures.two_streams import two_streams_of
from graft.architectures.walk import base_modules
from graft.attaching.active import set_trainable
from graft.distributed.sharded import streamed
from graft.errors import GraftError
from graft.injection.state import AttachedAdapter, Installed, State, site_table_of, state_of, unwrapped
from graft.ops.packed import packed_weight
from graft.routing.context import ForwardContext


def merge(model: nn.Module, name: str, *, keep: bool = True) -> None:
    """Fold one adapter into the base. The model then computes base plus adapter at no extra cost, and nothing trains.

    Merging an adapter that is merged already does nothing.
    keep: whether to keep the original weights on the CPU, so that `unmerge` can restore them. Without them the merge is for good: `detach`
    removes the adapter and leaves its weights in the base.
    Raises `CannotFold` for kinds that have no equal in the weights and on a reversible base, and `GraftError` for quantised or tied
    weights. The base is then unchanged.
    """
    root, state = unwrapped(model), state_of(model)
    attached = state.adapter(name)
    if state.merged == name:
        return
    if state.merged is not None:
        raise GraftError(
            f"adapter '{state.merged}' is merged already: call graft.unmerge(model, '{state.merged}') first"
        )
    refuse_reversible(root, "cannot be merged")
    if streamed(root) is not None:
        raise GraftError(
            "merging needs the whole base, and the blocks of this one stream: load it without base.offload"
        )
    if any(context.rows != name for context in state.outer):
        raise GraftError(
            f"merge '{name}' outside of graft.use and graft.route blocks: what they restore at their end cannot run while it is merged"
        )
    for installed in attached.installs:
        if not installed.config.folds:
            raise installed.module.cannot_fold()
    by_host = installs_by_host(attached)
    following = followers(root, by_host)
    originals: dict[str, Tensor] = {}
    try:
        for (
            path,
            installs,
        ) in by_host.items():  # one by one, because all folded weights of a large base at once may not fit
            _fold_host(root, path, name, installs, originals, following)
    except BaseException:
        _put_back(root, originals)
        raise
    state.originals = originals if keep else {}
    state.before_merge = state.current, state.trained
    state.merged = name
    state.enter(ForwardContext(name))
    set_trainable(model, ())


def refuse_reversible(root: nn.Module, what: str) -> None:
    """Raise `CannotFold` for a reversible base: an adapter on it means nothing without its two streams. what: what cannot be done."""
    streams = two_streams_of(root)
    if streams is not None:
        raise CannotFold(
            f"an adapter on a reversible base ({streams.variant}) {what}: without the two streams of its blocks the same weights compute "
            "something else. Keep the adapter beside the base (graft.load, graft chat, graft eval)"
        )


def installs_by_host(attached: AttachedAdapter) -> dict[str, list[Installed]]:
    """Return the modules of an adapter by the paths of the modules that they act on."""
    by_host: dict[str, list[Installed]] = defaultdict(list)
    for installed in attached.installs:
        by_host[installed.site.module].append(installed)
    return by_host


def followers(root: nn.Module, by_host: Mapping[str, Sequence[Installed]]) -> set[str]:
    """Return the hosts that compute with a weight that another host folds (a tied head, with the embedding's table).

    There the adapter has to do exactly what it does at that other host. A module that is only listed (T5's `shared`) follows too.
    """
    found: set[str] = set()
    for path, installs in by_host.items():
        held = [installed.module.follows for installed in installs]
        for holder, others in by_host.items():
            if held == [installed.module for installed in others] and _weight(root, path) is _weight(root, holder):
                found.add(path)
    table = site_table_of(root)
    listed, called = table.end("embed"), {site.module for site in table.tables()}
    return found | ({listed.module} if found and listed is not None and listed.module not in called else set())


def _weight(root: nn.Module, path: str) -> Tensor | None:
    return getattr(root.get_submodule(path), "weight", None)


def unmerge(model: nn.Module, name: str) -> None:
    """Restore the base's own weights, bit for bit. What was active and trained before the merge is so again.

    Raises `GraftError` if the adapter is not merged, or was merged with keep=False.
    """
    root, state = unwrapped(model), state_of(model)
    state.adapter(name)
    if state.merged != name:
        raise GraftError(f"adapter '{name}' is not merged" + (f" ('{state.merged}' is)" if state.merged else ""))
    if not state.originals:
        raise GraftError(
            f"the original weights were dropped when '{name}' was merged (keep=False): load the base again"
        )
    _put_back(root, state.originals)
    assert state.before_merge is not None
    context, trained = state.before_merge
    state.originals, state.merged, state.before_merge = {}, None, None
    state.enter(context)
    set_trainable(model, trained)


@contextmanager
def own_weights(root: nn.Module, state: State) -> Iterator[None]:
    """Put the base's own weights back for a block of code that reads them, if an adapter is merged into them.

    Raises `GraftError` if they were dropped (`merge` with keep=False).
    """
    if state.merged is None:
        yield
        return
    if not state.originals:
        raise GraftError(
            f"adapter '{state.merged}' was merged for good (keep=False), and the base's own weights are needed here: load the base again"
        )
    merged = {key: root.get_parameter(key).detach().to("cpu", copy=True) for key in state.originals}
    _put_back(root, state.originals)
    try:
        yield
    finally:
        _put_back(root, merged)


@torch.no_grad()
def _fold_host(
    root: nn.Module, path: str, name: str, installs: list[Installed], originals: dict[str, Tensor], following: set[str]
) -> None:
    """Fold the sites of one host into it, and add its original weights to `originals`.

    following: hosts that compute with a weight that another host folds. Only their biases are folded here.
    """
    host = root.get_submodule(path)
    if all(getattr(host, key, None) is None for key in ("weight", "bias")) or installs[0].module.runs_host:
        found = _folded_whole(root, path, name, installs)
    else:
        weight, bias = _folded(root, path, name, installs)
        found = {"bias": bias} if path in following else {"weight": weight, "bias": bias}
    for key, new in found.items():
        if new is None:
            continue
        own = host.get_parameter(key)
        if not torch.equal(own, new.to(own.dtype)):
            _refuse_tied(root, path, own, following)
        # Even if a fresh adapter changes nothing: `unmerge` and `detach` tell by the originals whether a merge can be undone.
        originals[f"{path}.{key}".lstrip(".")] = own.detach().to("cpu", copy=True)
        own.copy_(new)


def _folded_whole(root: nn.Module, path: str, name: str, installs: list[Installed]) -> dict[str, Tensor | None]:
    """Return the folded parameters of a host with adapters of the whole module. No two may change one parameter."""
    all_found = [installed.module.fold_all() for installed in installs]
    found = {key: new for each in all_found for key, new in (each or {}).items()}
    if None in all_found or len(found) < sum(len(each or {}) for each in all_found):
        raise CannotFold(
            f"adapter '{name}' changes '{path}' as a whole and in part, which cannot be merged: keep the adapter beside the base"
        )
    return found  # pyright: ignore[reportReturnType]


@torch.no_grad()
def _put_back(root: nn.Module, originals: dict[str, Tensor]) -> None:
    for key, original in originals.items():
        root.get_parameter(key).copy_(original)


def _folded(root: nn.Module, path: str, name: str, installs: list[Installed]) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of one host with all its sites folded in, computed in float32 or wider.

    E.g. attn.q of a fused projection with features 0-3 folds rows 0 to 3 of the weight [O, I], and entries 0 to 3 of the bias.
    """
    host = root.get_submodule(path)
    weight = getattr(host, "weight", None)
    if not isinstance(weight, Tensor) or not holds_numbers(weight) or packed_weight(host) is not None:
        raise GraftError(
            f"'{path}' has quantised weights, which cannot take an adapter in: load the base in bfloat16 or float32, then merge. "
            "graft merge RUN --to FOLDER dequantises the base and writes the merged model in bfloat16 or float32"
        )
    stored = weight.detach().t() if is_transposed(host) else weight.detach()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    full, bias = stored.to(dtype, copy=True), getattr(host, "bias", None)
    full_bias = None if bias is None else bias.detach().to(dtype, copy=True)
    with torch.no_grad():
        parts = [(each.module, slice(None) if each.site.features is None else each.site.features) for each in installs]
        for fold, features in fold_steps(parts):
            new, new_bias = fold(full[features], None if full_bias is None else full_bias[features])
            full[features] = new
            if new_bias is not None and full_bias is None:
                raise CannotFold(
                    f"adapter '{name}' learned a bias at '{path}', where the base has none: keep the adapter beside the base"
                )
            if full_bias is not None and new_bias is not None:
                full_bias[features] = new_bias
    return (full.t() if is_transposed(host) else full), full_bias


def _refuse_tied(root: nn.Module, path: str, changed: Tensor, following: set[str]) -> None:
    """Raise `GraftError` if another module uses the parameter too, unless the adapter changes both alike.

    A parent that lists a child's parameter among its own (the bias of BERT's head) computes nothing with it.
    """
    for other, module in base_modules(root):
        related = f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.") or "" in (path, other)
        if not related and other not in following and any(p is changed for p in module._parameters.values()):
            raise GraftError(
                f"'{path}' shares its weight with '{other}': merging would change both. Untie them first "
                "(config.tie_word_embeddings=False and a clone of the weight), or keep the adapter beside the base"
            )
