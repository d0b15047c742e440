"""The low-rank terms of several adapters at one module as grouped products: one kernel for all of them, not one for each.

With the rows of J terms end to end, S_j = x_j (s_j A_j)^T and U_j = G_j B_j for the gradient G of the output, each line is one product:

    h_j' = h_j + S_j B_j^T      dA_j = s_j U_j^T x_j      dB_j = G_j^T S_j      dx_j = U_j (s_j A_j)

These are the equations of `fused.py` with s moved to A, where it costs one operation on factors instead of one on tokens. The factors are
stacked and cast in the forward pass and again in the backward pass: kept, the stacks of all modules would be a copy of all adapters.
A grouped product writes a tensor of its own, so the sum is rounded once more than in the loop, and a tensor of the output's size lives
for a moment. Ye et al. 2023, "mLoRA" (arXiv 2312.02515).

torch's operator is one kernel for bfloat16 on NVIDIA GPUs of compute capability 9 and 10. Elsewhere it is a loop of its own, which on a GPU
waits for the row counts besides; there the loop of `fused.py` serves. The kernel computes tiles of 64 by 128 numbers, so ranks up to 64
take as long as 64, and all of them are filled up with zeros to the largest one; greater ranks stand together by powers of two, so
that filling up doubles no work.

Legend: I input features, O output features, J terms, R the rank that theirs are filled up to, M tokens of all their rows.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.ops.low_rank_update import LowRankUpdate, flat

TILE = 64
"""Ranks up to here cost the same."""
MULTIPLE = 8
"""Rows of every matrix start at addresses that 16 bytes divide: so many numbers of two bytes."""
MOST = 1023
"""Groups of one product."""
_mul, _add_, _copy_ = torch._foreach_mul, torch._foreach_add_, torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]


def has_kernel(x: Tensor) -> bool:
    """Whether a grouped product of such tensors is one kernel."""
    if x.dtype != torch.bfloat16 or not x.is_cuda or torch.version.hip or sys.platform == "win32":
        return False
    return hasattr(F, "grouped_mm") and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def together(updates: Sequence[LowRankUpdate], x: Tensor, num_out: int) -> list[list[int]]:
    """The numbers of the terms by product: several that are one grouped product, or one by itself."""
    aligned = x.shape[-1] % MULTIPLE == 0 and num_out % MULTIPLE == 0
    if len(updates) == 1 or not aligned or not has_kernel(x):
        return [[number] for number in range(len(updates))]
    alike: dict[object, list[int]] = {}
    for number, update in enumerate(updates):
        size = (max(update.A.shape[0], TILE) - 1).bit_length()
        alike.setdefault((size, update.A.dtype, update.B.dtype), []).append(number)
    return [each[start : start + MOST] for each in alike.values() for start in range(0, len(each), MOST)]


def add_grouped_(out: Tensor, x: Tensor, updates: Sequence[LowRankUpdate]) -> list[Tensor]:
    """Add each term to its rows of a contiguous tensor [..., O]; the S [N, R] of each."""
    group = _Group(updates, x)
    A_JRI, B_JOR = stacks([update.A for update in updates], [update.B for update in updates], updates, x.dtype)
    low_MR = _product(group.dropped(x, [update.kept(x) for update in updates]), A_JRI.mT, group.ends)
    group.put(out, _product(low_MR, B_JOR.mT, group.ends))
    return list(low_MR.split(group.counts))


def grouped_gradients(
    updates: Sequence[LowRankUpdate], grad: Tensor, x: Tensor, lows: Sequence[Tensor], factors: Sequence[Tensor],
    needs: Sequence[bool], grad_x: Tensor | None, fresh: bool,
) -> list[Tensor | None]:  # fmt: skip
    """dA and dB of each term; dx goes to its rows of grad_x: in place of what is there if `fresh`, else added.

    grad [..., O]; lows: what the forward pass returned; factors: A and B of each term; needs: whether each factor wants its gradient.
    """
    group, As, Bs = _Group(updates, x), factors[::2], factors[1::2]
    A_JRI, B_JOR = stacks(As, Bs, updates, x.dtype)
    keeps, grad_MO = [update.kept(x) for update in updates], group.rows(grad)
    low_grad_MR = _product(grad_MO, B_JOR, group.ends)
    made: list[Tensor | None] = [None] * len(factors)
    if any(needs[::2]):
        dA_JRI = _product(low_grad_MR.t(), group.dropped(x, keeps), group.ends).to(As[0].dtype)
        own = [dA_RI[: len(A)] for dA_RI, A in zip(dA_JRI, As, strict=True)]
        made[::2] = _mul(own, [update.scale for update in updates])
    if any(needs[1::2]):
        dB_JOR = _product(grad_MO.t(), torch.cat(list(lows)), group.ends).to(Bs[0].dtype)
        made[1::2] = [dB_OR[:, : B.shape[1]] for dB_OR, B in zip(dB_JOR, Bs, strict=True)]
    if grad_x is not None:
        dx_MI = _product(low_grad_MR, A_JRI, group.ends)
        for part_NI, keep in zip(dx_MI.split(group.counts), keeps, strict=True):
            if keep is not None:
                part_NI.mul_(flat(keep))
        group.put(grad_x, dx_MI, fresh)
    return [gradient if need else None for gradient, need in zip(made, needs, strict=True)]


def _product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Each group of a's rows times its matrix of b; of two jagged matrices, a matrix for each group."""
    return F.grouped_mm(a, b, offs=ends)


