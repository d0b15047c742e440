"""`math-verify`: compare answers mathematically, with the library of that name (github.com/huggingface/Math-Verify).

The library finds the last expression of an output, plain or LaTeX, and checks equality symbolically: 1/2, 0.5 and
\\frac{1}{2} are equal. It stops endless simplification with a timer, which works in the main thread only. Prompt and decoding
are those of `strict`.
"""

from __future__ import annotations

from typing import Any

from graft.errors import require
from graft.evaluation.protocols.base import OutputProtocol, Rule
from graft.evaluation.tasks.base import Task


def expression(output: str, task: Task) -> str | None:
    """Return the expression that was found, as text that the library can read again."""
    found = _library().parse(output)
    return str(found[-1]) if found else None


def equal(gold: str, extracted: str) -> bool:
    library = _library()
    return library.verify(library.parse(gold), library.parse(extracted))


def _library() -> Any:
    return require("math_verify", "eval")


PROTOCOL = OutputProtocol(
    name="math-verify",
    version=1,
    rules={"number": Rule(expression, equal, "math_verify.parse and math_verify.verify with their defaults")},
)
