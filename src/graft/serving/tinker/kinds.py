"""Which adapter a client wants: LoRA, as the protocol has it, or any kind of Graft's by a key of `user_metadata`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from graft.adapters.base import AdapterConfig
from graft.adapters.kinds.lora import LoRA
from graft.adapters.parsing import parse
from graft.adapters.presets import Preset
from graft.architectures.sites import SiteTable
from graft.errors import GraftError
from graft.serving.tinker.bodies import LoraConfig

KEY = "graft.adapter"
"""The key of `user_metadata`: an adapter as a run's YAML has it, or the same as JSON in a text. `lora_config` then says the seed alone."""
ALPHA = 32.0
"""The protocol does not send LoRA's alpha."""
_ATTENTION = "attn.q? attn.k? attn.v? attn.o?"
_MLP = "mlp.gate? mlp.up? mlp.gate_up? mlp.down? experts.gate_up? experts.up? experts.down?"
_HEAD = "head?"


def adapter_of(lora: LoraConfig, labels: Mapping[str, Any] | None, base: nn.Module) -> AdapterConfig:
    """Return the adapter to attach to a base. Raises `GraftError` for an unknown kind or a wrong field."""
    given = (labels or {}).get(KEY)
    if given is None:
        wanted = {_ATTENTION: lora.train_attn, _MLP: lora.train_mlp, _HEAD: lora.train_unembed}
        if not any(wanted.values()):
            raise GraftError("lora_config: one of train_attn, train_mlp and train_unembed must be true")
        return LoRA(rank=lora.rank, alpha=ALPHA, sites=" ".join(sites for sites, chosen in wanted.items() if chosen))
    try:
        found = parse(json.loads(given) if isinstance(given, str) and given.lstrip().startswith(("{", "[")) else given)
    except json.JSONDecodeError as error:
        raise GraftError(f"user_metadata: {KEY} is not JSON: {error}") from error
    return found.resolve(SiteTable(base).names()) if isinstance(found, Preset) else found
