"""The Hadamard adapter: an elementwise linear map of the attention's output, trained together with the norm that follows.

    after the output projection:  h' = w (.) h + b          before it, on the joined heads:  x' = w (.) x + b

Chen et al. 2024, "Hadamard Adapter" (arXiv 2407.11033). The paper adapts only a part of the layers: give `sites` a range. Its recipe has
two stages: first the head alone, then this adapter with the head frozen.
"""

from __future__ import annotations

from typing import Literal

from graft.adapters.base import Adapter, AdapterConfig
from graft.adapters.kinds.full import Full
from graft.adapters.parts.scaling import InputScaling, OutputScaling
from graft.architectures.site import SiteSpec
from graft.errors import GraftError


class Hadamard(AdapterConfig):
    """Factors and shifts on the attention's output, trained with the norm that follows."""

    source = "arXiv 2407.11033"
    suits = "Classification with encoders in a few tens of thousands of parameters."

    kind: Literal["hadamard"] = "hadamard"
    position: Literal["after", "before"] = "after"
    """Whether the map acts after the output projection or before it."""
    norm: Literal["attn", "mlp", "none"] = "attn"
    """Norm of the same layers that is trained too: the attention's, the MLP's, or none."""
    sites: str | tuple[str, ...] = "attn.o"

    @property
    def folds(self) -> bool:
        return True

    @property
    def learns_bias(self) -> bool:
        return True

    def parts(self) -> tuple[AdapterConfig, ...]:
        if self.norm == "none":
            return (self,)
        return self.model_copy(update={"norm": "none"}), Full(
            sites=tuple(self._norm_of(name) for name in self._names())
        )

    def _names(self) -> tuple[str, ...]:
        """Return the site names one by one."""
        if isinstance(self.sites, str) and not self.sites.startswith("re:"):
            return tuple(self.sites.split())
        return (self.sites,) if isinstance(self.sites, str) else self.sites

    def _norm_of(self, site: str) -> str:
        """Return the site of the norm that belongs to a site: "decoder.attn.o@4-11" gives "decoder.norm.attn@4-11"."""
        name, at, layers = site.partition("@")
        head, _, sublayer = name.removesuffix(".o").rpartition(".")
        if not name.endswith(".o") or sublayer not in ("attn", "cross"):
            raise GraftError(
                f"hadamard: Graft does not know which norm belongs to site '{site}': write norm: none, and stack `full` for the norms"
            )
        chosen = "mlp" if self.norm == "mlp" else sublayer
        return f"{head}.norm.{chosen}{at}{layers}".removeprefix(".")

    def build(self, spec: SiteSpec) -> Adapter:
        return OutputScaling(spec, "outside") if self.position == "after" else InputScaling(spec, shift=True)
