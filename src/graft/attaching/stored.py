"""Tensors from files: read without running code, checked number by number, and copied to their places, each exactly once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graft.errors import GraftError, listed

_KINDS = ("floating-point numbers", "complex numbers", "booleans", "integers")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a file by name, on the CPU: of a `.safetensors`, or of a pickle of plain tensors, from which no code runs.

    Raises `GraftError` for a missing or damaged file, and for what is no plain tensor.
    """
    if not path.is_file():
        raise GraftError(f"{path} is missing")
    try:
        safe = path.suffix == ".safetensors"
        found = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what an unpickler raises on damaged bytes can be anything
        raise GraftError(
            f"{path} ({path.stat().st_size} bytes) is damaged or cut short, or holds no plain tensors: {first_line(error)}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) and is_plain(each) for name, each in found.items()):
        raise GraftError(f"{path} is not a dictionary of plain tensors by name")
    return found


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write contiguous tensors as safetensors, readable for whoever may read other files of the folder."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files for their owner only


def is_plain(value: object) -> bool:
    """Whether a value is a dense tensor in memory that stores each of its numbers."""
    if type(value) not in (Tensor, nn.Parameter):
        return False
    assert isinstance(value, Tensor)
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return False
    # The strides of a pickled tensor can make a file of bytes look like a tensor of terabytes.
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def as_floats(tensor: Tensor, where: str) -> Tensor:
    """Return a tensor in float32. where: its name in messages.

    Raises `GraftError` if it holds anything but finite floating-point numbers.
    """
    if not tensor.is_floating_point():
        raise GraftError(f"{where} holds {_kind(tensor.dtype)} ({_short(tensor.dtype)}), but these are {_KINDS[0]}")
    found = tensor.detach().float()
    return _finite(found, where)


def as_integers(tensor: Tensor, where: str) -> Tensor:
    """Return a tensor of integers as int64. Raises `GraftError` if it holds anything else."""
    if _kind(tensor.dtype) != "integers":
        raise GraftError(f"{where} holds {_kind(tensor.dtype)} ({_short(tensor.dtype)}), but these are integers")
    return tensor.long()


def copy_strictly(stored: Mapping[str, Tensor], places: Mapping[str, Tensor], origin: str) -> None:
    """Copy tensors to their places by name.

    Raises `GraftError`, and copies nothing, if tensors are missing, extra, of another shape or of another kind of number, or if a number is
    not finite. The message lists them. origin: where they come from, for messages.
    """
    compare_shapes({key: tuple(each.shape) for key, each in stored.items()}, places, origin)
    for key, place in places.items():
        dtype = stored[key].dtype
        if _kind(dtype) != _kind(place.dtype):
            raise GraftError(
                f"{origin}: tensor '{key}' holds {_kind(dtype)} ({_short(dtype)}), but these are {_kind(place.dtype)}"
            )
        if place.is_floating_point():
            _finite(stored[key].to(place.dtype), f"{origin}: tensor '{key}'")
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(stored[key])


def compare_shapes(stored: Mapping[str, tuple[int, ...]], places: Mapping[str, Tensor], origin: str) -> None:
    """Raise `GraftError` that lists the tensors which are missing, extra or of another shape. stored: the shapes by name."""
    missing, extra = sorted(set(places) - set(stored)), sorted(set(stored) - set(places))
    shapes = [f"{key} {stored[key]} instead of {tuple(place.shape)}" for key, place in places.items()
              if key in stored and stored[key] != tuple(place.shape)]  # fmt: skip
    problems = [
        f"{len(keys)} {what} ({listed(keys, 5)})"
        for what, keys in (("missing", missing), ("extra", extra), ("misshapen", shapes))
        if keys
    ]
    if problems:
        raise GraftError(f"{origin} does not fit the adapter: of {len(places)} tensors, " + "; ".join(problems))


def _finite(tensor: Tensor, where: str) -> Tensor:
    wrong = tensor.numel() - int(tensor.isfinite().sum())
    if wrong:
        raise GraftError(f"{where} holds {wrong} of {tensor.numel()} numbers that are NaN or infinite")
    return tensor


def _kind(dtype: torch.dtype) -> str:
    return _KINDS[[dtype.is_floating_point, dtype.is_complex, dtype == torch.bool, True].index(True)]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_line(error: BaseException, most: int = 200) -> str:
    """Return the first line of an error's message, or its type where it has none: the lines that follow are for programmers."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= most else f"{lines[0][:most]}..."
