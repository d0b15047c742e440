"""The low-rank updates of several adapters at one module as grouped products: one kernel for all adapters in place of one for each.

Lay the rows of J updates end to end, and let S_j = x_j (s_j A_j)^T and U_j = G_j B_j for the gradient G of the output. Then each of these
lines is one product for all j:

    h_j' = h_j + S_j B_j^T      dA_j = s_j U_j^T x_j      dB_j = G_j^T S_j      dx_j = U_j (s_j A_j)

These are the equations of `low_rank.py` with s moved into A, where scaling costs one operation on the factors and none on the tokens.

Example: J = 3 updates of rank 4, 8 and 16 on 5, 3 and 2 tokens, so that M = 10 tokens and R = 16.

    x_MI   [10, I]      tokens 0-4 belong to update 0, 5-7 to update 1, 8-9 to update 2; their ends are [5, 8, 10]
    A_JRI  [3, 16, I]   s_0 A_0 fills 4 of the 16 rows of its matrix, s_1 A_1 fills 8 of its own; the rest is zeros
    low_MR [10, 16]     one product: tokens 0-4 by (s_0 A_0)^T, tokens 5-7 by (s_1 A_1)^T, tokens 8-9 by (s_2 A_2)^T
    dB_JOR [3, O, 16]   one product of G^T [O, 10] and low_MR: dB_0 sums over tokens 0-4 only; its columns 4 to 15 are cut off

The factors are stacked and cast in forward and again in backward. Kept in between, the stacks of all modules would amount to a copy of
every adapter. A grouped product writes its result to a new tensor, so the sum is rounded once more than in the loop of `low_rank.py`, and
a tensor of the output's size exists for a moment. Ye et al. 2023, "mLoRA" (arXiv 2312.02515).

torch's operator is a single kernel for bfloat16 on NVIDIA GPUs of compute capability 9 and 10. Anywhere else it is itself a loop, which on
a GPU also waits for the row counts, so `low_rank.py` runs its own loop there. The kernel computes tiles of 64 by 128 numbers: every rank up
to 64 takes as long as 64, so all of them share a product and are padded to the largest. Greater ranks share one by powers of two
(65 to 128, 129 to 256, ...), so that padding less than doubles the work.

Legend: I input features, O output features, J updates, R rank that all updates are padded to, M tokens of all their rows.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.ops.low_rank_update import LowRankUpdate, as_matrix

TILE = 64
"""All ranks up to this one take the kernel equally long."""
ALIGNMENT = 8
"""The kernel wants every matrix row to start at a multiple of 16 bytes, which is 8 numbers of bfloat16."""
MAX_UPDATES = 1023
"""Most updates that one product takes."""
_mul, _add_, _copy_ = torch._foreach_mul, torch._foreach_add_, torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]


def has_kernel(x: Tensor) -> bool:
    """Whether a grouped product of tensors like x is one kernel."""
    if x.dtype != torch.bfloat16 or not x.is_cuda or torch.version.hip or sys.platform == "win32":
        return False
    return hasattr(F, "grouped_mm") and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def product_groups(updates: Sequence[Any], x: Tensor, num_out: int) -> list[list[int]]:
    """Split the updates, by number, into those that share a grouped product. A list of one number is computed by itself, and so is a stack.

    Ranks 4, 64, 100 and 128 of one dtype, on a device with the kernel, give [[0, 1], [2, 3]].
    """
    if len(updates) == 1:
        return [[0]]
    aligned = x.shape[-1] % ALIGNMENT == 0 and num_out % ALIGNMENT == 0
    if not aligned or not has_kernel(x):
        return [[number] for number in range(len(updates))]
    alike: dict[object, list[int]] = {}
    for number, update in enumerate(updates):
        if update.stacked:
            alike[number] = [number]
            continue
        power = (max(update.A.shape[0], TILE) - 1).bit_length()  # 6 up to rank 64, 7 from 65 to 128, 8 from 129 to 256
        alike.setdefault((power, update.A.dtype, update.B.dtype), []).append(number)
    return [each[start : start + MAX_UPDATES] for each in alike.values() for start in range(0, len(each), MAX_UPDATES)]


def add_grouped_(out: Tensor, x: Tensor, updates: Sequence[LowRankUpdate]) -> list[Tensor]:
    """Add each update to its rows of a contiguous tensor [..., O], and return the S [N, R] of each, N its own tokens."""
    rows = _UpdateRows(updates, x)
    A_JRI, B_JOR = stack_factors([update.A for update in updates], [update.B for update in updates], updates, x.dtype)
    x_MI = rows.gather_dropped(x, [update.dropout_mask(x) for update in updates])
    low_MR = grouped_product(x_MI, A_JRI.mT, rows.ends)
    rows.scatter(out, grouped_product(low_MR, B_JOR.mT, rows.ends))  # [M, O]
    return list(low_MR.split(rows.counts))


def grouped_gradients(
    updates: Sequence[LowRankUpdate], grad: Tensor, x: Tensor, lows: Sequence[Tensor], factors: Sequence[Tensor],
    needs: Sequence[bool], grad_x: Tensor | None, overwrite: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Return dA and dB of each update, and put dx into its rows of `grad_x`.

    Args:
        grad: Gradient of the output [..., O].
        lows: What `add_grouped_` returned.
        factors: [A_0, B_0, A_1, B_1, ...].
        needs: Whether each factor needs its gradient.
        grad_x: Gradient of the input [..., I], or None if the input needs none.
        overwrite: Whether dx replaces what `grad_x` holds in these rows; otherwise it is added.
    """
    rows, As, Bs = _UpdateRows(updates, x), factors[::2], factors[1::2]
    A_JRI, B_JOR = stack_factors(As, Bs, updates, x.dtype)
    masks, grad_MO = [update.dropout_mask(x) for update in updates], rows.gather(grad)
    low_grad_MR = grouped_product(grad_MO, B_JOR, rows.ends)  # U
    factor_grads: list[Tensor | None] = [None] * len(factors)
    if any(needs[::2]):
        # Both factors of this product are jagged along M, so each group sums over its own tokens: [R, M] by [M, I] gives [J, R, I].
        dA_JRI = grouped_product(low_grad_MR.t(), rows.gather_dropped(x, masks), rows.ends).to(As[0].dtype)
        unpadded = [dA_RI[: len(A)] for dA_RI, A in zip(dA_JRI, As, strict=True)]
        factor_grads[::2] = _mul(unpadded, [update.scale for update in updates])
    if any(needs[1::2]):
        dB_JOR = grouped_product(grad_MO.t(), torch.cat(list(lows)), rows.ends).to(Bs[0].dtype)
        factor_grads[1::2] = [dB_OR[:, : B.shape[1]] for dB_OR, B in zip(dB_JOR, Bs, strict=True)]
    if grad_x is not None:
        dx_MI = grouped_product(low_grad_MR, A_JRI, rows.ends)  # A_JRI holds the scale already
        for own_NI, mask in zip(dx_MI.split(rows.counts), masks, strict=True):
            if mask is not None:
                own_NI.mul_(as_matrix(mask))
        rows.scatter(grad_x, dx_MI, overwrite)
    return [gradient if need else None for gradient, need in zip(factor_grads, needs, strict=True)]


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Multiply group by group, group j being the tokens from ends[j - 1] to ends[j].

    a [M, K], b [J, K, N] -> [M, N]: the rows of each group times its own matrix. a [K, M], b [M, N] -> [J, K, N]: one product per group.
    """
    return F.grouped_mm(a, b, offs=ends)


def stack_factors(
    As: Sequence[Tensor], Bs: Sequence[Tensor], updates: Sequence[LowRankUpdate], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Stack s A to [J, R, I] and B to [J, O, R], ranks padded with zeros, with one concatenation each."""
    rank = -(-max(map(len, As)) // ALIGNMENT) * ALIGNMENT  # the largest rank, rounded up: 20 -> 24
    scaled = _mul(list(As), [update.scale for update in updates])
    A_JRI = torch.cat(list(_padded(scaled, rank, 0))).to(dtype).view(len(As), rank, -1)
    # Padding B on the right and joining along its columns gives [O, J R]; seen as [O, J, R] the updates only change places.
    B_OJR = torch.cat(list(_padded(Bs, rank, 1)), 1).to(dtype).view(-1, len(Bs), rank)
    return A_JRI, B_OJR.transpose(0, 1)


def _padded(matrices: Sequence[Tensor], size: int, dim: int) -> Iterator[Tensor]:
    """Yield each matrix, followed by zeros wherever it is smaller than `size` along `dim`."""
    zeros = matrices[0].new_zeros((size, matrices[0].shape[1]) if dim == 0 else (matrices[0].shape[0], size))
    for matrix in matrices:
        yield matrix
        if matrix.shape[dim] < size:
            yield zeros.narrow(dim, 0, size - matrix.shape[dim])


class _UpdateRows:
    """The rows of several updates: gathers them from a tensor end to end, and scatters results back.

    Updates on rows 0-1 and 2-3 follow one another: their rows are one slice, gathered as a view and written in one go. Updates on rows 0-1
    and 3 have a gap: their rows are copied, and written one update at a time.
    """

    def __init__(self, updates: Sequence[LowRankUpdate], x: Tensor) -> None:
        self.updates = updates
        self.counts = tuple(update.rows_of(x).numel() // x.shape[-1] for update in updates)
        """Tokens of each update."""
        self.ends = row_ends(self.counts, x.device)
        slices = [update.rows for update in updates if update.rows is not None]
        gaps = len(slices) < len(updates) or any(one.stop != other.start for one, other in itertools.pairwise(slices))
        self.span = None if gaps else slice(slices[0].start, slices[-1].stop)
        """The slice of all rows, or None where there is a gap."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows as a matrix [M, D] that the kernel accepts: a view where possible, otherwise a copy."""
        if self.span is None:
            return torch.cat([as_matrix(update.rows_of(tensor)) for update in self.updates])
        rows_MD = as_matrix(self._narrow(tensor, self.span))
        row_stride, column_stride = rows_MD.stride()
        row_major = column_stride == 1 and row_stride >= rows_MD.shape[1]
        aligned = row_stride % ALIGNMENT == 0 and rows_MD.data_ptr() % 16 == 0
        return rows_MD if row_major and aligned else rows_MD.clone(memory_format=torch.contiguous_format)

    def gather_dropped(self, x: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
        """Return the rows of x [M, I] after dropout."""
        if all(mask is None for mask in masks):
            return self.gather(x)
        pairs = [(update.rows_of(x), mask) for update, mask in zip(self.updates, masks, strict=True)]
        return torch.cat([as_matrix(own if mask is None else own * mask) for own, mask in pairs])

    def scatter(self, out: Tensor, new_MD: Tensor, overwrite: bool = False) -> None:
        """Add `new_MD` to the rows of a contiguous tensor [..., D], or overwrite them."""
        if self.span is None:
            targets, new = [update.rows_of(out) for update in self.updates], list(new_MD.split(self.counts))
        else:
            targets, new = [self._narrow(out, self.span)], [new_MD]
        views = [target.view(-1, out.shape[-1]) for target in targets]
        _copy_(views, new) if overwrite else _add_(views, new)

    def _narrow(self, tensor: Tensor, rows: slice) -> Tensor:
        return tensor.narrow(self.updates[0].dim, rows.start, rows.stop - rows.start)


@functools.lru_cache(maxsize=64)
def row_ends(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each group ends: counts (5, 3, 2) give [5, 8, 10].

    All modules of a pass have the same counts. The cache copies them to the GPU, and waits for it, once.
    """
    with torch.inference_mode(False):
        return torch.tensor(counts).cumsum(0).to(device, torch.int32)
