"""`math-verify`: compare answers mathematically, with the library of that name (github.com/huggingface/Math-Verify).

The library finds the last expression of an output, plain or LaTeX, and checks equality symbolically: 1/2, 0.5 and
\\frac{1}{2} are equal. It is given the output as it is, so every judgement is the library's own. It stops endless
simplification with a timer, which works in the main thread only. Prompt and decoding are those of `strict`.
"""

from __future__ import annotations

from graft.errors import require
from graft.evaluation.protocols.base import Judgement, OutputProtocol, Rule
from graft.evaluation.tasks.base import Task


def judge(task: Task, gold: str, output: str) -> Judgement:
    """Judge an output as `verify(parse(gold), parse(output))` does. `extracted` is the text of the expression that was found."""
    library = require("math_verify", "eval")
    found = library.parse(output)
    if not found:
        return Judgement(None, "unextractable")
    return Judgement(str(found[-1]), "correct" if library.verify(library.parse(gold), found) else "wrong")


PROTOCOL = OutputProtocol(
    name="math-verify",
    version=2,
    rules={"number": Rule(judge, "math_verify.verify(math_verify.parse(gold), math_verify.parse(output))")},
)
