"""The bottleneck f(u) = s * up(act(down(dropout(norm(u))))) that series and parallel adapters share.

Houlsby et al. 2019 (arXiv 1902.00751); LLM-Adapters (arXiv 2304.01933) uses it without biases and norm.

Legend: I input width, M bottleneck, O output width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from graft.adapters.base import Adapter, AdapterConfig, Place, SiteLike, SiteType, activation
from graft.errors import GraftError
from graft.passes import Context


class BottleneckConfig(AdapterConfig):
    """What series and parallel adapters have in common."""

    takes = frozenset[SiteType]({"linear", "sublayer", "other"})

    bottleneck: int = Field(default=64, ge=1)
    """Width of the bottleneck."""
    activation: str = "relu"
    """Activation between down and up, by its transformers name."""
    scale: float | Literal["learned"] = 1.0
    """Factor of the adapter's output: a constant, or "learned" (one number per site that starts at 1)."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the bottleneck's input."""
    biases: bool = True
    """Whether down and up have biases."""
    norm: bool = False
    """A LayerNorm of its own on the bottleneck's input."""
    init: Literal["identity", "bert", "mam"] = "identity"
    """identity: down N(0, 0.02), up zero. mam: down kaiming-uniform, up zero. bert: both N(0, 0.02), which is not the identity."""
    train_bias: bool = False
    """Also learn a difference to the bias of an adapted linear layer."""

    @property
    def starts_as_identity(self) -> bool:
        return self.init != "bert"

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        if self.train_bias and not any(site.type == "linear" for site in sites):
            names = ", ".join(dict.fromkeys(site.name for site in sites))
            raise GraftError(
                f"train_bias: none of the adapter's sites ({names}) is a linear layer, so there is no bias to learn a difference to"
            )


class Bottleneck(nn.Module):
    """f: [..., I] -> [..., O], computed in the input's dtype from masters of their own."""

    def __init__(self, config: BottleneckConfig, place: Place, width_in: int, width_out: int) -> None:
        super().__init__()
        like = {"dtype": place.dtype, "device": place.device}
        self.site, self.p = place.index, config.dropout
        self.norm = nn.LayerNorm(width_in, **like) if config.norm else None
        self.down = nn.Linear(width_in, config.bottleneck, bias=config.biases, **like)
        self.act = activation(config.activation)
        self.up = nn.Linear(config.bottleneck, width_out, bias=config.biases, **like)
        self.scale = nn.Parameter(torch.ones(1, **like)) if config.scale == "learned" else float(config.scale)
        with torch.no_grad():
            if config.init == "mam":
                nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            else:
                nn.init.normal_(self.down.weight, std=0.02)
            if config.init == "bert":
                nn.init.normal_(self.up.weight, std=0.02)
            else:
                self.up.weight.zero_()
            for linear in (self.down, self.up):
                if linear.bias is not None:
                    linear.bias.zero_()

    def forward(self, u_I: Tensor, ctx: Context) -> Tensor:
        if self.training:
            u_I = ctx.dropout(u_I, self.p, self.site)
        if self.norm is not None:
            u_I = F.layer_norm(
                u_I, self.norm.normalized_shape, _like(self.norm.weight, u_I), _like(self.norm.bias, u_I)
            )
        low_M = self.act(_linear(self.down, u_I))
        out_O = _linear(self.up, low_M)
        return out_O * (self.scale.to(out_O.dtype) if isinstance(self.scale, Tensor) else self.scale)


class BottleneckAdapter(Adapter):
    """A bottleneck at one site, with the optional difference to the layer's bias."""

    def __init__(self, config: BottleneckConfig, place: Place, width_in: int, width_out: int) -> None:
        super().__init__(place)
        self.f = Bottleneck(config, place, width_in, width_out)
        wanted = config.train_bias and place.type == "linear"
        self.bias = (
            nn.Parameter(torch.zeros(place.out_features, dtype=place.dtype, device=place.device)) if wanted else None
        )

    def with_bias(self, h: Tensor) -> Tensor:
        """The base's output with the learned difference to its bias."""
        return h if self.bias is None else h + self.bias.to(h.dtype)


def _like(parameter: Tensor | None, u: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(u.dtype)


def _linear(linear: nn.Linear, u: Tensor) -> Tensor:
    return F.linear(u, linear.weight.to(u.dtype), _like(linear.bias, u))
