"""The bottleneck f(u) = s * up(act(down(dropout(norm(u))))) that series and parallel adapters share.

Houlsby et al. 2019 (arXiv 1902.00751); LLM-Adapters (arXiv 2304.01933) uses it without biases and norm. What `down` and `up` are is the
kind's choice: dense matrices here, Kronecker sums in Compacter, tensor trains in LoRETTA.

Legend: I input width, M bottleneck, O output width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from graft.adapters.base import Adapter, AdapterConfig, Shared
from graft.architectures.site import SiteLike, SiteSpec, SiteType
from graft.errors import GraftError, did_you_mean
from graft.routing.context import AdapterContext

Init = Literal["identity", "bert", "mam", "houlsby", "torch"]


class BottleneckConfig(AdapterConfig):
    """What all bottleneck adapters have in common."""

    takes: ClassVar[frozenset[SiteType]] = frozenset({"linear", "sublayer", "norm", "other"})

    bottleneck: int = Field(default=64, ge=1)
    """Width of the bottleneck."""
    activation: str = "relu"
    """Activation between down and up, by its transformers name."""
    scale: float | Literal["learned", "channel"] = 1.0
    """Factor of the adapter's output: a constant, "learned" (one number per site, from 1) or "channel" (one per output feature)."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the bottleneck's input."""
    norm: bool = False
    """A LayerNorm of its own on the bottleneck's input."""
    norm_after: bool = False
    """A LayerNorm of its own on the bottleneck's output."""
    train_bias: bool = False
    """Also learn a difference to the bias of an adapted linear layer."""

    def layers(self, spec: SiteSpec, width_in: int, width_out: int) -> tuple[nn.Module, nn.Module]:
        """The modules down [I] -> [M] and up [M] -> [O], which compute in their input's dtype."""
        raise NotImplementedError

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        if self.train_bias and not any(site.type == "linear" for site in sites):
            names = ", ".join(dict.fromkeys(site.name for site in sites))
            raise GraftError(
                f"train_bias: none of the adapter's sites ({names}) is a linear layer, so there is no bias to learn a difference to"
            )


class DenseBottleneckConfig(BottleneckConfig):
    """A bottleneck of two dense matrices."""

    biases: bool = True
    """Whether down and up have biases."""
    init: Init = "identity"
    """identity: down N(0, 0.02), up zero. mam: down kaiming-uniform, up zero. bert: both N(0, 0.02). houlsby: both truncated N(0, 0.001).
    torch: both as nn.Linear starts. The last three are not the identity."""

    @property
    def starts_as_identity(self) -> bool:
        return self.init in ("identity", "mam")

    def layers(self, spec: SiteSpec, width_in: int, width_out: int) -> tuple[nn.Module, nn.Module]:
        like = {"dtype": spec.dtype, "device": spec.device}
        down = Dense(width_in, self.bottleneck, bias=self.biases, **like)
        up = Dense(self.bottleneck, width_out, bias=self.biases, **like)
        if self.init != "torch":
            _initialise(down, up, self.init)
        return down, up


class Dense(nn.Linear):
    """A linear layer that computes in its input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), like(self.bias, input))


@torch.no_grad()
def _initialise(down: nn.Linear, up: nn.Linear, init: Init) -> None:
    for linear, starts_at_zero in ((down, False), (up, init in ("identity", "mam"))):
        if starts_at_zero:
            linear.weight.zero_()
        elif init == "mam":
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        elif init == "houlsby":
            nn.init.trunc_normal_(linear.weight, std=1e-3, a=-2e-3, b=2e-3)
        else:
            nn.init.normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            linear.bias.zero_()


class Bottleneck(nn.Module):
    """f: [..., I] -> [..., O], computed in the input's dtype from masters of their own."""

    def __init__(self, config: BottleneckConfig, spec: SiteSpec, width_in: int, width_out: int) -> None:
        super().__init__()
        place_like = {"dtype": spec.dtype, "device": spec.device}
        self.site_index, self.p = spec.index, config.dropout
        self.norm = nn.LayerNorm(width_in, **place_like) if config.norm else None
        self.down, self.up = config.layers(spec, width_in, width_out)
        self.act = _activation(config.activation)
        self.norm_after = nn.LayerNorm(width_out, **place_like) if config.norm_after else None
        if isinstance(config.scale, str):
            self.scale = nn.Parameter(torch.ones(width_out if config.scale == "channel" else 1, **place_like))
        else:
            self.scale = float(config.scale)

    def forward(self, u_I: Tensor, ctx: AdapterContext) -> Tensor:
        if self.training:
            u_I = ctx.dropout(u_I, self.p, self.site_index)
        out_O = self.up(self.act(self.down(_normed(self.norm, u_I))))
        out_O = out_O * (self.scale.to(out_O.dtype) if isinstance(self.scale, Tensor) else self.scale)
        return _normed(self.norm_after, out_O)


class BottleneckAdapter(Adapter):
    """A bottleneck at one site, with the optional difference to the layer's bias."""

    def __init__(self, config: BottleneckConfig, spec: SiteSpec, width_in: int, width_out: int) -> None:
        super().__init__(spec)
        self.f = Bottleneck(config, spec, width_in, width_out)
        wanted = config.train_bias and spec.type == "linear"
        self.bias = (
            nn.Parameter(torch.zeros(spec.out_features, dtype=spec.dtype, device=spec.device)) if wanted else None
        )

    def share(self, shared: Shared) -> None:
        super().share(shared)
        for layer in (self.f.down, self.f.up):
            layer.__dict__["_shared"] = (shared,)  # out of sight of the module's own parameters

    def with_bias(self, h: Tensor) -> Tensor:
        """The base's output with the learned difference to its bias."""
        return h if self.bias is None else h + self.bias.to(h.dtype)


def _normed(norm: nn.LayerNorm | None, u: Tensor) -> Tensor:
    return u if norm is None else F.layer_norm(u, norm.normalized_shape, like(norm.weight, u), like(norm.bias, u))


def like(parameter: Tensor | None, u: Tensor) -> Tensor | None:
    """A parameter in the dtype of what it meets."""
    return None if parameter is None else parameter.to(u.dtype)


def _activation(name: str) -> nn.Module:
    """An activation by its transformers name ("relu", "tanh", "gelu", "gelu_new", "silu", ...)."""
    from transformers.activations import ACT2FN

    try:
        return ACT2FN[name]
    except KeyError:
        allowed = sorted(ACT2FN)
        raise GraftError(
            f"unknown activation '{name}'.{did_you_mean(name, allowed)} Allowed: {', '.join(allowed)}"
        ) from None
