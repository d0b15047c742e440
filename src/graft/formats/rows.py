"""How many rows the tables of a base need for an adapter folder that was made with added tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from graft.attaching.resizing import table_rows
from graft.errors import GraftError
from graft.formats import peft
from graft.formats.guarding import named_errors
from graft.formats.llm_adapters import reading as llm_adapters
from graft.formats.own import read_header
from graft.formats.peft.rows import table_heights, trained_tokens

TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
MOST_TIMES, MOST_MORE = 4, 65_536
"""A few bytes of a file can ask for any number of rows: a table never grows beyond this many times its own rows, and so many more."""


def needed_rows(model: nn.Module, folders: Sequence[Path]) -> int | None:
    """Return the number of rows for all of these folders together, None if the base has it already.

    A folder that holds whole tables says how many; one that holds rows of single tokens, or a tokenizer, says how many at least.
    """
    exact, least = set[int](), table_rows(model)
    for folder in folders:
        with named_errors(folder):
            header = {} if folder.is_file() else read_header(folder)
            if header.get("format") == "graft":
                exact |= {header["base"]["shape"]["vocab_size"]} if "vocab_size" in header["base"]["shape"] else set()
            elif not folder.is_file() and peft.detect(folder) and not llm_adapters.detect(folder):
                heights = table_heights(folder, model)
                exact |= heights
                if not heights and (tokens := trained_tokens(folder)):
                    least = max(least, max(tokens) + 1, _tokens(folder))
    rows = max(exact) if exact else least
    most = MOST_TIMES * table_rows(model) + MOST_MORE
    if rows > most:
        raise GraftError(
            f"{', '.join(map(str, folders))}: a base of {table_rows(model)} rows would be resized to {rows}, which no added tokens explain "
            f"(at most {most})"
        )
    return None if rows == table_rows(model) else rows


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER)


def _tokens(folder: Path) -> int:
    """Return the number of tokens of the tokenizer beside an adapter, 0 if there is none."""
    if not has_tokenizer(folder):
        return 0
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(str(folder)))
