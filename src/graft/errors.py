"""The errors that a user can cause, and helpers for their messages.

`GraftError` means that the input is wrong: the command line prints the message and exits with 2. Any other exception is a fault of Graft
itself (exit 1).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType


class GraftError(ValueError):
    """The user's input is wrong. The message says what was wrong, what was given, and what is allowed or what to do."""

    quiet = False
    """Whether another process of the run reports it."""
    code = 2
    """The exit code of the command."""


class MissingExtra(GraftError):
    """A feature needs a package that is not installed. The message names the install command."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"this needs the package '{module}', which is not installed. Run: pip install 'graft-llm[{extra}]'"
        )
        self.module, self.extra = module, extra

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.module, self.extra)


class DoesNotWork(GraftError):
    """A kind, or the base itself, fails in a trial pass. `__cause__` is the exception."""


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name that is most similar to `name`, or None if none is close.

    Letters that changed places come first: for `dop`, `dpo` and not `dro`.
    """
    found = difflib.get_close_matches(name, list(allowed), n=3, cutoff=0.6)
    swapped = next((each for each in found if sorted(each) == sorted(name)), None)
    return swapped or (found[0] if found else None)


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return a sentence to append to an error message, like " Did you mean 'rank'?", or an empty string if no name is close."""
    found = nearest(name, allowed)
    return f" Did you mean '{found}'?" if found else ""


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names for a message: the first `most` of them, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun, for a message: "1 sample", "1,200 samples", "0 classes" (with plural="classes")."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package. Raises `MissingExtra`, with the command that installs it, if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (
            error.name and error.name.split(".")[0] != module.split(".")[0]
        ):  # the package is there; one that it imports is not
            raise
        raise MissingExtra(module, extra) from error
