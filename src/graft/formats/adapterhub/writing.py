"""Write an attached adapter in AdapterHub's format. What the library cannot hold is refused, with the reason.

An adapter of several kinds becomes a union (MAM: a prefix and a parallel bottleneck).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from graft.errors import GraftError
from graft.formats.adapterhub.bottlenecks import write_compacter, write_parallel, write_series
from graft.formats.adapterhub.gates import FORMS, ungated, write_gates
from graft.formats.adapterhub.heads import write_head
from graft.formats.adapterhub.invertible import write_invertible
from graft.formats.adapterhub.lora import write_dora, write_ia3, write_lora
from graft.formats.adapterhub.places import model_type
from graft.formats.adapterhub.prompts import write_prefix, write_prompt
from graft.formats.adapterhub.reft import write_reft
from graft.formats.folder import Folder, SiteAdapter, base_name, site_adapters
from graft.injection.state import State

NOTE = "load it in AdapterHub with load_adapter(FOLDER, use_safetensors=True)"


def write(root: nn.Module, state: State, name: str) -> Folder:
    """Return the folder that AdapterHub reads. Raises `GraftError` for kinds, combinations, settings and models that it cannot hold."""
    by_kind: dict[str, list[SiteAdapter]] = defaultdict(list)
    for adapter in site_adapters(root, state, name):
        by_kind[" around ".join((adapter.config.kind, *(of.kind for of in adapter.config.inner())))].append(adapter)
    head, invertible = by_kind.pop("head", []), by_kind.pop("invertible", [])
    unknown = sorted(set(by_kind) - set(WRITERS) - {f"gate around {kind}" for kind in FORMS})
    if unknown or not by_kind:
        raise GraftError(
            f"AdapterHub has no kind that computes what {' and '.join(unknown or ['a head alone'])} does, or its files lose the settings. "
            f"Graft writes: {', '.join(WRITERS)}, gates around {', '.join(FORMS)}, and with any of them a classifier's head"
        )
    config: Any = root.config
    folder, kind = Folder(notes=[NOTE]), model_type(root)
    configs = [_written(root, each, adapters, folder, name) for each, adapters in by_kind.items()]
    about = {"hidden_size": config.hidden_size, "model_class": type(root).__name__, "model_name": base_name(root),
             "model_type": kind, "name": name, "version": "adapters.1.3.0"}  # fmt: skip
    if invertible:
        write_invertible(root, invertible, configs, folder, name)
    whole = configs[0] if len(configs) == 1 else {"architecture": "union", "configs": configs}
    folder.config = {"config": whole, **about}
    if head:
        write_head(root, head, folder, about)
    folder.tensors = {key: tensor.detach() for key, tensor in folder.tensors.items()}
    return folder


def _written(root: nn.Module, kind: str, adapters: Sequence[SiteAdapter], folder: Folder, name: str) -> dict[str, Any]:
    """Add the tensors of one kind to the folder, with the gates around it if there are any, and return its config."""
    if not kind.startswith("gate around "):
        return WRITERS[kind](root, adapters, folder, name)
    inside = ungated(adapters)
    config = WRITERS[kind.removeprefix("gate around ")](root, inside, folder, name)
    write_gates(root, adapters, folder, name)
    return {**config, "use_gating": True}


Writer = Callable[[nn.Module, Sequence[SiteAdapter], Folder, str], dict[str, Any]]
WRITERS: dict[str, Writer] = {
    "series": write_series, "parallel": write_parallel, "compacter": write_compacter,
    "lora": write_lora, "dora": write_dora, "ia3": write_ia3,
    "prefix": write_prefix, "prompt": write_prompt, "p-tuning": write_prompt, "reft": write_reft,
}  # fmt: skip
"""Functions that add the tensors of one kind to the folder, and return its config."""
