"""`llm-adapters`: the protocol of the published tables (arXiv 2304.01933). Its odd rules define the score, so they are kept.

- Prompt: that of the authors' evaluate.py, indented by 16 spaces (their training prompt differs by a few spaces).
- Decoding: four beams without sampling, so that the authors' temperature and top-k settings have no effect.
- Text after another "### Response:" that the model writes itself does not count.
- Numbers: commas are removed; the answer is the last match of -?\\d+\\.?\\d*, right within 0.001. So "3-5" ends in -5.
- Letters: the first capital A to E anywhere, so "Calculate ... (D)" answers C.
- Labels ("answer2", "true"): the first one, in lower case.

Defects that lower the score without defining it are not kept: active dropout, attention to padding, no cache. The authors'
tables include mawps and mathqa, for which evaluate.py has no case; here they follow the rules of numbers and letters.
"""

from __future__ import annotations

import re

from graft.data.turn_template import TurnTemplate
from graft.evaluation.protocols.base import OutputProtocol, any_choice, extracting, same_text
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
    """Return the output up to where the model starts another response itself."""
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
        "number": extracting(number, near, f"{_CUT}without commas, the last match of {_NUMBER}, within 0.001"),
        "letter": extracting(letter, same_text, f"{_CUT}the first match of {_LETTER}"),
        "label": extracting(label, same_text, f"{_CUT}the first label"),
    },
)
