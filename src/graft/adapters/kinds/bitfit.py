"""BitFit: only the biases, trained as differences from those of the base: h' = h + b.

`sites: bias` names every linear layer and norm that has a bias. Other names choose a subset; the paper's smaller variant trains
`attn.q mlp.up`. Ben Zaken et al. 2022, "BitFit" (arXiv 2106.10199).

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
    """The biases of the base, trained as differences."""

    source = "arXiv 2106.10199"
    takes: ClassVar[frozenset[SiteType]] = frozenset({"linear", "norm"})
    needs = frozenset({"bias"})
    suits = "A small baseline for encoders. The base must have biases."

    kind: Literal["bitfit"] = "bitfit"
    sites: str | tuple[str, ...] = "bias"

    @property
    def folds(self) -> bool:
        return True

    def build(self, spec: SiteSpec) -> Adapter:
        return BitFitAdapter(spec)


class BitFitAdapter(OutputScaling):
    """bias [O], the difference from the host's bias."""

    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec, "outside", scaled=False)
        self.path = spec.module

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        if not isinstance(around.bias(), Tensor):
            raise GraftError(f"'{self.path}' has no bias to train: name sites that have one (`bias` names all of them)")
