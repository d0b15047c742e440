"""The fingerprint of a base: its name, its shape, and a digest of its weights. An adapter folder says which base it is for.

Modules and rows that an adapter replaces do not count: a fresh head, or rows added for new tokens, differ each time the base is loaded.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.two_streams import two_streams_of
from graft.architectures.walk import base_parameters, public_name
from graft.attaching.digest import Reading, weight_digest
from graft.errors import GraftError
from graft.injection.state import State

_SHAPE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


KEPT = "graft_digest"
"""Attribute of a model whose weights cannot be read any more: their digest."""


def keep_digest(root: nn.Module, reading: Reading | None = None) -> None:
    """Keep the digest of a base whose weights are about to be cut into parts for several processes, or were read while they were cut."""
    root.__dict__[KEPT] = weight_digest(root, {}) if reading is None else reading.digest()


def fingerprint(root: nn.Module, state: State | None = None, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the base's name, shape and digest. The digest is None if the weights cannot be read (meta device, sharded).

    like: a recorded fingerprint. What it leaves out is left out here too, and its digest's rule is used. None: what attached adapters
    replace is left out.
    """
    without = replaced(state) if like is None else like.get("without", ())
    rows = replaced_rows(root, state) if like is None else like.get("without_rows", {})
    streams = two_streams_of(root)
    config = getattr(root, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    shape = {key: getattr(text, key) for key in _SHAPE if getattr(text, key, None) is not None}
    found = {
        "model": public_name(getattr(root, "name_or_path", "")) or type(root).__name__,
        "class": type(root).__name__,
        "shape": shape,
        **({"reversible": streams.variant} if streams is not None else {}),
        **({"without": list(without)} if without else {}),
        **({"without_rows": {name: list(each) for name, each in rows.items()}} if rows else {}),
    }
    originals = state.originals if state is not None else {}
    if like is not None and _is_old(like["digest"]):
        return {**found, "digest": _old_digest(root, originals, without)}
    lost = (
        state is not None and state.merged is not None and not originals
    )  # merged for good: these are not the base's weights
    digest = None if lost else weight_digest(root, originals, without, rows)
    if digest is None and not lost and not without and not rows:
        digest = root.__dict__.get(KEPT)
    stored = {"quantised": digest.storage} if digest is not None and digest.storage else {}
    return {**found, "digest": None if digest is None else str(digest), **stored}


def replaced(state: State | None) -> list[str]:
    """Return the paths of the modules that attached adapters replace."""
    installs = (
        [installed for attached in state.adapters.values() for installed in attached.installs]
        if state is not None
        else []
    )
    return sorted({installed.site.module for installed in installs if installed.config.replaces})


def replaced_rows(root: nn.Module, state: State | None) -> dict[str, list[int]]:
    """Return the rows of tables that attached adapters replace, by the name of the table's weight in the base."""
    hosts = [
        (root.get_submodule(installed.site.module), installed.module.replaces_rows)
        for attached in (state.adapters.values() if state is not None else ())
        for installed in attached.installs
        if installed.module.replaces_rows
    ]
    by_weight: dict[Any, set[int]] = {}
    for host, rows in hosts:
        by_weight.setdefault(host.weight, set()).update(rows)
    return {name: sorted(by_weight[each]) for name, each in base_parameters(root) if each in by_weight}


def _is_old(digest: str | None) -> bool:
    """Whether a digest was made by the rule that sampled sixteen tensors only."""
    return digest is not None and "-" not in digest


def _old_digest(root: nn.Module, originals: Mapping[str, Tensor], without: Sequence[str]) -> str | None:
    """Return the digest by the old rule: the first 64 values of about sixteen tensors. It is only compared with recorded ones."""
    named = [
        (name, originals.get(name, parameter))
        for name, parameter in base_parameters(root)
        if name.rpartition(".")[0] not in without
    ]
    hasher = hashlib.sha256()
    for name, parameter in named[:: max(1, len(named) // 16)]:
        if parameter.device.type == "meta" or not parameter.is_floating_point() or type(parameter.data) is not Tensor:
            return None
        sample = parameter.detach().flatten()[:64].to("cpu", torch.bfloat16)
        hasher.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
    return hasher.hexdigest()[:16]


def other_base(recorded: Mapping[str, Any], root: nn.Module, state: State | None = None) -> str | None:
    """Return how a base differs from a recorded fingerprint (in coupling, shape or weights), None if it does not or cannot be compared.

    A base that is quantised in another way than the recorded one is compared by all but its linear weights.
    """
    return _difference(recorded, fingerprint(root, state, like=recorded))


def _difference(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    if recorded.get("reversible") != here.get("reversible"):
        return f"base.reversible is {_coupled(recorded)} there, {_coupled(here)} here"
    differing = [key for key, value in recorded["shape"].items() if here["shape"].get(key, value) != value]
    if differing:
        return "; ".join(f"{key} {recorded['shape'][key]} there, {here['shape'][key]} here" for key in differing)
    there, own = (each["digest"] for each in (recorded, here))
    alike = recorded.get("quantised") == here.get("quantised")
    if not there or not own or _same_weights(there, own, linear=alike):
        return None
    return f"this base has other weights ({own}, not {there})"


def _coupled(base: Mapping[str, Any]) -> str:
    return base.get("reversible") or "null (an ordinary base)"


def _same_weights(one: str, other: str, linear: bool) -> bool:
    """Whether two digests of one rule agree. linear: whether the linear weights count. Those that could not be read never count."""
    (rest, _, weights), (own_rest, _, own_weights) = one.partition("-"), other.partition("-")
    return rest == own_rest and (not linear or weights == own_weights or "unknown" in (weights, own_weights))


def otherwise_quantised(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Return a clause that says how the linear weights of two fingerprints of one base are stored, None if it is the same way.

    Only the other weights of such bases can be compared.
    """
    there, own = (each.get("quantised", "") for each in (recorded, here))
    if there == own or _is_old(recorded["digest"]):
        return None
    names = [_spoken(each) for each in (there, own)]
    if names[0] == names[1]:
        return f"in {names[0]} with other settings, in another dtype or on another device than here"
    return f"in {names[0]}, and here the base is in {names[1]}"


def _spoken(storage: str) -> str:
    """Return the names in a record of storage: `nf4/64/True/bfloat16/cpu` is nf4."""
    named = {"Int8Params": "int8", "": "floating-point numbers"}
    return " and ".join(dict.fromkeys(named.get(first, first) for first in _firsts(storage)))


def _firsts(storage: str) -> list[str]:
    return [each.split("/")[0] for each in storage.split(" ")]


def check_base(made_for: Mapping[str, Any], root: nn.Module, state: State | None, folder: str) -> None:
    """Raise `GraftError`, with the names of both bases, if an adapter was made for another base.

    Warn if the base is the same but quantised in another way: an adapter of a base in 4 bits is used on that base in bfloat16.
    """
    own = fingerprint(root, state, like=made_for)
    difference = _difference(made_for, own)
    if difference is not None:
        here = getattr(root, "name_or_path", "") or type(root).__name__
        ways = "any_base=True, in the YAML train.any_base: true, on the command line --any-base"
        hint = f" If that is what you want, load with {ways}." if "other weights" in difference else ""
        if "base.reversible" in difference:
            hint = f" Set base.reversible: {made_for.get('reversible') or 'null'} (in Python, graft.make_reversible)."
        raise GraftError(
            f"the adapter in {folder} was made for '{made_for['model']}', not for '{here}': {difference}.{hint}"
        )
    if (otherwise := otherwise_quantised(made_for, own)) is not None:
        warnings.warn(
            f"the adapter in {folder} was trained on this base {otherwise}: it works, and its answers differ a little",
            stacklevel=2,
        )
