"""(IA)3: learned factors on the keys, the values and the inner activations of the MLP.

    keys, values:  k' = l_k (.) k,   v' = l_v (.) v        MLP:  W2 (l_ff (.) act(W1 x))

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning" (arXiv 2205.05638).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from graft.adapters.base import Adapter, AdapterConfig
from graft.adapters.parts.scaling import InputScaling, OutputScaling
from graft.adapters.parts.weight_delta import matches
from graft.architectures.site import SiteLike, SiteSpec
from graft.errors import GraftError


class IA3(AdapterConfig):
    """Learned factors on keys, values and the inner activations of the MLP."""

    source = "arXiv 2205.05638"
    suits = "One vector per layer: for few examples, and for many adapters in one batch. Can be merged."

    kind: Literal["ia3"] = "ia3"
    inputs: tuple[str, ...] = ("mlp.down",)
    """Sites that scale their input, by name or by regular expression over module names. The others scale their output."""
    sites: str | tuple[str, ...] = "attn.k attn.v cross.k? cross.v? mlp.down"

    @property
    def folds(self) -> bool:
        return True

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        # The default names a site that need not be there. It may have been written out, as a run folder does, so its value decides.
        given = self.inputs if self.inputs != type(self).model_fields["inputs"].default else ()
        for pattern in given:
            if not any(matches(pattern, site) for site in sites):
                names = ", ".join(dict.fromkeys(site.name for site in sites))
                raise GraftError(
                    f"inputs: '{pattern}' matches none of the adapter's sites ({names}; e.g. module {sites[0].module})"
                )

    def build(self, spec: SiteSpec) -> Adapter:
        on_input = any(matches(pattern, spec) for pattern in self.inputs)
        return InputScaling(spec) if on_input else OutputScaling(spec)
