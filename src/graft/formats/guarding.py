"""Adapter folders that others wrote: whatever goes wrong while one is read becomes one error that names the folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from graft.attaching.stored import first_line
from graft.errors import GraftError


@contextmanager
def named_errors(folder: str | Path) -> Iterator[None]:
    """Turn every exception of a block of code that reads an adapter folder into a `GraftError` that names the folder.

    A folder may hold anything, and what it leads to (a key that is missing, a type that does not fit, a number too large) cannot be listed.
    """
    try:
        yield
    except GraftError as error:
        if type(error) is not GraftError or str(folder) in str(error):
            raise
        raise GraftError(f"{folder}: {error}") from error
    except ValidationError as error:
        said = "; ".join(
            f"{'.'.join(map(str, each['loc']))}: {each['msg']} (given {each['input']!r})" for each in error.errors()
        )
        raise GraftError(f"{folder} holds no settings that an adapter can have: {said}") from error
    except Exception as error:
        raise GraftError(
            f"{folder} cannot be read as an adapter: {type(error).__name__}: {first_line(error)}"
        ) from error
