"""The prediction head in an AdapterHub folder, beside the adapter: `head_config.json` and `pytorch_model_head.bin`.

The library's classification head has two layers with a tanh between them and reads the first token. In transformers these two layers are
BERT's pooler and classifier, and RoBERTa's classifier, so the head is read and written for these models. Any other head in a folder, or a
base without such layers, leads to a warning, and the head is left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.kinds.head import Head
from graft.architectures.walk import base_submodules
from graft.attaching.stored import as_floats
from graft.errors import GraftError, listed
from graft.formats.adapterhub.file import HubFile
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter
from graft.formats.foreign import load_weights
from graft.utils.strict_json import read_object

WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")
NUMBERS = (1, 4)
"""Indices of the two layers in the library's sequence of dropout, layer, activation, dropout, layer."""
FLEXIBLE = {"bert": "BertAdapterModel", "roberta": "RobertaAdapterModel", "xlm-roberta": "XLMRobertaAdapterModel"}
"""The library's classes that have such a head, by model type."""


def head_pieces(file: HubFile) -> list[Piece]:
    """Read the two layers of the folder's head, if the base has them too. Otherwise warn and return nothing."""
    path = file.folder / "head_config.json"
    if not path.is_file():
        return []
    stored_config = read_object(path)
    if stored_config.get("config") is None:  # that of the base, not of the library
        _warn_of_other_head(file, stored_config)
        return []
    config: dict[str, Any] = stored_config["config"]
    layers = _head_layers(file.model)
    fits = (
        config.get("head_type") == "classification"
        and config.get("layers") == 2
        and config.get("activation_function") == "tanh"
    )
    if not (fits and layers and not config.get("use_pooler")):
        warnings.warn(
            f"{file.folder} also holds a prediction head ({config.get('head_type')}), which {type(file.model).__name__} has no equal "
            "of: it is left out",
            stacklevel=2,
        )
        return []
    stored = load_weights(file.folder, WEIGHTS)
    name = f"heads.{stored_config['name']}"
    numbers = sorted({key.split(".")[2] for key in stored}, key=int)
    wanted = [f"{name}.{number}.{end}" for number in numbers for end in ("weight", "bias")]
    if len(numbers) != len(layers) or set(wanted) != set(stored):
        raise GraftError(
            f"{file.folder}: the prediction head has the tensors {listed(sorted(stored))}, but two layers with a weight and a bias are "
            f"expected under '{name}.'"
        )
    tensors = {key: as_floats(tensor, f"{file.folder}: tensor '{key}' of the head") for key, tensor in stored.items()}
    return [
        Piece(path, Head(), {end: tensors[f"{name}.{number}.{end}"] for end in ("weight", "bias")})
        for path, number in zip(layers, numbers, strict=True)
    ]


def _warn_of_other_head(file: HubFile, config: Mapping[str, Any]) -> None:
    """Warn of a head of the base's class that a folder holds, unless it is the head that this base has."""
    own = dict(file.model.named_parameters(remove_duplicate=False))
    stored = load_weights(file.folder, WEIGHTS)
    if not all(
        key in own and torch.equal(own[key].detach().cpu(), tensor.to(own[key].dtype)) for key, tensor in stored.items()
    ):
        warnings.warn(
            f"{file.folder} also holds the head of a {config.get('model_class')}, which is not that of this base: it is left out",
            stacklevel=3,
        )


def _head_layers(model: nn.Module) -> list[str]:
    """Return the paths of the layer before the tanh and of the classifier, or nothing if the model's head is another one."""
    names = [name for name, module in base_submodules(model) if isinstance(module, nn.Linear)]
    pooler = [name for name in names if name.endswith("pooler.dense")]
    if pooler and "classifier" in names:
        return [*pooler, "classifier"]
    kind = getattr(getattr(model, "config", None), "model_type", None)
    both = ["classifier.dense", "classifier.out_proj"]
    return both if kind in ("roberta", "xlm-roberta") and set(both) <= set(names) else []


@torch.no_grad()
def write_head(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder, about: dict[str, Any]) -> None:
    """Add a head of two layers to the folder. A layer that the adapter does not train (BERT's pooler) is written as the base has it."""
    layers, by_path = _head_layers(root), {adapter.path: adapter.module for adapter in adapters}
    if not layers or not set(by_path) <= set(layers):
        raise GraftError(
            f"AdapterHub's classification head is a layer, a tanh and a layer on the first token; {type(root).__name__} has another head "
            f"({', '.join(by_path)}): keep Graft's format"
        )
    tensors: dict[str, Tensor] = {}
    for path, number in zip(layers, NUMBERS, strict=True):
        layer = by_path.get(path, root.get_submodule(path))
        tensors |= {f"heads.{about['name']}.{number}.{end}": getattr(layer, end) for end in ("weight", "bias")}
    count = len(tensors[f"heads.{about['name']}.{NUMBERS[-1]}.weight"])
    labels = getattr(getattr(root, "config", None), "label2id", None) or {}
    config = {
        "head_type": "classification", "layers": 2, "activation_function": "tanh", "use_pooler": False, "bias": True,
        "dropout_prob": None, "num_labels": count, "label2id": dict(labels) if len(labels) == count else None,
    }  # fmt: skip
    folder.files["head_config.json"] = {"config": config, **about, "model_class": FLEXIBLE[about["model_type"]]}
    folder.files["model_head.safetensors"] = tensors
