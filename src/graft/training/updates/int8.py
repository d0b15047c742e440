"""Weights, momenta and gradients in 8 bits (QFT, Li et al. 2023, arXiv 2310.07147).

    gradient, momentum    code * scale                 symmetric, one scale per row, rounded to the nearest
    weight                code * scale + zero          one scale and zero per row, but for the largest values, which stay in float32

A weight is rounded stochastically: floor(u + U[0, 1)) is u on average, so an update of a twentieth of a step is taken one time in
twenty, where rounding to the nearest would lose it each time.

Legend: R rows, C columns, K outliers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

HIGHEST = 127
HEADROOM = 4
"""Codes that a fresh grid leaves free on either side, so that weights that grow seldom need another grid."""

Rounding = Literal["stochastic", "nearest"]


def to_int8(values_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Round to the nearest of a symmetric grid per row: codes [R, C] and scales [R, 1]."""
    scale_R1 = values_RC.abs().amax(1, keepdim=True).float() / HIGHEST
    codes = (values_RC / scale_R1.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    return codes.to(torch.int8), scale_R1


def from_int8(codes_RC: Tensor, scale_R1: Tensor) -> Tensor:
    """The values of codes, in float32."""
    return codes_RC.float().mul_(scale_R1)


class Int8Weight:
    """A matrix in 8 bits with its outliers. `dequantised` gives the matrix; `store` takes another one."""

    def __init__(self, weight_RC: Tensor, outliers: float, rounding: Rounding) -> None:
        self.shape, self.dtype, self.rounding = weight_RC.shape, weight_RC.dtype, rounding
        count = round(outliers * weight_RC.numel())
        device, (rows, _) = weight_RC.device, weight_RC.shape
        self.codes = torch.zeros(self.shape, dtype=torch.int8, device=device)
        self.scale, self.zero = torch.ones(rows, 1, device=device), torch.zeros(rows, 1, device=device)
        self.index = torch.zeros(count, dtype=torch.int32 if weight_RC.numel() < 2**31 else torch.int64, device=device)
        """Where the outliers lie, counted row by row, in ascending order, [K]."""
        self.outliers = torch.zeros(count, device=device)
        self.uses = 0
        """How many modules share it."""
        self.refresh(weight_RC.detach().float(), None)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that hold it, by name."""
        return {name: getattr(self, name) for name in ("codes", "scale", "zero", "index", "outliers")}

    @torch.no_grad()
    def dequantised(self) -> Tensor:
        """The matrix in float32, [R, C]."""
        values = self.codes.float().mul_(self.scale).add_(self.zero)
        values.view(-1)[self.index] = self.outliers
        return values

    @torch.no_grad()
    def rows(self, ids_T: Tensor) -> Tensor:
        """Some rows of the matrix in float32, [T, C]."""
        columns = self.shape[1]
        values = self.codes[ids_T].float().mul_(self.scale[ids_T]).add_(self.zero[ids_T])
        starts = torch.searchsorted(self.index, torch.arange(self.shape[0] + 1, device=ids_T.device) * columns)
        first, counts = starts[ids_T], starts[ids_T + 1] - starts[ids_T]
        row = torch.repeat_interleave(torch.arange(len(ids_T), device=ids_T.device), counts)
        within = torch.arange(len(row), device=ids_T.device) - (counts.cumsum(0) - counts)[row]
        place = first[row] + within
        values[row, self.index[place].long() % columns] = self.outliers[place]
        return values

    @torch.no_grad()
    def refresh(self, values_RC: Tensor, random: torch.Generator | None) -> None:
        """Choose the outliers anew: the largest values of the matrix. All rows get a fresh grid."""
        if len(self.index):
            chosen = values_RC.abs().view(-1).topk(len(self.index)).indices.sort().values
            self.index.copy_(chosen)
        self._regrid(values_RC, torch.ones(len(values_RC), dtype=torch.bool, device=values_RC.device))
        # The first grid is put on weights that no update has moved, so they go to the nearest code.
        self.store(values_RC, random)

    @torch.no_grad()
    def store(self, values_RC: Tensor, random: torch.Generator | None) -> None:
        """Take new values. Rows that outgrow their grid get another. random: of stochastic rounding; None rounds to the nearest."""
        self.outliers.copy_(values_RC.view(-1)[self.index])
        steps = (values_RC - self.zero).div_(self.scale)
        steps.view(-1)[self.index] = 0.0
        outgrown_R = steps.abs().amax(1) > HIGHEST
        if bool(outgrown_R.any()):
            self._regrid(values_RC, outgrown_R)
            steps = (values_RC - self.zero).div_(self.scale)
            steps.view(-1)[self.index] = 0.0
        if random is None or self.rounding == "nearest":
            steps.round_()
        else:
            steps.add_(torch.rand(self.shape, generator=random, device=steps.device)).floor_()
        self.codes.copy_(steps.clamp_(-HIGHEST, HIGHEST))

    def _regrid(self, values_RC: Tensor, rows_R: Tensor) -> None:
        """Put the grids of some rows around their values other than outliers."""
        low, high = values_RC.clone(), values_RC.clone()
        low.view(-1)[self.index], high.view(-1)[self.index] = torch.inf, -torch.inf
        low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
        empty = low > high  # a row of outliers alone
        zero, reach = torch.where(empty, 0.0, (low + high) / 2), torch.where(empty, 0.0, (high - low) / 2)
        scale = (reach / (HIGHEST - HEADROOM)).clamp_min(torch.finfo(torch.float32).tiny)
        self.zero[rows_R], self.scale[rows_R] = zero[rows_R], scale[rows_R]
