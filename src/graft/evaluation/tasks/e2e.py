"""E2E NLG: write a sentence that states a list of facts about a restaurant (Novikova et al. 2017, arXiv 1706.09254).

One raw row (testset_w_refs.csv). The 4,693 rows of the test set are references for 630 meaning representations:

    "mr","ref"
    "name[Blue Spice], eatType[coffee shop], area[city centre]","A coffee shop in the city centre area called Blue Spice."

Rows with all references of one meaning, {"mr": .., "refs": [..]}, can be read too. So can rows with a column `context`, the
form in which the authors of LoRA trained: "name : Blue Spice | Type : coffee shop | area : city centre".
"""

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import ParsedRow, Task
from graft.evaluation.tasks.sources import Hub

_MEANINGS = ("mr", "context", "meaning_representation")
_REFERENCES = ("refs", "ref", "human_reference")


def convert(row: Row) -> ParsedRow:
    meaning = next(row[name] for name in _MEANINGS if name in row)
    given = next(row[name] for name in _REFERENCES if name in row)
    references = tuple(given) if isinstance(given, list) else (given,)
    return ParsedRow(meaning, references[0], references=references)


TASK = Task(
    "e2e", "text", convert, Hub("tuetschek/e2e_nlg", "test", revision="refs/convert/parquet"),
    files=("e2e/testset_w_refs.csv", "e2e_nlg/testset_w_refs.csv", "e2e_nlg/test_grouped.jsonl"),
)  # fmt: skip
