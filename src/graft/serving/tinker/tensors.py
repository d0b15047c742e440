"""Arrays on the wire: tensors of a request, and those of an answer. All bytes are little-endian.

Legend: T tokens, K targets of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graft.errors import GraftError

FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4
_NUMPY = {FLOAT32: "<f4", INT64: "<i8", INT32: "<i4", BFLOAT16: "<u2"}
MOST_CELLS = 2**26
"""Most cells of a tensor. A sparse one of a few bytes may claim any shape."""


def tensor_of(message: Any, name: str) -> Tensor:
    """Return a tensor of a request, dense. Cells that a sparse one does not list are 0.

    name: for messages. Raises `GraftError` for bytes that do not fit the shape, and for unknown dtypes.
    """
    shape, kind = tuple(message.shape), message.WhichOneof("encoding")
    if message.dtype not in _NUMPY:
        raise GraftError(f"{name} has dtype {message.dtype}; there are 1 float32, 2 int64, 3 int32, 4 bfloat16")
    if min(shape, default=0) < 0 or math.prod(shape) > MOST_CELLS:
        raise GraftError(f"{name} has shape {list(shape)}; a tensor has at most {MOST_CELLS:,} cells")
    if kind == "sparse_csr":
        return _from_sparse(message.sparse_csr, message.dtype, shape, name)
    values = _values(message.dense, message.dtype, name)
    if values.numel() != math.prod(shape):
        raise GraftError(f"{name} has {values.numel()} values, but shape {list(shape)}")
    return values.reshape(shape)


def _values(data: bytes, dtype: int, name: str) -> Tensor:
    try:
        found = torch.from_numpy(np.frombuffer(data, _NUMPY[dtype]).copy())
    except ValueError as error:
        raise GraftError(f"{name} has {len(data)} bytes, which is no number of values") from error
    return found.view(torch.bfloat16) if dtype == BFLOAT16 else found


def _from_sparse(sparse: Any, dtype: int, shape: tuple[int, ...], name: str) -> Tensor:
    if len(shape) != 2:
        raise GraftError(f"{name} is sparse, which takes two dimensions; given shape {list(shape)}")
    values = _values(sparse.values, dtype, name)
    starts, columns = _values(sparse.crow_indices, INT64, name), _values(sparse.col_indices, INT64, name)
    counts = starts.diff()
    fits = len(starts) == shape[0] + 1 and len(values) == len(columns) == int(starts[-1]) and int(starts[0]) == 0
    if not fits or bool((counts < 0).any()) or bool(((columns < 0) | (columns >= shape[1])).any()):
        raise GraftError(f"{name}: the sparse indices do not fit shape {list(shape)}")
    found = torch.zeros(shape, dtype=values.dtype)
    found[torch.arange(shape[0]).repeat_interleave(counts), columns] = values
    return found


def tokens_of(data: bytes, name: str) -> list[int]:
    """Return the token ids of int32 bytes. Raises `GraftError` for a length that is no multiple of four."""
    return _values(data, INT32, name).tolist()


def as_int32(values: Sequence[int]) -> bytes:
    """Return token ids as bytes."""
    return np.asarray(values, "<i4").tobytes()


def as_int64(values: Sequence[int]) -> bytes:
    """Return whole numbers as bytes."""
    return np.asarray(values, "<i8").tobytes()


def as_float32(values: Sequence[float]) -> bytes:
    """Return numbers as bytes."""
    return np.asarray(values, "<f4").tobytes()


def add_records(output: Any, name: str, tensors: Sequence[Tensor]) -> None:
    """Add one float32 tensor per datum to an answer, [T] or [T, K]: a record for each run of datums with one trailing shape."""
    for trailing, group in groupby(tensors, key=lambda each: tuple(each.shape[1:])):
        parts = [each.detach().cpu().numpy().astype("<f4").tobytes() for each in group]
        record = output.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(parts))
        field = record.fields[name]
        field.data, field.dtype = b"".join(parts), FLOAT32
        field.offsets = np.cumsum([0, *map(len, parts)], dtype="<i8").tobytes()
        field.trailing_shape.extend(trailing)
