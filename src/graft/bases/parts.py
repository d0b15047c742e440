"""Load a base that the processes of a run share in parts: no process ever holds it as a whole.

Its weights are mapped from the files, on the host. Block by block they are quantised, where `base.quantize` says so, on the device where
they will compute; then they are read for the digest and cut, and each process keeps its part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import groupby
from typing import Any

from torch import nn

from graft.architectures.blocks import blocks_of
from graft.architectures.layers import is_transposed
from graft.architectures.walk import base_modules
from graft.attaching.digest import Reading
from graft.attaching.fingerprint import keep_digest
from graft.bases.loading import Base, load_base
from graft.bases.quantising import options_of, quantise_layer
from graft.config.base import BaseConfig
from graft.distributed.sharded import shard
from graft.utils.allocator import large_blocks_given_back


def load_in_parts(config: BaseConfig, task: str, size: int) -> Base:
    """Load a base for a task, and keep this process's part of it. size: the number of processes, all of which call this.

    Raises `GraftError` as `load_base` does.
    """
    base = load_base(config.model_copy(update={"quantize": None}), task, whole=False)
    model, how = base.model, None
    if config.quantize is not None:
        how = options_of(config, model.config, model, base.dtype, labelled=False)["quantization_config"]
        model.config.quantization_config = how
    reading = Reading(model)
    with large_blocks_given_back() if how is not None and base.device.type == "cpu" else nullcontext():
        shard(model, size, base.device, base.dtype, _ready(base, how, reading))
    keep_digest(model, reading)
    return base


def _ready(base: Base, how: Any, reading: Reading) -> Iterator[nn.Module]:
    """Quantise and read the modules of a base in their order; yield each block once it can be cut."""
    model, kept = base.model, set() if how is None else set(how.llm_int8_skip_modules)
    paths = [path for path, _ in base_modules(model)]
    within = {
        f"{block.path}.{path}".rstrip("."): block.module
        for block in blocks_of(model)
        for path, _ in base_modules(block.module)
    }
    for block, own in groupby(paths, within.get):
        for path in own:
            module = model.get_submodule(path)
            if how is not None and path not in kept and (type(module) is nn.Linear or is_transposed(module)):
                quantise_layer(model, path, how, base.device, base.dtype)
            reading.read(path, model.get_submodule(path))
        if block is not None:
            yield block
