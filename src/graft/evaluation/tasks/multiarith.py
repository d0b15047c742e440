"""MultiArith: word problems of two steps (Roy and Roth 2015, EMNLP). 600 questions, of which 20 stand there twice.

One raw row (MultiArith.json):

    {"iIndex": 1, "sQuestion": " At the schools book fair Sam bought 13 adventure books and 17 mystery books. ...",
     "lEquations": ["X=((13.0+17.0)-15.0)"], "lSolutions": [15.0]}

On the hub (ChilleD/MultiArith) the columns are `question` and `final_ans`, in two splits that together are the set.
"""

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import Asked, Task
from graft.evaluation.tasks.rows import Hub
from graft.evaluation.tasks.word_problems import repository_row


def convert(row: Row) -> Asked:
    return repository_row(row) if "sQuestion" in row else Asked(row["question"], row["final_ans"])


TASK = Task(
    "MultiArith", "number", convert, Hub("ChilleD/MultiArith", "train+test"),
    files=("MultiArith/MultiArith.json", "MultiArith.json"),
)  # fmt: skip
