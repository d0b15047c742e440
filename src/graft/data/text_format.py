"""How a file of text is written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextFormat:
    """How a file of text is written, where its name and content do not say it."""

    encoding: str | None = None
    delimiter: str | None = None
    """Of CSV and TSV: the character between cells."""
    quotes: bool | None = None
    """Of CSV and TSV: whether cells may stand in quotation marks; None: CSV yes, TSV where the file is written so."""
    columns: tuple[str, ...] = ()
    """Of CSV and TSV: the names of the columns, for a file without a header."""
