"""The head of a classifier: whether the base has one, and how a fresh head is drawn if it has none or the user wants a new one.

A fresh head is useless without training, so it belongs to the adapter: kind `head` holds its weights whole. What the base has there is
drawn from a seed and is never saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graft.adapters.base import AdapterConfig
from graft.adapters.kinds.head import Head
from graft.adapters.kinds.stack import Stack
from graft.adapters.presets import Preset
from graft.architectures.layers import is_linear
from graft.architectures.transformers_internals import initialise
from graft.errors import GraftError
from graft.injection.state import site_table_of, sites_of, unwrapped
from graft.utils.strict_json import read_object

COLLECTIVE = ("bias", "norm", "linear")
"""Site names that cover modules all over the model, and so may include the head without asking for it."""


def fresh_modules(model: Any, missing: Iterable[str]) -> tuple[str, ...]:
    """Return the paths of the linear layers that the model's files lack.

    missing: names of the tensors that they lack. Raises `GraftError` if one belongs to the body, which is useless without it.
    """
    body = f"{model.base_model_prefix}."
    found = []
    for path in dict.fromkeys(name.rpartition(".")[0] for name in missing):
        if path.startswith(body) and not path.removeprefix(body).startswith("pooler"):
            raise GraftError(
                f"base.model: the model's files lack the weights of '{path}', which is not part of a classifier's head"
            )
        if is_linear(model.get_submodule(path)):
            found.append(path)
    return tuple(found)


def head_modules(model: Any) -> tuple[str, ...]:
    """Return the paths of the linear layers of a classifier's head, which are those outside the body. BERT's pooler is in the body."""
    body = f"{model.base_model_prefix}."
    return tuple(path for path, module in model.named_modules() if is_linear(module) and not path.startswith(body))


@torch.no_grad()
def draw_head(model: nn.Module, fresh: Iterable[str], seed: int) -> None:
    """Draw a fresh head from a seed, as transformers does for this model. An adapter that is attached next starts from it."""
    root: Any = unwrapped(model)
    paths = set(fresh)
    if not paths:
        return
    # Some models initialise a head by a rule for its container (T5's classification head), so the containers are initialised too.
    above = {path.rsplit(".", depth)[0] for path in paths for depth in range(1, path.count(".") + 1)}
    inside = {path for path in above if path.split(".")[0] != root.base_model_prefix}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # The order is fixed, innermost first, so that a seed always gives the same head.
        for path in sorted(paths | inside, key=lambda path: (-path.count("."), path)):
            initialise(root, root.get_submodule(path))


def with_head(model: nn.Module, adapter: AdapterConfig | Preset, fresh: Sequence[str]) -> AdapterConfig | Preset:
    """Add a fresh head to an adapter. It stays as it is if the base has its own head, or if the adapter replaces the head itself.

    The head comes first in the stack, so that what a collective site (`bias`) adds there is added to the new head. Raises `GraftError` for
    an adapter that names a fresh head but does not replace it, because such an update would depend on random weights.
    """
    root, left = unwrapped(model), list(fresh)
    if not left:
        return adapter
    config = adapter.resolve(site_table_of(root).names()) if isinstance(adapter, Preset) else adapter
    for part in config.parts():
        for site in sites_of(root, part):
            if site.module in left and part.replaces:
                left.remove(site.module)
            elif site.module in fresh and site.name not in COLLECTIVE:
                raise GraftError(
                    f"kind '{part.kind}' adapts '{site.module}', a head that the base lacks. Every adapter trains such a head whole: name "
                    "other sites"
                )
    if not left:
        return config
    head = Head(sites="re:" + "|".join(path.replace(".", r"\.") for path in left))
    return Stack(adapters=(head, config))


def brings_head(folder: Path) -> bool:
    """Whether a saved adapter holds a whole head, so that it does not depend on the base's own."""
    path = folder / "adapter_config.json"
    made_for = read_object(path).get("base") if path.is_file() else None
    return isinstance(made_for, dict) and bool(made_for.get("without"))
