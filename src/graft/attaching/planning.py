"""What an adapter would hold, before memory is spent on it: its modules are built on the meta device, and their shapes are compared.

A config of a few bytes can ask for a rank of a million. So the shapes of a file's tensors are compared with those of modules without
memory, and only an adapter that fits is attached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from graft.adapters.base import AdapterConfig
from graft.architectures.site import SiteKeys
from graft.architectures.walk import base_parameters
from graft.attaching.install import spec_of
from graft.errors import GraftError, listed
from graft.injection.state import SHARED, sites_of, unwrapped

Shape = tuple[int, ...]


def check_shapes(model: nn.Module, config: AdapterConfig, stored: Mapping[str, Shape], origin: str) -> None:
    """Raise `GraftError` if the tensors of a file cannot be those of an adapter with this config. Nothing is allocated.

    stored: the shapes by name, as in `parameters.tensors`. origin: where they come from, for messages.
    A tensor that a module adds or drops only when it is installed (`Adapter.on_install`) is left to the copy. It is never larger than its
    host, so a promised tensor that is missing and larger is an error here.
    """
    misshapen, missing = [], []
    for name, shape, limit in _expected(model, config):
        if name in stored and stored[name] != shape:
            misshapen.append(f"{name} {stored[name]} instead of {shape}")
        elif name not in stored and torch.Size(shape).numel() > limit:
            missing.append(f"{name} {shape}")
    problems = [f"{len(names)} {what} ({listed(names, 5)})"
                for what, names in (("missing", missing), ("misshapen", misshapen)) if names]  # fmt: skip
    if problems:
        raise GraftError(f"{origin} does not fit the adapter that its config describes: " + "; ".join(problems))


def _expected(model: nn.Module, config: AdapterConfig) -> Iterator[tuple[str, Shape, int]]:
    """Yield (name, shape, numbers in the host) of every tensor of a fresh adapter."""
    root, keys, count = unwrapped(model), SiteKeys(), 0
    for number, part in enumerate(config.parts()):
        sites = sites_of(root, part)
        part.check_sites(sites)
        specs = [
            replace(spec_of(root, site, count + index), device=torch.device("meta")) for index, site in enumerate(sites)
        ]
        count += len(specs)
        shared = part.build_shared(specs)
        if shared is not None:
            yield from _named(shared, f"{SHARED}{number}", _numbers(root))
        for site, spec in zip(sites, specs, strict=True):
            path = f"{site.module}.{keys.take(site.module, site.part)}".lstrip(".")
            yield from _named(part.for_site(spec).build(spec), path, _numbers(root.get_submodule(site.module)))


def _numbers(host: nn.Module) -> int:
    return sum(parameter.numel() for _, parameter in base_parameters(host))


def _named(module: nn.Module, path: str, limit: int) -> Iterator[tuple[str, Shape, int]]:
    for key, tensor in module.state_dict().items():
        yield f"{path}.{key}", tuple(tensor.shape), limit
