"""A digest of a base's weights: some values of every tensor, spread over it, so that no layer can change unseen.

    tensors of numbers    about four values of every row, at columns that move from row to row, and every value of a vector
    packed weights        bytes of the packed data, spread in the same way, and the scales beside them (bitsandbytes, torchao, 8-bit floats;
                          GPTQ, AWQ)

Values are rounded to bfloat16, and those below 2^-16 count as zero, so that one file has one digest in float32, bfloat16 and float16
(which holds smaller values less exactly). Linear weights are a part of their own, because a base may be loaded quantised: adapters that
were trained on four bits are used on the same base in bfloat16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from graft.architectures.eight_bit import is_eight_bit, scales_of
from graft.architectures.experts import expert_parts
from graft.architectures.layers import is_linear
from graft.architectures.torchao import is_torchao
from graft.architectures.walk import base_modules, base_parameters

PER_ROW = 4
"""About how many values of a row count."""
SMALLEST = 2.0**-16


class Unreadable(Exception):
    """A tensor without values that can be read: on the meta device, sharded, or of a class that is not known."""


@dataclass(frozen=True)
class WeightDigest:
    """A digest in two parts. `str()` is what an adapter folder holds."""

    rest: str
    """Of all but the linear weights."""
    linear: str | None
    """Of the weights of linear layers and experts. None if they cannot be read."""
    storage: str
    """How the linear weights are stored, for comparisons: empty for floating-point numbers."""

    def __str__(self) -> str:
        return f"{self.rest}-{self.linear or 'unknown'}"


def weight_digest(
    root: nn.Module,
    originals: Mapping[str, Tensor],
    without: Sequence[str] = (),
    without_rows: Mapping[str, Sequence[int]] | None = None,
) -> WeightDigest | None:
    """Return the digest of a base, None if its weights cannot be read (meta device, sharded).

    originals: name -> weight from before a merge. without: paths of modules that do not count. without_rows: name of a table -> rows that
    do not count.
    """
    reading = Reading(root, originals, without, without_rows)
    for path, module in base_modules(root):
        reading.read(path, module)
    return reading.digest()


class Reading:
    """A base that is read for its digest, module by module in the order of `base_modules`. The arguments are those of `weight_digest`.

    Modules may be replaced by others of the same names before they are read, and go once they are.
    """

    def __init__(
        self,
        root: nn.Module,
        originals: Mapping[str, Tensor] | None = None,
        without: Sequence[str] = (),
        without_rows: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self._originals, self._without, self._without_rows = originals or {}, without, without_rows or {}
        self._names = {name for name, _ in base_parameters(root)}  # a weight that modules share counts once
        self._hashers = {False: hashlib.sha256(), True: hashlib.sha256()}
        self._storages: set[str] = set()
        self._unread = {False: False, True: False}

    def read(self, path: str, module: nn.Module) -> None:
        """Read the weights that a module holds itself."""
        for name, tensor, linear, scales in () if self._unread[False] else _tensors_of(path, module):
            if path in self._without or not (name in self._names or name.endswith("qweight")):
                continue
            try:
                parts = _parts(self._originals.get(name, tensor), scales)
            except Unreadable:
                self._unread[linear and not tensor.is_meta] = True
                parts = []
            if linear:
                self._storages.add(_storage(tensor))
            for part, width in parts:
                sample = _sample(part, width, self._without_rows.get(name, ()))
                self._hashers[linear].update(name.encode() + sample)

    def digest(self) -> WeightDigest | None:
        """The digest of what was read."""
        if self._unread[False]:
            return None
        rest, linear = (hasher.hexdigest()[:16] for hasher in self._hashers.values())
        return WeightDigest(rest, None if self._unread[True] else linear, " ".join(sorted(self._storages - {""})))


def _tensors_of(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor, bool, Tensor | None]]:
    """Yield (name, tensor, whether it is a linear weight, scales that lie elsewhere) of every parameter, and of packed buffers."""
    packed = {name: each for name, each in module._buffers.items() if name == "qweight"}  # GPTQ and AWQ
    weights = bool(packed) or is_linear(module) or bool(expert_parts(module))
    for name, tensor in {**module._parameters, **packed}.items():
        if tensor is not None:
            scales = scales_of(module) if name == "weight" and is_eight_bit(module) else None
            yield f"{path}.{name}".lstrip("."), tensor, weights and name != "bias", scales


def _parts(tensor: Tensor, scales: Tensor | None) -> list[tuple[Tensor, int]]:
    """Return the plain tensors that hold a weight, each with the number of values per row. Raises `Unreadable`.

    Four-bit weights are packed as [N / 2, 1]; their rows are those of the weight that was packed.
    """
    state: Any = getattr(tensor, "quant_state", None)
    if tensor.device.type == "meta" or not tensor.numel() or isinstance(tensor.data, DTensor):
        raise Unreadable
    if is_torchao(tensor):  # made of other tensors
        return [part for each in _inner(tensor.data) for part in _parts(each, None)]
    if not (type(tensor.data) is Tensor or state or scales is not None):
        raise Unreadable
    own = tensor.detach().as_subclass(Tensor)
    if state is not None:
        found = [state.absmax] if state.state2 is None else [state.absmax, state.state2.absmax]
        return [(each, max(1, each.numel() // state.shape[0])) for each in (own, *found)]
    if own.is_floating_point() and own.element_size() == 1:
        own = own.view(torch.uint8)
    whole = [(own, own.shape[-1] if own.dim() > 1 else 1)]
    return whole if scales is None else [*whole, (scales, 1)]


def _inner(tensor: Any) -> list[Tensor]:
    """Return the tensors that a tensor of a class of its own is made of."""
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def _storage(tensor: Tensor) -> str:
    """Return how a linear weight is stored. Another kernel or source dtype may round a value to another code, so both are part of it."""
    state: Any = getattr(tensor, "quant_state", None)
    if state is not None:
        said = f"{state.quant_type}/{state.blocksize}/{state.nested}/{state.dtype}/{tensor.device.type}"
    elif type(tensor.data) is Tensor and tensor.is_floating_point() and tensor.element_size() > 1:
        said = ""
    else:
        said = f"{type(tensor).__name__}/{tensor.dtype}/{tensor.device.type}"
    return said.replace("torch.", "")


def _sample(tensor: Tensor, width: int, rows: Sequence[int]) -> bytes:
    """Return some values of a tensor with `width` values per row as bytes. Those in `rows` count as zero.

    E.g. rows of 8 values: step 3 gives the values 0, 3 and 6 of row 0, 1, 4 and 7 of row 1, 2 and 5 of row 2.
    """
    step = width // PER_ROW + 1
    values = tensor.flatten()[::step]
    if len(rows):
        row_of = torch.arange(0, tensor.numel(), step, device=tensor.device) // width
        values = values.masked_fill(torch.isin(row_of, torch.tensor(list(rows), device=tensor.device)), 0)
    if not tensor.is_floating_point():
        return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    values = values.to("cpu", torch.bfloat16)
    return values.masked_fill(values.abs() < SMALLEST, 0).view(torch.int16).numpy().tobytes()
