"""Social IQa: what people feel and do next (Sap et al. 2019, arXiv 1904.09728). 1,954 questions, the validation split.

One raw row (lighteval/siqa on the hub, a plain-data copy of allenai/social_i_qa):

    {"context": "Tracy didn't go home that evening and resisted Riley's attacks.", "question": "What does Tracy need to do before this?",
     "answerA": "make a new plan", "answerB": "Go home and see Riley", "answerC": "Find somewhere to go", "label": "3"}
"""

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import ParsedRow, Task
from graft.evaluation.tasks.multiple_choice import ANSWERS
from graft.evaluation.tasks.sources import Hub


def convert(row: Row) -> ParsedRow:
    choices = (row["answerA"], row["answerB"], row["answerC"])
    label = row["label"].strip()  # some copies keep a line end
    return ParsedRow(f"{row['context']} {row['question']}", f"answer{label}" if label else None, choices)


TASK = Task("social_i_qa", "label", convert, Hub("lighteval/siqa", "validation"), wording=ANSWERS)
