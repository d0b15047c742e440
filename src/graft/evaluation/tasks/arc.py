"""ARC: science questions from school examinations (Clark et al. 2018, arXiv 1803.05457). Test splits: Easy 2,376, Challenge 1,172.

One raw row (allenai/ai2_arc), with three to five choices lettered or numbered:

    {"id": "Mercury_7175875", "question": "An astronomer observes that a planet rotates faster after a meteorite impact. ...",
     "choices": {"text": ["Planetary density will decrease.", "Planetary years will become longer.", ...], "label": ["A", "B", "C", "D"]},
     "answerKey": "C"}
"""

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import ParsedRow, Task
from graft.evaluation.tasks.multiple_choice import ANSWERS, keyed
from graft.evaluation.tasks.sources import Hub


def convert(row: Row) -> ParsedRow:
    return keyed(row, row["question"])


EASY, CHALLENGE = (
    Task(name, "label", convert, Hub("allenai/ai2_arc", "test", name), wording=ANSWERS)
    for name in ("ARC-Easy", "ARC-Challenge")
)
