"""What an attached adapter is, as a digest of its config and its weights: what was computed with it holds as long as this is the same."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.attaching.parameters import tensors
from graft.injection.state import AttachedAdapter, state_of, unwrapped


@dataclass(frozen=True)
class _Known:
    """The digest of an adapter, and of what it was made."""

    attached: AttachedAdapter
    tensors: list[Tensor]
    versions: list[int]
    digest: str


class AdapterDigests:
    """The digests of a model's adapters. Weights are read again only when torch counts a change in one of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: dict[str, _Known] = {}

    def of(self, name: str | None) -> str:
        """Return the digest of an adapter, or of several with weights; empty for the bare base."""
        if name is None:
            return ""
        state = state_of(self.model)
        if (together := state.combinations.get(name)) is not None:
            return "+".join(f"{weight!r}*{self.of(each)}" for each, weight in together.weights.items())
        attached, known = state.adapter(name), self._known.get(name)
        if (
            known is not None
            and known.attached is attached
            and known.versions == [each._version for each in known.tensors]
        ):
            return known.digest
        self._known = {each: its for each, its in self._known.items() if each in state.adapters}
        self._known[name] = self._read(name, attached)
        return self._known[name].digest

    def _read(self, name: str, attached: AttachedAdapter) -> _Known:
        digest = hashlib.sha256(attached.config.model_dump_json().encode())
        own = list(tensors(unwrapped(self.model), state_of(self.model), name))
        for key, tensor in own:
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
        found = [tensor for _, tensor in own]
        return _Known(attached, found, [each._version for each in found], digest.hexdigest())
