"""MAWPS: word problems from several collections (Koncel-Kedziorski et al. 2016, NAACL). 238 questions, MWPToolkit's split.

One raw row as LLM-Adapters has it:

    {"instruction": "Each bottle cap costs $ 2.00 . How much do 6 bottle caps cost ?", "input": "", "output": "", "answer": "12.0"}

On the hub (MU-NLPC/Calc-mawps) it is split otherwise, 520 test questions: {"id", "question", "chain", "result", ...}. Scores
on the two are not comparable. 28 of the 238 stand, nearly word for word, in the training part that LLM-Adapters uses.
"""

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import Asked, Task
from graft.evaluation.tasks.rows import Hub


def convert(row: Row) -> Asked:
    return Asked(row["question"], row["result_float"] if "result_float" in row else row["result"])


TASK = Task("mawps", "number", convert, Hub("MU-NLPC/Calc-mawps", "test"))
