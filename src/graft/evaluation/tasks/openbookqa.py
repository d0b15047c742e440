"""OpenBookQA: science questions that combine a fact with common knowledge (Mihaylov et al. 2018, arXiv 1809.02789). 500 test questions.

One raw row (allenai/openbookqa, main):

    {"id": "8-376", "question_stem": "There is most likely going to be fog around:",
     "choices": {"text": ["a marsh", "a tundra", "the plains", "a desert"], "label": ["A", "B", "C", "D"]}, "answerKey": "A"}
"""

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import ParsedRow, Task
from graft.evaluation.tasks.multiple_choice import ANSWERS, keyed
from graft.evaluation.tasks.sources import Hub


def convert(row: Row) -> ParsedRow:
    return keyed(row, row["question_stem"])


TASK = Task(
    "openbookqa", "label", convert, Hub("allenai/openbookqa", "test", "main"), wording=ANSWERS, ranking="continuation"
)
