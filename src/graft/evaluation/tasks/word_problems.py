"""The format that sets of word problems share: the answer is a number and the question is the instruction.

AddSub, MultiArith and SingleEq were published in one raw format, that of the MAWPS repository (Koncel-Kedziorski et al. 2016):

    {"iIndex": 1, "sQuestion": "Joan found 70 seashells on the beach. ...", "lEquations": ["X=(70.0-27.0)"], "lSolutions": [43.0]}
"""

from __future__ import annotations

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import ParsedRow, Task
from graft.evaluation.tasks.sources import Hub


def repository_row(row: Row) -> ParsedRow:
    """Parse a raw row of the MAWPS repository."""
    return ParsedRow(row["sQuestion"], row["lSolutions"][0] if row["lSolutions"] else None)


def repository_set(name: str, hub: Hub | None = None) -> Task:
    """Define a set that was published only in the format of the MAWPS repository."""
    return Task(name, "number", repository_row, hub, files=(f"{name}/{name}.json", f"{name}.json"))
