"""Compacter: a series adapter whose matrices are sums of Kronecker products (PHM), with one rule for all sites.

H = sum over i of A_i (x) B_i, y = x H + b; A_i [n, n] is the rule, B_i = S_i T_i of rank k.

Karimi Mahabadi et al. 2021, "Compacter" (arXiv 2106.04647), on PHM layers (Zhang et al. 2021, arXiv 2102.08597). It has
adapters at attn and mlp, Compacter++ at mlp alone.

Legend: n products, I input width, O output width, k rank of the B_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from graft.adapters.base import Shared
from graft.adapters.kinds.series import SeriesConfig
from graft.adapters.parts.bottleneck import like
from graft.architectures.site import SiteSpec
from graft.errors import GraftError


class Compacter(SeriesConfig):
    """A series adapter of Kronecker products with a rule that all sites share."""

    source = "arXiv 2106.04647"
    suits = (
        "A series adapter in about a tenth of the parameters: 161,728 instead of 1,855,104 on T5-base, norms included."
    )

    kind: Literal["compacter"] = "compacter"
    bottleneck: int = Field(default=24, ge=1)
    """Width of the bottleneck; a multiple of `products`."""
    activation: str = "gelu_new"
    """Activation between down and up, by its transformers name."""
    products: int = Field(default=4, ge=1)
    """Kronecker products in each sum (n); divides every width."""
    rank: int | None = Field(default=1, ge=1)
    """Rank of each product's second factor (k); None keeps it whole."""
    share_rule: bool = True
    """One rule for all sites; else each of down and up has its own."""
    rule_rank: int | None = Field(default=None, ge=1)
    """Rank of the rule's matrices; None keeps them whole."""
    rule_std: float = Field(default=1e-4, gt=0.0)
    """Standard deviation of the rule's start. So small a start is close to the identity, not equal to it."""
    biases: bool = True
    """Whether down and up have biases."""
    sites: str | tuple[str, ...] = "attn mlp"

    @property
    def starts_as_identity(self) -> bool:
        return False

    def layers(self, spec: SiteSpec, width_in: int, width_out: int) -> tuple[nn.Module, nn.Module]:
        return PHMLinear(self, spec, width_in, self.bottleneck), PHMLinear(self, spec, self.bottleneck, width_out)

    def build_shared(self, specs: Sequence[SiteSpec]) -> Shared | None:
        return Rule(self, specs[0]) if self.share_rule else None


class Rule(Shared):
    """The n matrices A_i, whole or as products left [n, n, r] right [n, r, n]."""

    def __init__(self, config: Compacter, spec: SiteSpec) -> None:
        super().__init__()
        n, rank = config.products, config.rule_rank
        place_like = {"dtype": spec.dtype, "device": spec.device}
        shapes = {"rule": (n, n, n)} if rank is None else {"left": (n, n, rank), "right": (n, rank, n)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **place_like).normal_(std=config.rule_std)))

    def matrices(self) -> Tensor:
        """[n, n, n]."""
        return self.rule if "rule" in self._parameters else torch.bmm(self.left, self.right)  # pyright: ignore


class PHMLinear(nn.Module):
    """x [..., I] -> x H + b [..., O], computed in the input's dtype."""

    def __init__(self, config: Compacter, spec: SiteSpec, width_in: int, width_out: int) -> None:
        super().__init__()
        n, rank = config.products, config.rank
        if width_in % n or width_out % n:
            raise GraftError(
                f"compacter: {n} products must divide both widths of a layer; at '{spec.module}' they are {width_in} and {width_out}"
            )
        place_like = {"dtype": spec.dtype, "device": spec.device}
        self.rule = None if config.share_rule else Rule(config, spec)
        into, out = width_in // n, width_out // n
        shapes = {"B": (n, into, out)} if rank is None else {"S": (n, into, rank), "T": (n, rank, out)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(_glorot(torch.empty(shape, **place_like))))
        self.bias = nn.Parameter(torch.zeros(width_out, **place_like)) if config.biases else None

    def forward(self, x: Tensor) -> Tensor:
        n = self._parameters["S" if "S" in self._parameters else "B"].shape[0]  # pyright: ignore
        rule = self.__dict__["_shared"][0] if self.rule is None else self.rule
        A = rule.matrices().to(x.dtype)
        x_nI = x.unflatten(-1, (n, -1))  # x (A (x) B) = the rows of A mix the n pieces of x, B maps each piece
        if "S" in self._parameters:
            low = torch.einsum("...pi,nik->...npk", x_nI, self.S.to(x.dtype))  # pyright: ignore
            mixed = torch.einsum("...npk,npq->...nqk", low, A)
            y = torch.einsum("...nqk,nko->...qo", mixed, self.T.to(x.dtype))  # pyright: ignore
        else:
            mapped = torch.einsum("...pi,nio->...npo", x_nI, self.B.to(x.dtype))  # pyright: ignore
            y = torch.einsum("...npo,npq->...qo", mapped, A)
        y = y.flatten(-2)
        return y if self.bias is None else y + like(self.bias, y)  # pyright: ignore[reportOperatorIssue]


def _glorot(x: Tensor) -> Tensor:
    """Each slice Glorot-uniform with gain sqrt 2."""
    for piece in x:
        nn.init.xavier_uniform_(piece, gain=2**0.5)
    return x
