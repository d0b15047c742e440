"""What import and export share: the base, loaded as the class that its config names."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graft.cli.loading import base_of, quiet

BaseName = Annotated[
    str | None, typer.Option("--base", help="The adapter's base, where no run names it.", show_default=False)
]
BaseOnly = Annotated[
    str,
    typer.Option("--base", help="The base that the adapter is for: folder, hub name or seedling.", show_default=False),
]


def loaded_base(name: str, device: str | None, dtype: str | None) -> Any:
    """The model that an adapter file is read or written against."""
    quiet()
    from graft.bases.loading import load_as_saved

    config = base_of(None, name, device, dtype)
    assert config is not None
    return load_as_saved(config)
