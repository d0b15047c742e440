"""GSM8K: grade school mathematics in two to eight steps (Cobbe et al. 2021, arXiv 2110.14168). 1,319 test questions.

One raw row (test.jsonl, and openai/gsm8k on the hub), with the final answer after ####:

    {"question": "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total does it take?",
     "answer": "It takes 2/2=<<2/2=1>>1 bolt of white fiber\\nSo the total amount of fabric is 2+1=<<2+1=3>>3 bolts of fabric\\n#### 3"}
"""

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import ParsedRow, Task
from graft.evaluation.tasks.sources import Hub


def convert(row: Row) -> ParsedRow:
    _, marked, answer = (row["answer"] or "").rpartition("#### ")
    return ParsedRow(row["question"], answer.replace(",", "") if marked else None)


TASK = Task(
    "gsm8k", "number", convert, Hub("openai/gsm8k", "test", "main"), files=("gsm8k/test.jsonl",)
)  # fmt: skip
