"""AdapterHub's folders of an AdapterFusion, read with the adapters that it is made of.

`save_adapter_fusion` writes the attention alone, with the names of its adapters; `save_adapter` writes those, each to a folder of its own.
In Graft a fusion refers to adapters by their folders, so these are converted along with it.

With h a sublayer's output, r the residual stream and u what the bottlenecks read, the library computes

    scores_n = Q a . K f_n(u),   h + sum_n softmax(scores)_n V f_n(u),   a = u, or h with query_before_ln

which is Graft's kind fusion where a bottleneck adds f(u) to h and does no more. For parallel adapters the library adds r a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.adapters.kinds.fusion import Fusion
from graft.adapters.parsing import parse
from graft.attaching.attach import detach
from graft.attaching.saving import save
from graft.errors import GraftError
from graft.formats.adapterhub.file import HubFile
from graft.formats.adapterhub.reading import read as read_adapter
from graft.formats.composing import Piece, composed
from graft.formats.fields import Fields, Ignored, known
from graft.formats.filling import attach_filled
from graft.utils.strict_json import read_object

FUSION = "adapter_fusion_config.json"
OUT = "fusion"
"""The folder of the fusion, beside those of its adapters."""
WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")


class FusionFolderFields(Fields):
    """Of a folder: which adapters are fused, and the config of the attention."""

    config: dict[str, object]
    name: str
    adapter_names: list[str] | None = None
    model_type: Ignored = None
    model_class: Ignored = None
    model_name: Ignored = None
    hidden_size: Ignored = None
    version: Ignored = None


class FusionFields(Fields):
    """Of the attention."""

    key: bool = True
    query: bool = True
    value: bool = True
    query_before_ln: bool = False
    regularization: bool = True
    residual_before: bool = False
    temperature: bool = False
    value_before_softmax: Ignored = True  # V is linear, so before and after are the same
    value_initialized: Ignored = True
    dropout_prob: float | None = None


def detect(folder: str | Path) -> bool:
    """Whether the folder holds an AdapterFusion of AdapterHub."""
    return (Path(folder) / FUSION).is_file()


def _adapter_folders(folder: Path, fields: dict[str, Any]) -> dict[str, Path]:
    """Return the folders of the adapters that are fused, by their names. They lie beside the fusion's, as the library saves them."""
    names = fields["adapter_names"] or fields["name"].split(",")
    found = {name: folder.absolute().parent / name for name in names}
    if OUT in found:
        raise GraftError(
            f"{folder} fuses an adapter called {OUT}, which is the name of the fusion's own folder: rename it"
        )
    if absent := [name for name, path in found.items() if not path.is_dir()]:
        raise GraftError(
            f"{folder} is a fusion of the adapters {', '.join(names)}, and there is no folder of {', '.join(absent)} beside it: "
            "save each with the library's save_adapter to a folder of its name there"
        )
    return found


def convert(model: nn.Module, folder: Path, to: Path, name: str) -> None:
    """Write the fusion of a folder, and the adapters that it is made of, in Graft's format: to `to`/fusion, and to folders of their names.

    The fusion stays attached, under `name`. Raises `GraftError` for adapters that are not there, and for what has no equal in Graft.
    """
    where = folder / FUSION
    fields = known(FusionFolderFields, read_object(where), str(where), "an AdapterFusion folder")
    of = {}
    for each, path in _adapter_folders(folder, fields).items():
        attach_filled(model, name, *read_adapter(path, model), str(path))
        of[each] = save(model, name, to / each)
        detach(model, name)
    config, stored = _read(folder, fields, model, of)
    attach_filled(model, name, config, stored, str(folder))
    save(model, name, to / OUT)


def _read(
    folder: Path, fields: dict[str, Any], model: nn.Module, of: Mapping[str, Path]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read a fusion: its config, and float32 tensors under Graft's names. of: folders of its adapters in Graft's format, by name.

    Raises `GraftError` for settings that have no equal in Graft, and for missing or unexpected tensors (all are listed).
    """
    config = known(FusionFields, fields["config"], str(folder / FUSION), "an AdapterFusion")
    refused = {
        "key: false": not config["key"],
        "query: false": not config["query"],
        "residual_before: true": config["residual_before"],
        "temperature: true (a temperature that falls while it trains, and is not in the folder)": config["temperature"],
    }
    if wrong := [reason for reason, holds in refused.items() if holds]:
        raise GraftError(f"{folder} is a fusion with {' and '.join(wrong)}, which has no equal in Graft")
    found = parse({"kind": "fusion", "of": [str(path.absolute()) for path in of.values()], **_settings(config, model)})
    assert isinstance(found, Fusion)
    bottlenecks = {each.folder: each.of for each in found.of}
    _check_bottlenecks(bottlenecks)
    if config["query_before_ln"] is False and all(
        getattr(each, "reads", "") == "stream" for each in bottlenecks.values()
    ):
        found = found.model_copy(update={"reads": "stream"})
    placed, tensors = composed(model, _pieces(HubFile(folder, fields, model, WEIGHTS, "adapter_fusion_layer"), found))
    if placed.sites != found.sites:
        raise GraftError(f"{folder} fuses at {placed.sites!r}, and its adapters act at {found.sites!r}")
    return placed, tensors


def _settings(config: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    dropout = config["dropout_prob"]
    if dropout is None:
        dropout = getattr(model.config, "attention_probs_dropout_prob", 0.0)
    penalty = {"penalty": 0.01 if config["regularization"] else 0.0} if config["value"] else {}
    return {"dropout": float(dropout), "value": config["value"], **penalty}


def _check_bottlenecks(configs: Mapping[str, AdapterConfig]) -> None:
    """Raise `GraftError` for an adapter of which the library fuses something else than what it adds to the output."""
    for folder, each in configs.items():
        refused = {
            f"kind {each.kind} (the library fuses bottlenecks)": each.kind not in ("series", "parallel", "compacter"),
            "a parallel bottleneck, for which the library adds the residual stream twice": each.kind == "parallel",
            "ln_after, which the library leaves out there": getattr(each, "norm_after", False),
            "residual_before_ln: false": getattr(each, "skip", "site") != "site",
        }
        if wrong := [reason for reason, holds in refused.items() if holds]:
            raise GraftError(f"the fused adapter in {folder} is {wrong[0]}: Graft has no equal of its fusion")
    if len({getattr(each, "reads", "") for each in configs.values()}) > 1:
        raise GraftError(
            "the fused adapters read different things, and the library lets all read what the last one reads"
        )


def _pieces(file: HubFile, config: Fusion) -> list[Piece]:
    pieces = []
    for site, prefix in file.sublayers("attn", "cross", "mlp"):
        if not any(key.startswith(prefix) for key in file.left):
            continue
        tensors = {
            f"{end}.{each}": file.take(f"{prefix}{end}.{each}")
            for end in ("query", "key")
            for each in ("weight", "bias")
        }
        if config.value:
            tensors["value"] = file.take(f"{prefix}value.weight")
        pieces.append(Piece(site.module, config, tensors, site.part))
    file.finish()
    return pieces
