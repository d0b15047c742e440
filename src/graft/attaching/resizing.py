"""Give the tables of a base another number of rows, for adapters that were trained with added tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graft.errors import GraftError
from graft.injection.state import unwrapped


def table_rows(model: nn.Module) -> int:
    """Return the number of rows of the input embedding. Raises `GraftError` if the model has none."""
    root: Any = unwrapped(model)
    try:
        return len(root.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise GraftError(f"this {type(root).__name__} has no token embedding that could get more rows") from error


@torch.no_grad()
def resize_tables(model: nn.Module, rows: int) -> None:
    """Give the input embedding and the output head this many rows. New rows hold the mean of the others, so they are the same each time.

    Raises `GraftError` for a model with adapters, which may act on the tables that are replaced.
    """
    before, root = table_rows(model), unwrapped(model)
    if rows == before:
        return
    state = root.__dict__.get("graft_state")
    if state is not None and state.adapters:
        raise GraftError(
            f"the base has {before} rows and needs {rows}, but it has adapters ({', '.join(state.adapters)}): load the adapter that needs "
            "more rows first, or detach them"
        )
    resized: Any = root
    resized.resize_token_embeddings(rows, mean_resizing=False)
    for table in (resized.get_input_embeddings(), resized.get_output_embeddings()):
        for own in (getattr(table, "weight", None), getattr(table, "bias", None)):
            if own is not None and rows > before and len(own) == rows:
                own[before:] = own[:before].float().mean(0).to(own.dtype)


@contextmanager
def resized(model: nn.Module, rows: int | None) -> Iterator[None]:
    """Resize the tables for a block of code; if it fails, they get their rows back. None: they stay."""
    before = table_rows(model) if rows is not None else 0
    if rows is not None:
        resize_tables(model, rows)
    try:
        yield
    except BaseException:
        if rows is not None:
            resize_tables(model, before)
        raise
