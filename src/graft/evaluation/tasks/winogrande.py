"""WinoGrande: choose what fills a blank (Sakaguchi et al. 2020, arXiv 1907.10641). 1,267 questions, the validation split.

One raw row (allenai/winogrande, winogrande_xl):

    {"sentence": "Sarah was a much better surgeon than Maria so _ always got the easier cases.", "option1": "Sarah",
     "option2": "Maria", "answer": "2"}
"""

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import ParsedRow, Task
from graft.evaluation.tasks.sources import Hub
from graft.evaluation.tasks.wording import Wording


def convert(row: Row) -> ParsedRow:
    gold = f"option{row['answer']}" if row["answer"] else None
    return ParsedRow(row["sentence"], gold, (row["option1"], row["option2"]))


TASK = Task(
    "winogrande", "label", convert, Hub("allenai/winogrande", "validation", "winogrande_xl"), ranking="blank",
    wording=Wording(
        "12", "option{}", lead="Please choose the correct answer to fill in the blank to complete the given sentence: ",
        mark="Option{}: ", tail=" Answer format: {}",
    ),
)  # fmt: skip
