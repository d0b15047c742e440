"""SVAMP: one-step word problems, varied so that shallow cues mislead (Patel et al. 2021, arXiv 2103.07191). 1,000 questions.

One raw row (SVAMP.json, and ChilleD/SVAMP on the hub, where the set is split in two):

    {"ID": "chal-2", "Body": "Bryan took a look at his books as well. If Bryan has 56 books in each of his 9 bookshelves.",
     "Question": "How many books does he have in total?", "Equation": "( 56.0 * 9.0 )", "Answer": 504.0, "Type": "Multiplication"}
"""

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import ParsedRow, Task
from graft.evaluation.tasks.sources import Hub


def convert(row: Row) -> ParsedRow:
    return ParsedRow(f"{row['Body'].strip()} {row['Question'].strip()}", row["Answer"])


TASK = Task(
    "SVAMP", "number", convert, Hub("ChilleD/SVAMP", "train+test"), files=("SVAMP/SVAMP.json", "SVAMP.json")
)  # fmt: skip
