"""AQuA: algebra word problems with five choices (Ling et al. 2017, arXiv 1705.04146). 254 test questions.

One raw row (test.json of google-deepmind/AQuA, one row per line, and deepmind/aqua_rat on the hub):

    {"question": "A car is being driven, in a straight line and at a uniform speed, towards the base of a vertical tower. ...",
     "options": ["A)5(√3 + 1)", "B)6(√3 + √2)", "C)7(√3 – 1)", "D)8(√3 – 2)", "E)None of these"],
     "rationale": "Explanation : ...", "correct": "A"}

The instruction lists the options as "Answer Choices: (A) 5 (√3 + 1)  (B) 6 (√3 + √2)  ...", with spaces around every bracket, as
LLM-Adapters published it.
"""

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import ParsedRow, Task
from graft.evaluation.tasks.sources import Hub
from graft.evaluation.tasks.wording import Wording


def convert(row: Row) -> ParsedRow:
    choices = [option.partition(")")[2].replace("(", " (").replace(")", ") ") for option in row["options"]]
    return ParsedRow(row["question"].strip(), row["correct"], tuple(choices))


TASK = Task(
    "AQuA", "letter", convert, Hub("deepmind/aqua_rat", "test", "raw"), files=("AQuA/test.jsonl",),
    wording=Wording("ABCDE", intro=" Answer Choices: ", mark="({}) "),
)  # fmt: skip
