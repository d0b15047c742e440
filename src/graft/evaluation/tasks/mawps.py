"""MAWPS: word problems from several collections (Koncel-Kedziorski et al. 2016, NAACL). 238 questions, MWPToolkit's split.

One raw row of LLM-Adapters' file:

    {"instruction": "Each bottle cap costs $ 2.00 . How much do 6 bottle caps cost ?", "input": "", "output": "", "answer": "12.0"}

The copy on the hub (MU-NLPC/Calc-mawps) has another split with 520 test questions: {"id", "question", "chain", "result", ...}.
Scores on the two are not comparable. 28 of the 238 questions are, nearly word for word, in the training data of LLM-Adapters.
"""

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import ParsedRow, Task
from graft.evaluation.tasks.sources import Hub


def convert(row: Row) -> ParsedRow:
    return ParsedRow(row["question"], row["result_float"] if "result_float" in row else row["result"])


TASK = Task("mawps", "number", convert, Hub("MU-NLPC/Calc-mawps", "test"))
