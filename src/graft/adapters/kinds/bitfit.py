"""BitFit: the biases alone, as differences to the base: h' = h + b.

Ben Zaken et al. 2022, "BitFit" (arXiv 2106.10199). `sites: bias` is every linear layer and norm that has a bias;
any names of such are a subset (the paper's smaller variant trains `attn.q mlp.up`).

Legend: O output features.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from graft.adapters.base import Adapter, AdapterConfig
from graft.adapters.parts.scaling import OutputScaling
from graft.adapters.surroundings import Surroundings
from graft.architectures.site import SiteSpec, SiteType
from graft.errors import GraftError


class BitFit(AdapterConfig):
    """The biases of the base, as differences."""

    source = "arXiv 2106.10199"
    takes: ClassVar[frozenset[SiteType]] = frozenset({"linear", "norm"})
    needs = frozenset({"bias"})
    suits = "A small baseline for encoders; the base has to have biases."

    kind: Literal["bitfit"] = "bitfit"
    sites: str | tuple[str, ...] = "bias"

    @property
    def folds(self) -> bool:
        return True

    def build(self, spec: SiteSpec) -> Adapter:
        return BitFitAdapter(spec)


class BitFitAdapter(OutputScaling):
    """bias [O], a difference to the bias that the host has."""

    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec, "outside", scaled=False)
        self.path = spec.module

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        if not isinstance(around.bias(), Tensor):
            raise GraftError(f"'{self.path}' has no bias to train: name sites that have one; `bias` names them all")
