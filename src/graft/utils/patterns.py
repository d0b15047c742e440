"""Regular expressions from files and from the command line, matched with a time limit.

Some expressions take exponential time on some texts, such as `(a+)+$`. Those of a user's own text cost the user; those of a folder that
somebody else wrote would stop a whole run. The package `regex` reads the same language as Python's `re` and can stop after a time.
"""

from __future__ import annotations

import math
import re
import time
from functools import lru_cache
from typing import Any

import regex

from graft.errors import GraftError

LIMIT = 1.0
"""The seconds of processor time that one expression may take, over all texts together."""
_SLOW = 0.001
"""Seconds of one match that are worth counting: ordinary matches take microseconds, whatever their number."""
_LONGEST = 20_000
"""The most characters of an expression."""
_REPEATED = 10_000
"""The largest product of all counts in braces: `((a{1000}){1000}){1000}` takes hours to compile."""


class Pattern:
    """A compiled expression with a time limit. `pattern` makes it."""

    def __init__(self, text: str) -> None:
        """Raises `GraftError` if the text is not a regular expression of Python's `re`."""
        self.text, self._spent = text, 0.0
        try:
            if len(text) > _LONGEST:
                raise re.error(f"it has {len(text)} characters, and at most {_LONGEST} are allowed")
            if (count := _repetitions(text)) > _REPEATED:
                raise re.error(f"its counts in braces multiply to {count:,}, and at most {_REPEATED:,} are allowed")
            re.compile(text)  # decides what is an expression, since the two packages differ at the edges
            self._compiled = regex.compile(text)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise GraftError(f"{_shown(text)} is not a regular expression: {error}") from error

    def fullmatch(self, text: str) -> bool:
        """Whether the expression matches the whole text. Raises `GraftError` if that takes too long."""
        return self._run(self._compiled.fullmatch, text) is not None

    def search(self, text: str) -> bool:
        """Whether the expression matches somewhere in the text. Raises `GraftError` if that takes too long."""
        return self._run(self._compiled.search, text) is not None

    def match(self, text: str) -> Any:
        """Return the match at the beginning of the text, or None. Raises `GraftError` if that takes too long."""
        return self._run(self._compiled.match, text)

    def _run(self, method: Any, text: str) -> Any:
        while self._spent < LIMIT:
            # The time of this thread alone: on a busy machine it may have to wait for its turn in the middle of a match.
            begun = time.thread_time()
            try:
                return method(text, timeout=LIMIT)
            except TimeoutError:
                continue
            finally:
                took = time.thread_time() - begun
                self._spent += took if took > _SLOW else 0.0
        raise GraftError(
            f"the pattern {_shown(self.text)} takes more than {LIMIT:g} second to match (tried on {_shown(text)}): "
            "write a simpler one, without repetitions inside repetitions"
        )


@lru_cache(maxsize=4096)
def pattern(text: str) -> Pattern:
    """Return the compiled expression. Raises `GraftError` if the text is not a regular expression."""
    return Pattern(text)


def _repetitions(text: str) -> int:
    """Return the product of the counts in braces, each the larger of {m,n}."""
    counts = re.findall(r"\{(\d{0,12}),?(\d{0,12})\}", text)
    return math.prod(max((int(count) for count in pair if count), default=1) or 1 for pair in counts)


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 120 else f"{text[:117]!r}..."
