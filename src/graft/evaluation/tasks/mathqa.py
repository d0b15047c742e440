"""MathQA: AQuA's questions with operation programs (Amini et al. 2019, arXiv 1905.13319). 2,985 test questions.

One raw row (test.json of the authors, and regisss/math_qa on the hub):

    {"Problem": "the banker ' s gain of a certain sum due 3 years hence at 10 % per annum is rs . 36 . what is the present worth ?",
     "Rationale": "...", "options": "a ) rs . 400 , b ) rs . 300 , c ) rs . 500 , d ) rs . 350 , e ) none of these",
     "correct": "a", "annotated_formula": "...", "linear_formula": "...", "category": "gain"}

The published instructions write every letter from a to f in the options as a capital ("nonE oF thEsE"). The original rows are
converted in the same way, so that both sources ask the same question. Some rows list the options as "['a ) 61', 'b ) 62', ...]".
"""

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import ParsedRow, Task, parse_instruction
from graft.evaluation.tasks.sources import Hub
from graft.evaluation.tasks.wording import Wording

_CAPITALS = str.maketrans("abcdef", "ABCDEF")
_WORDING = Wording(
    "ABCDE", intro=" The options: ", mark="{} ) ", separator=" , ",
    alternative=Wording("ABCDE", intro=" The options: [", mark="'{} ) ", separator="', ", tail="']"),
)  # fmt: skip


def convert(row: Row) -> ParsedRow:
    instruction = f"{row['Problem']} The options: {row['options'].translate(_CAPITALS)}"
    return parse_instruction(instruction, row["correct"].upper(), _WORDING)


TASK = Task("mathqa", "letter", convert, Hub("regisss/math_qa", "test"), wording=_WORDING)
