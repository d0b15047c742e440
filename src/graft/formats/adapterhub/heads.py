"""The prediction head beside an AdapterHub adapter: `head_config.json` and `pytorch_model_head.bin`.

A classification head of two layers with tanh on the first token is what transformers' BERT has as its pooler and classifier, and RoBERTa as
its classifier; it is read and written where the base has these. Any other head that a folder brings, or a base without one, is left out
with a warning.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.kinds.head import Head
from graft.errors import GraftError
from graft.formats.adapterhub.file import HubFile
from graft.formats.composing import Piece
from graft.formats.foreign import load_tensors
from graft.formats.peft.folder import Folder, Held

WEIGHTS = ("pytorch_model_head.bin", "model_head.safetensors")
NUMBERS = (1, 4)
"""Of the two layers among dropout, layer, activation, dropout, layer."""
FLEXIBLE = {"bert": "BertAdapterModel", "roberta": "RobertaAdapterModel", "xlm-roberta": "XLMRobertaAdapterModel"}
"""The library's classes that take such a head."""


def head_pieces(file: HubFile) -> list[Piece]:
    """The layers of the head that the folder brings, whole, or none with a warning."""
    path = file.folder / "head_config.json"
    if not path.is_file():
        return []
    said = json.loads(path.read_text(encoding="utf-8"))
    config: dict[str, Any] = said["config"]
    places = _places(file.model)
    fits = (
        config.get("head_type") == "classification"
        and config.get("layers") == 2
        and config.get("activation_function") == "tanh"
    )
    if not (fits and places and not config.get("use_pooler")):
        warnings.warn(
            f"{file.folder} also holds a prediction head ({config.get('head_type')}), which {type(file.model).__name__} has no equal of: "
            "it is left out",
            stacklevel=2,
        )
        return []
    stored = load_tensors(file.folder, WEIGHTS)
    numbers = sorted({name.split(".")[2] for name in stored}, key=int)
    return [
        Piece(
            place, Head(), {key: stored[f"heads.{said['name']}.{number}.{key}"].float() for key in ("weight", "bias")}
        )
        for place, number in zip(places, numbers, strict=True)
    ]


def _places(model: nn.Module) -> list[str]:
    """The layer before the tanh and the classifier, where the model has both and nothing else."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "graft" not in name.split(".")
    ]
    pooler = [name for name in names if name.endswith("pooler.dense")]
    if pooler and "classifier" in names:
        return [*pooler, "classifier"]
    kind = getattr(getattr(model, "config", None), "model_type", None)
    both = ["classifier.dense", "classifier.out_proj"]
    return both if kind in ("roberta", "xlm-roberta") and set(both) <= set(names) else []


@torch.no_grad()
def write_head(root: nn.Module, installs: Sequence[Held], folder: Folder, about: dict[str, Any]) -> None:
    """A head of two layers beside an adapter; a layer that the base brings (BERT's pooler) is written as the base has it."""
    places, held_at = _places(root), {held.path: held.module for held in installs}
    if not places or not set(held_at) <= set(places):
        raise GraftError(
            f"AdapterHub's classification head is a layer, tanh and a layer on the first token; {type(root).__name__} has another one here "
            f"({', '.join(held_at)}): keep Graft's format"
        )
    tensors: dict[str, Tensor] = {}
    for place, number in zip(places, NUMBERS, strict=True):
        layer = held_at.get(place, root.get_submodule(place))
        tensors |= {f"heads.{about['name']}.{number}.{end}": getattr(layer, end) for end in ("weight", "bias")}
    count = len(tensors[f"heads.{about['name']}.{NUMBERS[-1]}.weight"])
    labels = getattr(getattr(root, "config", None), "label2id", None) or {}
    config = {
        "head_type": "classification", "layers": 2, "activation_function": "tanh", "use_pooler": False, "bias": True,
        "dropout_prob": None, "num_labels": count, "label2id": dict(labels) if len(labels) == count else None,
    }  # fmt: skip
    folder.files["head_config.json"] = {"config": config, **about, "model_class": FLEXIBLE[about["model_type"]]}
    folder.files["model_head.safetensors"] = tensors
