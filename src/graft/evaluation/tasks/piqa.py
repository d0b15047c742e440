"""PIQA: which of two ways reaches an everyday goal (Bisk et al. 2020, arXiv 1911.11641). 1,838 questions, the validation split.

One raw row (baber/piqa on the hub, a plain-data copy of ybisk/piqa):

    {"goal": "How do I ready a guinea pig cage for it's new occupants?", "sol1": "Provide the guinea pig with a cage full of ...",
     "sol2": "Provide the guinea pig with a cage full of ...", "label": 0}
"""

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import ParsedRow, Task
from graft.evaluation.tasks.sources import Hub
from graft.evaluation.tasks.wording import Wording


def convert(row: Row) -> ParsedRow:
    return ParsedRow(row["goal"], f"solution{int(row['label']) + 1}", (row["sol1"], row["sol2"]))


TASK = Task(
    "piqa", "label", convert, Hub("baber/piqa", "validation"),
    wording=Wording(
        "12", "solution{}", lead="Please choose the correct solution to the question: ", mark="Solution{}: ",
        separator="\n\n", tail="\n\nAnswer format: {}",
    ),
)  # fmt: skip
