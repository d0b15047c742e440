"""BoolQ: yes-no questions that people asked (Clark et al. 2019, arXiv 1905.10044). 3,270 questions, the validation split.

One raw row (google/boolq):

    {"question": "does ethanol take more energy make that produces", "answer": false, "passage": "All biomass goes through ..."}

LLM-Adapters asks without the passage, so the score measures what the model knows, not what it can read.
"""

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import ParsedRow, Task
from graft.evaluation.tasks.sources import Hub
from graft.evaluation.tasks.wording import FixedChoices

CHOICES = ("true", "false")


def convert(row: Row) -> ParsedRow:
    return ParsedRow(row["question"], None if row["answer"] is None else str(row["answer"]).lower(), CHOICES)


TASK = Task(
    "boolq", "label", convert, Hub("google/boolq", "validation"),
    wording=FixedChoices(
        "", lead="Please answer the following question with true or false, question: ",
        tail="?\n\nAnswer format: true/false", choices=CHOICES,
    ),
)  # fmt: skip