def stacks(
    As: Sequence[Tensor], Bs: Sequence[Tensor], updates: Sequence[LowRankUpdate], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """s A [J, R, I] and B [J, O, R], ranks filled up with zeros, by one concatenation each."""
    rank = -(-max(map(len, As)) // MULTIPLE) * MULTIPLE
    scaled = _mul(list(As), [update.scale for update in updates])
    A_JRI = torch.cat(list(_filled(scaled, rank, 0))).to(dtype).view(len(As), rank, -1)
    B_OJR = torch.cat(list(_filled(Bs, rank, 1)), 1).to(dtype).view(-1, len(Bs), rank)
    return A_JRI, B_OJR.transpose(0, 1)


def _filled(parts: Sequence[Tensor], size: int, dim: int) -> Iterator[Tensor]:
    """Matrices, with zeros behind those that are smaller than a size."""
    zeros = parts[0].new_zeros((size, parts[0].shape[1]) if dim == 0 else (parts[0].shape[0], size))
    for part in parts:
        yield part
        if part.shape[dim] < size:
            yield zeros.narrow(dim, 0, size - part.shape[dim])


class _Group:
    """Where the rows of terms lie."""

    def __init__(self, updates: Sequence[LowRankUpdate], x: Tensor) -> None:
        self.updates = updates
        self.counts = tuple(update.of(x).numel() // x.shape[-1] for update in updates)
        """Tokens of each."""
        self.ends = _ends(self.counts, x.device)
        rows = [update.rows for update in updates if update.rows is not None]
        gaps = len(rows) < len(updates) or any(one.stop != other.start for one, other in itertools.pairwise(rows))
        self.run = None if gaps else slice(rows[0].start, rows[-1].stop)
        """All of them, where they follow one another without a gap."""

    def rows(self, tensor: Tensor) -> Tensor:
        """Theirs [M, D], laid out as the kernel wants them: a view where they follow one another, else a copy."""
        if self.run is None:
            return torch.cat([flat(update.of(tensor)) for update in self.updates])
        rows = flat(self._narrow(tensor, self.run))
        across, along = rows.stride()
        laid = along == 1 and across >= rows.shape[1] and across % MULTIPLE == 0 and rows.data_ptr() % 16 == 0
        return rows if laid else rows.clone(memory_format=torch.contiguous_format)

    def dropped(self, x: Tensor, keeps: Sequence[Tensor | None]) -> Tensor:
        """Theirs of x [M, I], behind dropout."""
        if all(keep is None for keep in keeps):
            return self.rows(x)
        pairs = [(update.of(x), keep) for update, keep in zip(self.updates, keeps, strict=True)]
        return torch.cat([flat(own if keep is None else own * keep) for own, keep in pairs])

    def put(self, out: Tensor, new_MD: Tensor, fresh: bool = False) -> None:
        """Write rows [M, D] to theirs of a contiguous tensor if `fresh`, else add them."""
        if self.run is None:
            places, new = [update.of(out) for update in self.updates], list(new_MD.split(self.counts))
        else:
            places, new = [self._narrow(out, self.run)], [new_MD]
        rows = [place.view(-1, out.shape[-1]) for place in places]
        _copy_(rows, new) if fresh else _add_(rows, new)

    def _narrow(self, tensor: Tensor, rows: slice) -> Tensor:
        return tensor.narrow(self.updates[0].dim, rows.start, rows.stop - rows.start)


@functools.lru_cache(maxsize=64)
def _ends(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each group ends. The same at every module of a pass, so that a GPU is waited for once."""
    with torch.inference_mode(False):
        return torch.tensor(counts).cumsum(0).to(device, torch.int32)
