"""Evaluate a base and its adapters on one benchmark under one protocol.

A protocol either judges the answers that the candidates generate (`answering`) or ranks the choices of a question by their
likelihood (`ranking`). It fixes the prompt, the decoding and the rules. If it has no prompt, each candidate's own template
is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.data.samples import Message
from graft.evaluation.answering import (
    Item,
    Line,
    Progress,
    answer,
    describe_evaluation,
    judgement,
    questions,
    result_folder,
    write_result,
)
from graft.evaluation.journal import Journal
from graft.evaluation.protocols import Judgement, OutputProtocol, RankProtocol
from graft.evaluation.ranking import rank_choices
from graft.evaluation.scoring import Output, majority, require_libraries, score_rankings, summary
from graft.evaluation.tasks import Record, Task
from graft.generation.loaded import Candidate, LoadedModel


def evaluate_task(
    loaded: LoadedModel,
    task: Task,
    protocol: OutputProtocol | RankProtocol,
    records: Sequence[Record],
    out: Path | None = None,
    *,
    token_budget: int = 8192,
    progress: Progress | None = None,
    overwrite: bool = False,
    **facts: Any,
) -> dict[str, Any]:
    """Ask all candidates the questions of a benchmark, in the same batches, and score their answers.

    out: folder of results; answers.jsonl and result.json are written to <task>.<protocol hash> in it, and an interrupted
    evaluation continues there. None: nothing is written. facts: further entries of the result, as JSON values.
    Returns the content of result.json and, under `folder`, its folder.
    """
    require_libraries(task)
    prompt = protocol.prompt if isinstance(protocol, OutputProtocol) else None
    header = describe_evaluation(loaded, task.name, protocol.content(task), protocol.digest(task), prompt)
    items = [_item(protocol, number, record) for number, record in enumerate(records, start=1)]

    def judge(item: Item, text: str) -> Judgement:
        assert isinstance(protocol, OutputProtocol)
        return protocol.judge(task, records[item.number - 1].gold, text)

    def score(candidate: Candidate, lines: list[Line]) -> dict[str, Any]:
        return _score(task, protocol, records, lines)

    with Journal(
        result_folder(out, task.name, protocol.digest(task)),
        header,
        questions(items),
        overwrite=overwrite,
        group=loaded.group,
    ) as journal:
        if isinstance(protocol, RankProtocol):
            checked = rank_choices(
                loaded, task, protocol, records, items, journal, token_budget=token_budget, progress=progress
            )
        else:
            checked = answer(
                loaded, items, judge, protocol.decoding(task), journal,
                prompt=prompt, token_budget=token_budget, progress=progress,
            )  # fmt: skip
        if task.answer == "class":
            facts["majority"] = majority([record.gold for record in records])
        return write_result(
            loaded, items, header, journal, score, source=records[0].source, self_checked=checked, **facts
        )


def _item(protocol: OutputProtocol | RankProtocol, number: int, record: Record) -> Item:
    asked: tuple[Message, ...] = ({"role": "user", "content": record.instruction},)
    prompt = protocol.messages(record) if isinstance(protocol, OutputProtocol) else asked
    return Item(number, record.source, record.row, prompt, record.gold, record.gold, record.references)


def _score(
    task: Task, protocol: OutputProtocol | RankProtocol, records: Sequence[Record], lines: Sequence[Line]
) -> dict[str, Any]:
    """Score the answers of one candidate."""
    if isinstance(protocol, RankProtocol):
        return score_rankings(
            [protocol.rank(task, *pair) for pair in zip(records, (line["likelihoods"] for line in lines), strict=True)]
        )
    outputs = [
        Output(line["answer"], record.gold, record.references) for line, record in zip(lines, records, strict=True)
    ]
    return summary(task, outputs, [judgement(line) for line in lines])
