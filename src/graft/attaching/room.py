"""Refuse an adapter that the machine has no memory for, before memory is spent: a rank of a billion is typed easily."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from graft.adapters.base import AdapterConfig
from graft.architectures.site import SiteSpec
from graft.errors import GraftError, counted


def refuse_too_large(config: AdapterConfig, specs: Sequence[SiteSpec]) -> None:
    """Raise `GraftError` if fresh modules for these sites need more memory than the device has.

    One module of each shape is built on the meta device, which holds no numbers.
    """
    if not specs or specs[0].device.type == "meta":
        return
    empty = [replace(spec, device=torch.device("meta")) for spec in specs]
    sizes: dict[str, int] = {}
    with torch.random.fork_rng(devices=[]):
        total = _bytes(config, lambda: config.build_shared(empty))
        for spec in empty:
            at_site = config.for_site(spec)
            shape = repr((at_site, replace(spec, name="", module="", layer=None, index=0)))
            if shape not in sizes:
                sizes[shape] = _bytes(config, functools.partial(at_site.build, spec))
            total += sizes[shape]
    most = _memory(specs[0].device)
    if total > most:
        raise GraftError(
            f"adapter kind '{config.kind}' would take {total / 1e9:,.1f} GB at {counted(len(specs), 'site')}, but {specs[0].device} has "
            f"{most / 1e9:,.1f} GB: lower its rank, bottleneck, tokens or experts, or name fewer sites"
        )


def _bytes(config: AdapterConfig, build: Callable[[], nn.Module | None]) -> int:
    """Return the bytes of a module that is built without numbers; 0 if it cannot be built so, and nothing is known."""
    try:
        module = build()
    except Exception as error:  # code of another package may raise anything; the real build reports it
        if "overflow" in f"{type(error).__name__} {error}".lower():  # a number of entries beyond 64 bits
            raise GraftError(f"adapter kind '{config.kind}' is too large to build: {error}") from error
        return 0
    return (
        0
        if module is None
        else sum(each.numel() * each.element_size() for each in (*module.parameters(), *module.buffers()))
    )


def _memory(device: torch.device) -> int:
    """Return the bytes of memory of a device, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
