"""`llm-adapters`: the protocol of the published tables (arXiv 2304.01933), whose odd rules define the score and are kept.

- Prompt: that of its evaluate.py, with the indentation of 16 spaces (its training prompt differs by a few spaces).
- Decoding: four beams, deterministic: its temperature and top-k settings never take effect, since sampling is off.
- What the model writes behind another "### Response:" of its own does not count.
- Numbers: commas are removed, the last match of -?\\d+\\.?\\d* is the answer, right within 0.001. So "3-5" ends in -5.
- Letters: the first capital A to E anywhere, so "Calculate ... (D)" answers C.
- Labels ("answer2", "true"): the first one, in lower case.

What does not define the score but spoils it is not kept: dropout left on, padding that is attended, no cache. Its evaluate.py
has no case for mawps and mathqa, which its tables hold: they follow the rules of numbers and letters.
"""

from __future__ import annotations

import re

from graft.data.turn_template import TurnTemplate
from graft.evaluation.protocols.base import OutputProtocol, Rule, any_choice, same_text
from graft.evaluation.tasks.base import Task

_PAD = " " * 16
_HEADING = "### Response:"
_NUMBER = r"-?\d+\.?\d*"
_LETTER = "A|B|C|D|E"

PROMPT = TurnTemplate(
    name="llm-adapters-evaluation",
    opening="Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n",
    user=f"{_PAD}### Instruction:\n{_PAD}{{user}}\n\n{_PAD}{_HEADING}\n{_PAD}",
)


def response(output: str) -> str:
    """The output up to where the model starts another response of its own."""
    return output.split(_HEADING)[0].strip()


def number(output: str, task: Task) -> str | None:
    found = re.findall(_NUMBER, response(output).replace(",", ""))
    return found[-1] if found else None


def near(gold: str, extracted: str) -> bool:
    return abs(float(gold) - float(extracted)) <= 0.001


def letter(output: str, task: Task) -> str | None:
    found = re.search(_LETTER, response(output))
    return found[0] if found else None


def label(output: str, task: Task) -> str | None:
    found = re.search(any_choice(task), response(output))
    return found[0] if found else None


_CUT = f"up to the next {_HEADING!r}, "

PROTOCOL = OutputProtocol(
    name="llm-adapters",
    version=1,
    prompt=PROMPT,
    beams=4,
    rules={
        "number": Rule(number, near, f"{_CUT}without commas, the last match of {_NUMBER}, within 0.001"),
        "letter": Rule(letter, same_text, f"{_CUT}the first match of {_LETTER}"),
        "label": Rule(label, same_text, f"{_CUT}the first label"),
    },
)
