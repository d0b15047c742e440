"""MultiArith: two-step word problems (Roy and Roth 2015, EMNLP). 600 questions, 20 of which occur twice.

One raw row (MultiArith.json):

    {"iIndex": 1, "sQuestion": " At the schools book fair Sam bought 13 adventure books and 17 mystery books. ...",
     "lEquations": ["X=((13.0+17.0)-15.0)"], "lSolutions": [15.0]}

On the hub (ChilleD/MultiArith) the columns are `question` and `final_ans`, and the set is split in two.
"""

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import ParsedRow, Task
from graft.evaluation.tasks.sources import Hub
from graft.evaluation.tasks.word_problems import repository_row


def convert(row: Row) -> ParsedRow:
    return repository_row(row) if "sQuestion" in row else ParsedRow(row["question"], row["final_ans"])


TASK = Task(
    "MultiArith", "number", convert, Hub("ChilleD/MultiArith", "train+test"),
    files=("MultiArith/MultiArith.json", "MultiArith.json"),
)  # fmt: skip
