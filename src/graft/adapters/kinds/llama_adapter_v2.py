"""LLaMA-Adapter V2 without its prompts: a bias and factors on every linear layer, and all norms.

    factors on the output (the paper):  h' = s (.) (W x + b)        on the input (its released chat models):  h' = W (s (.) x) + b

Its prompts are the kind `llama-adapter`, which can join this one in a stack. Gao et al. 2023, "LLaMA-Adapter V2" (arXiv 2304.15010).
"""

from __future__ import annotations

from typing import Literal

from graft.adapters.base import Adapter, AdapterConfig
from graft.adapters.kinds.full import Full
from graft.adapters.parts.scaling import InputScaling, OutputScaling
from graft.architectures.site import SiteSpec


class LLaMAAdapterV2(AdapterConfig):
    """A bias and factors on every linear layer, trained with all norms."""

    source = "arXiv 2304.15010"
    suits = "0.04 % of the parameters of LLaMA-7B. A learned bias cannot be merged into a layer that has none."

    kind: Literal["llama-adapter-v2"] = "llama-adapter-v2"
    scale: Literal["output", "input", "none"] = "output"
    """Where the factors act. output: as in the paper. input: as in the released chat models. none: only biases are trained."""
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
