"""HellaSwag: choose the ending of a short scene (Zellers et al. 2019, arXiv 1905.07830). 10,042 questions, the validation split.

One raw row (Rowan/hellaswag):

    {"ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
     "ctx": "A man is sitting on a roof. he", "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
     "is holding a rubik's cube.", "starts pulling up roofing on a roof."], "label": "3"}
"""

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import ParsedRow, Task
from graft.evaluation.tasks.sources import Hub
from graft.evaluation.tasks.wording import Wording


def convert(row: Row) -> ParsedRow:
    label = str(row["label"]).strip()  # empty in the test split, which has no answers
    return ParsedRow(
        f"{row['activity_label']}: {row['ctx']}", f"ending{int(label) + 1}" if label else None, tuple(row["endings"])
    )


TASK = Task(
    "hellaswag", "label", convert, Hub("Rowan/hellaswag", "validation"), ranking="continuation",
    wording=Wording(
        "1234", "ending{}", lead="Please choose the correct ending to complete the given sentence: ", mark="Ending{}: ",
        tail="\n\nAnswer format: {}",
    ),
)  # fmt: skip
