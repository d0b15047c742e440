"""LLaMA-Adapter v2, the part without prompts: a bias and factors on every linear layer, and all norms.

    scale on the output (the paper):  h' = s * (W x + b)        on the input (its released chat models):  h' = W (s * x) + b

Gao et al. 2023, "LLaMA-Adapter V2" (arXiv 2304.15010). Its prompts are the kind `llama-adapter` beside it in a stack.
"""

from __future__ import annotations

from typing import Literal

from graft.adapters.base import Adapter, AdapterConfig
from graft.adapters.kinds.full import Full
from graft.adapters.parts.scaling import InputScaling, OutputScaling
from graft.architectures.site import SiteSpec


class LLaMAAdapterV2(AdapterConfig):
    """A bias and factors on every linear layer, with all norms."""

    source = "arXiv 2304.15010"
    suits = "0.04 % of LLaMA-7B; where layers have no bias the learned ones cannot be merged."

    kind: Literal["llama-adapter-v2"] = "llama-adapter-v2"
    scale: Literal["output", "input", "none"] = "output"
    """Where the factors act: on the output (the paper), on the input (the released chat models), or nowhere (biases alone)."""
    norms: bool = True
    """Also train every norm of the model."""
    sites: str | tuple[str, ...] = "linear"

    @property
    def folds(self) -> bool:
        return True

    @property
    def learns_bias(self) -> bool:
        return True

    def parts(self) -> tuple[AdapterConfig, ...]:
        return (self.model_copy(update={"norms": False}), Full(sites="norm")) if self.norms else (self,)

    def build(self, spec: SiteSpec) -> Adapter:
        if self.scale == "input":
            return InputScaling(spec, bias=True)
        return OutputScaling(spec, "inside", scaled=self.scale == "output")
