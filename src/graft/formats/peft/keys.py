"""The names of PEFT's tensors as PEFT writes them today, from those that older releases, wrappers and plain state dicts have.

base_model.model.<path>.lora_A.weight             what PEFT writes: ROOT, the module's path, the parameter
... <path>.lora_A.default.weight                  with the adapter's name, as in the model's own state dict
... <path>.modules_to_save.default.weight         a saved module there; PEFT writes <path>.weight
... <path>.lora_magnitude_vector.weight           DoRA's vector; PEFT writes it without the last part
module. _orig_mod.                                left by wrappers, anywhere
... language_model.model.layers.0 ...             the path in an earlier release of transformers
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from graft.architectures.old_names import OldNames
from graft.architectures.walk import base_modules
from graft.errors import GraftError, listed

PARAMETERS = (
    r"lora_[ABE]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|vera_lambda_[bd]|hada_\w+|lokr_\w+|miss_block|hira_[AB]|"
    r"shira_(?:weight|indices)|oft_R|ln_tuning_layers|trainable_tokens_delta"
)
"""What PEFT calls its parameters."""
NAMED = re.compile(rf"^(.+\.(?:{PARAMETERS}))\.(?!weight$|bias$)([^.]+)(\.weight|\.bias)?$")
"""A parameter with the adapter's name in its own: what is before, the name, and what follows."""
MARK = re.compile(rf"\.(?:{PARAMETERS}|token_adapter|base_layer|modules_to_save|original_module)(?:\.|$)")
"""Where the path of a module ends in the name of one of its tensors."""


def current(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the tensors under the names that PEFT gives them today. Raises `GraftError` for tensors of several adapters."""
    plain = {
        re.sub(r"(^|\.)(?:_orig_mod\.|module\.(?=base_model\.))", r"\1", key): tensor for key, tensor in tensors.items()
    }
    plain = {key.removeprefix("base_model.").removeprefix("model.") if key.startswith("base_model.model.") else
             key.removeprefix("base_model."): tensor for key, tensor in plain.items()}  # fmt: skip
    names = sorted({match[2] for key in plain if (match := NAMED.match(key))})
    if len(names) > 1:
        raise GraftError(f"{where} holds tensors of several adapters ({listed(names)}): save one of them by itself")
    found: dict[str, Tensor] = {}
    for key, tensor in plain.items():
        named = NAMED.match(key)
        key = f"{named[1]}{named[3] or ''}" if named else key
        key = key.replace(f".modules_to_save.{names[0] if names else 'default'}.", ".")
        key = key.removesuffix(".weight") if key.endswith(".lora_magnitude_vector.weight") else key
        _put(found, key, tensor, where)
    return found


def in_this_release(tensors: Mapping[str, Tensor], model: nn.Module, old: OldNames, where: str) -> dict[str, Tensor]:
    """Return the tensors under the names that their modules have in this model."""
    paths, found = {path for path, _ in base_modules(model)}, dict[str, Tensor]()
    for key, tensor in tensors.items():
        mark = MARK.search(key)
        path = key[: mark.start()] if mark else key.rpartition(".")[0]
        now = path if not path or path in paths else old.now(path)
        _put(found, now + key[len(path) :] if now in paths else key, tensor, where)
    return found


def names_now(names: Iterable[str], model: nn.Module, old: OldNames) -> list[str]:
    """Return what the whole paths among names of modules are called in this model; other names stay."""
    paths = {path for path, _ in base_modules(model)}
    return [name if name in paths or (now := old.now(name)) not in paths else now for name in names]


def _put(found: dict[str, Tensor], key: str, tensor: Tensor, where: str) -> None:
    if key in found and not found[key].equal(tensor):
        raise GraftError(f"{where} holds two different tensors for '{key}'")
    found[key] = tensor
