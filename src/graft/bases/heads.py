"""The head of a classifier: whether the base brings one, and the first weights of one that it does not bring, or that is not wanted.

A fresh head means nothing without its training, so it belongs to the adapter: kind `head` holds its weights whole. What the base has in
its place is drawn from a seed and left behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graft.adapters.base import AdapterConfig
from graft.adapters.kinds.head import Head
from graft.adapters.kinds.stack import Stack
from graft.adapters.presets import Preset
from graft.architectures.language import resolve_sites
from graft.architectures.layers import is_linear
from graft.errors import GraftError
from graft.injection.state import site_table_of, unwrapped

COLLECTIVE = ("bias", "norm", "linear")
"""Sites that name modules all over the model, a head among them."""


def fresh_modules(model: Any, missing: Iterable[str]) -> tuple[str, ...]:
    """The linear layers that the checkpoint did not bring, by path.

    missing: names of the tensors that it lacks. Raises `GraftError` for one that lies in the body: the body means nothing without it.
    """
    body = f"{model.base_model_prefix}."
    found = []
    for path in dict.fromkeys(name.rpartition(".")[0] for name in missing):
        if path.startswith(body) and not path.removeprefix(body).startswith("pooler"):
            raise GraftError(
                f"base.model: the weights lack those of '{path}', which is not part of a classifier's head"
            )
        if is_linear(model.get_submodule(path)):
            found.append(path)
    return tuple(found)


def head_modules(model: Any) -> tuple[str, ...]:
    """The linear layers of a classifier's head, by path: those outside of the body. BERT's pooler is part of its body."""
    body = f"{model.base_model_prefix}."
    return tuple(path for path, module in model.named_modules() if is_linear(module) and not path.startswith(body))


@torch.no_grad()
def draw_head(model: nn.Module, fresh: Iterable[str], seed: int) -> None:
    """Draw a fresh head from a seed, the way transformers does for this family. An adapter attached next starts from it."""
    root: Any = unwrapped(model)
    paths = set(fresh)
    if not paths:
        return
    above = {path.rsplit(".", depth)[0] for path in paths for depth in range(1, path.count(".") + 1)}
    inside = {path for path in above if path.split(".")[0] != root.base_model_prefix}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for path in sorted(paths | inside, key=lambda path: (-path.count("."), path)):
            module = root.get_submodule(path)
            for parameter in module.parameters():
                parameter.__dict__.pop("_is_hf_initialized", None)
            root._init_weights(module)


def with_head(model: nn.Module, adapter: AdapterConfig | Preset, fresh: Sequence[str]) -> AdapterConfig | Preset:
    """The adapter together with a fresh head; the adapter itself where the base brings its head, or where it names the head itself.

    The head comes first, so that what a collective site (`bias`) adds there is added to it. Raises `GraftError` for an adapter that names
    a fresh head in order to change it in another way than by replacing it: such a change may rest on what the base has there.
    """
    root, left = unwrapped(model), list(fresh)
    if not left:
        return adapter
    config = adapter.resolve(site_table_of(root).names()) if isinstance(adapter, Preset) else adapter
    for part in config.parts():
        for site in resolve_sites(site_table_of(root), part):
            if site.module in left and part.replaces:
                left.remove(site.module)
            elif site.module in fresh and site.name not in COLLECTIVE:
                raise GraftError(
                    f"kind '{part.kind}' names '{site.module}', a head that the base does not bring: every adapter trains it whole. Name "
                    "other sites"
                )
    if not left:
        return config
    head = Head(sites="re:" + "|".join(path.replace(".", r"\.") for path in left))
    return Stack(adapters=(head, config))


def brings_head(folder: Path) -> bool:
    """Whether a saved adapter holds a head whole, so that the base's own does not matter to it."""
    path = folder / "adapter_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return bool((said.get("base") or {}).get("without"))
