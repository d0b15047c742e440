"""Compacter: a series adapter with matrices that are sums of Kronecker products (PHM layers).

    y = x H + b,    H = A_1 (x) B_1 + ... + A_n (x) B_n,    A_i [n, n],    B_i = S_i T_i of rank k

The A_i are the rule, which all sites share by default. Compacter has adapters at attn and mlp, Compacter++ only at mlp.

Example: n = 4, a width of 768 and a bottleneck of 24. The B_i of `down` are [192, 6]. H [768, 24] has 18,432 entries; at k = 1 the four S_i
and T_i have 4 (192 + 6) = 792 parameters, and the rule has 64.

Karimi Mahabadi et al. 2021, "Compacter" (arXiv 2106.04647); PHM layers: Zhang et al. 2021 (arXiv 2102.08597).

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
from graft.adapters.parts.bottleneck import cast_like
from graft.architectures.site import SiteSpec
from graft.errors import GraftError


class Compacter(SeriesConfig):
    """Series adapter of Kronecker products with a rule that all sites share."""

    source = "arXiv 2106.04647"
    suits = "A series adapter with about a tenth of the parameters: 161,728 instead of 1,855,104 on T5-base, norms included."

    kind: Literal["compacter"] = "compacter"
    bottleneck: int = Field(default=24, ge=1)
    """Width of the bottleneck, a multiple of `products`."""
    activation: str = "gelu_new"
    """Activation between down and up, by its transformers name."""
    products: int = Field(default=4, ge=1)
    """Number n of Kronecker products in each sum. It must divide every width."""
    rank: int | None = Field(default=1, ge=1)
    """Rank k of the second factor of each product. None: a whole matrix."""
    share_rule: bool = True
    """Whether all sites share one rule. Otherwise each down and up has its own."""
    rule_rank: int | None = Field(default=None, ge=1)
    """Rank of the rule's matrices. None: whole matrices."""
    rule_std: float = Field(default=1e-4, gt=0.0)
    """Standard deviation of the initial rule. Small values start close to the identity, but not at it."""
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
    """The n matrices A_i: whole, or as products of left [n, n, r] and right [n, r, n]."""

    def __init__(self, config: Compacter, spec: SiteSpec) -> None:
        super().__init__()
        n, rank = config.products, config.rule_rank
        like = {"dtype": spec.dtype, "device": spec.device}
        shapes = {"rule": (n, n, n)} if rank is None else {"left": (n, n, rank), "right": (n, rank, n)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **like).normal_(std=config.rule_std)))

    def matrices(self) -> Tensor:
        """Return the A_i [n, n, n]."""
        return self.rule if "rule" in self._parameters else torch.bmm(self.left, self.right)  # pyright: ignore


class PHMLinear(nn.Module):
    """Compute x H + b in the input's dtype, without writing H out. x: [..., I] -> [..., O]."""

    def __init__(self, config: Compacter, spec: SiteSpec, width_in: int, width_out: int) -> None:
        super().__init__()
        n, rank = config.products, config.rank
        if width_in % n or width_out % n:
            raise GraftError(
                f"compacter: {n} products must divide both widths of a layer; at '{spec.module}' these are {width_in} and {width_out}"
            )
        like = {"dtype": spec.dtype, "device": spec.device}
        self.rule = None if config.share_rule else Rule(config, spec)
        into, out = width_in // n, width_out // n
        shapes = {"B": (n, into, out)} if rank is None else {"S": (n, into, rank), "T": (n, rank, out)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(_glorot(torch.empty(shape, **like))))
        self.bias = nn.Parameter(torch.zeros(width_out, **like)) if config.biases else None

    def forward(self, x: Tensor) -> Tensor:
        n = self._parameters["S" if "S" in self._parameters else "B"].shape[0]  # pyright: ignore
        rule = self.__dict__["_shared"][0] if self.rule is None else self.rule
        A = rule.matrices().to(x.dtype)  # [n, n, n]: product i, input piece p, output piece q
        # Cut x into n pieces. In x (A_i (x) B_i), B_i maps every piece, and A_i mixes the mapped pieces.
        x_nI = x.unflatten(-1, (n, -1))  # [..., n, I / n]
        if "S" in self._parameters:
            low = torch.einsum("...pi,nik->...npk", x_nI, self.S.to(x.dtype))  # [..., n, n, k]  # pyright: ignore
            mixed = torch.einsum("...npk,npq->...nqk", low, A)  # [..., n, n, k]
            y = torch.einsum("...nqk,nko->...qo", mixed, self.T.to(x.dtype))  # [..., n, O / n]  # pyright: ignore
        else:
            mapped = torch.einsum("...pi,nio->...npo", x_nI, self.B.to(x.dtype))  # [..., n, n, O / n]  # pyright: ignore
            y = torch.einsum("...npo,npq->...qo", mapped, A)  # [..., n, O / n]
        y = y.flatten(-2)
        return y if self.bias is None else y + cast_like(self.bias, y)  # pyright: ignore[reportOperatorIssue]


def _glorot(x: Tensor) -> Tensor:
    """Fill each matrix of x [n, ...] Glorot-uniform with a gain of sqrt 2."""
    for matrix in x:
        nn.init.xavier_uniform_(matrix, gain=2**0.5)
    return x
