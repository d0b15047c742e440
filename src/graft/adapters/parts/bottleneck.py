"""The bottleneck f(u) = s * up(dropout(act(down(norm(dropout(u)))))) that series and parallel adapters share.

What `down` and `up` are is the choice of the kind: dense matrices here, sums of Kronecker products in Compacter, tensor trains in LoRETTA.

Houlsby et al. 2019 (arXiv 1902.00751); LLM-Adapters (arXiv 2304.01933) uses it without biases and norm.

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
    """The settings that all bottleneck adapters share."""

    takes: ClassVar[frozenset[SiteType]] = frozenset({"linear", "sublayer", "norm", "other"})
    down = ("f.norm.", "f.down.")

    bottleneck: int = Field(default=64, ge=1)
    """Width of the bottleneck."""
    activation: str = "relu"
    """Activation between down and up, by its transformers name."""
    scale: float | Literal["learned", "channel"] = 1.0
    """Factor of the adapter's output: a constant, "learned" (one number per site, starting at 1) or "channel" (one per output feature)."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the bottleneck's input."""
    hidden_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout after the activation, in the bottleneck (MEFT)."""
    norm: bool = False
    """Whether a LayerNorm of the adapter's own precedes the bottleneck."""
    norm_after: bool = False
    """Whether a LayerNorm of the adapter's own follows the bottleneck."""
    train_bias: bool = False
    """Also train the bias of an adapted linear layer, stored as a difference from the base's."""

    def layers(self, spec: SiteSpec, width_in: int, width_out: int) -> tuple[nn.Module, nn.Module]:
        """Make the modules down [I] -> [M] and up [M] -> [O]. They compute in the dtype of their input."""
        raise NotImplementedError

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        if self.train_bias and not any(site.type == "linear" for site in sites):
            names = ", ".join(dict.fromkeys(site.name for site in sites))
            raise GraftError(
                f"train_bias: none of the adapter's sites ({names}) is a linear layer, so there is no bias to train"
            )


class DenseBottleneckConfig(BottleneckConfig):
    """A bottleneck of two dense matrices."""

    biases: bool = True
    """Whether down and up have biases."""
    init: Init = "identity"
    """Initial weights. identity: down N(0, 0.02), up zero. mam: down kaiming-uniform, up zero. bert: both N(0, 0.02). houlsby: both
    truncated N(0, 0.001). torch: both as in nn.Linear. With bert, houlsby or torch a fresh adapter is not the identity."""

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
    """A linear layer that computes in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), cast_like(self.bias, input))


@torch.no_grad()
def _initialise(down: nn.Linear, up: nn.Linear, init: Init) -> None:
    """Set the weights by `init`, and the biases to zero."""
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
    """The bottleneck f: [..., I] -> [..., O]. It casts its masters to the dtype of its input."""

    def __init__(self, config: BottleneckConfig, spec: SiteSpec, width_in: int, width_out: int) -> None:
        super().__init__()
        like = {"dtype": spec.dtype, "device": spec.device}
        self.site_index, self.p, self.hidden_p = spec.index, config.dropout, config.hidden_dropout
        self.norm = nn.LayerNorm(width_in, **like) if config.norm else None
        self.down, self.up = config.layers(spec, width_in, width_out)
        self.act = activation_of(config.activation)
        self.norm_after = nn.LayerNorm(width_out, **like) if config.norm_after else None
        if isinstance(config.scale, str):
            self.scale = nn.Parameter(torch.ones(width_out if config.scale == "channel" else 1, **like))
        else:
            self.scale = float(config.scale)

    def forward(self, u_I: Tensor, ctx: AdapterContext) -> Tensor:
        if self.training:
            u_I = ctx.dropout(u_I, self.p, self.site_index)
        hidden_M = self.act(self.down(_normed(self.norm, u_I)))  # [..., I] -> [..., M]
        if self.training:
            hidden_M = ctx.dropout(hidden_M, self.hidden_p, ~self.site_index)  # ~: another mask than that of the input
        out_O = self.up(hidden_M)  # [..., M] -> [..., O]
        out_O = out_O * (self.scale.to(out_O.dtype) if isinstance(self.scale, Tensor) else self.scale)
        return _normed(self.norm_after, out_O)


class BottleneckAdapter(Adapter):
    """A bottleneck at one site, and the trained bias of the layer if there is one."""

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
            layer.__dict__["_shared"] = (shared,)  # in a tuple, so that it does not become a child module

    def with_bias(self, h: Tensor) -> Tensor:
        """Add the trained difference from the base's bias to the base's output."""
        return h if self.bias is None else h + self.bias.to(h.dtype)


def _normed(norm: nn.LayerNorm | None, u: Tensor) -> Tensor:
    if norm is None:
        return u
    return F.layer_norm(u, norm.normalized_shape, cast_like(norm.weight, u), cast_like(norm.bias, u))


def cast_like(parameter: Tensor | None, u: Tensor) -> Tensor | None:
    """Cast a parameter to the dtype of the tensor it is applied to."""
    return None if parameter is None else parameter.to(u.dtype)


def activation_of(name: str) -> nn.Module:
    """Return an activation by its transformers name ("relu", "tanh", "gelu", "gelu_new", "silu", ...)."""
    from transformers.activations import ACT2FN

    try:
        return ACT2FN[name]
    except KeyError:
        allowed = sorted(ACT2FN)
        raise GraftError(
            f"unknown activation '{name}'.{did_you_mean(name, allowed)} Allowed: {', '.join(allowed)}"
        ) from None
