"""Refuse an adapter that the machine has no memory for, before memory is spent: a rank of a billion is typed easily."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from graft.adapters.base import AdapterConfig
from graft.architectures.site import SiteSpec
from graft.errors import GraftError


def refuse_too_large(config: AdapterConfig, specs: Sequence[SiteSpec]) -> None:
    """Raise `GraftError` if fresh modules for these sites need more memory than the device has.

    One module of each shape is built on the meta device, which holds no numbers.
    """
    if not specs or specs[0].device.type == "meta":
        return
    sizes: dict[str, int] = {}
    with torch.random.fork_rng(devices=[]):
        total = sum(_bytes(config.for_site(spec), spec, sizes) for spec in specs)
    most = _memory(specs[0].device)
    if total > most:
        raise GraftError(
            f"adapter kind '{config.kind}' would take {total / 1e9:,.1f} GB at {len(specs)} sites, but {specs[0].device} has "
            f"{most / 1e9:,.1f} GB: lower its rank, bottleneck or tokens, or name fewer sites"
        )


def _bytes(config: AdapterConfig, spec: SiteSpec, sizes: dict[str, int]) -> int:
    """Return the bytes of the module of one site. sizes: those of the shapes that are known."""
    shape = repr((config, replace(spec, name="", module="", layer=None, index=0)))
    if shape not in sizes:
        try:
            module = config.build(replace(spec, device=torch.device("meta")))
        except (RuntimeError, OverflowError, MemoryError) as error:  # a number of entries beyond 64 bits
            raise GraftError(f"adapter kind '{config.kind}' is too large to build at {spec.module}: {error}") from error
        sizes[shape] = sum(each.numel() * each.element_size() for each in (*module.parameters(), *module.buffers()))
    return sizes[shape]


def _memory(device: torch.device) -> int:
    """Return the bytes of memory of a device, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
