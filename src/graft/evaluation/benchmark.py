"""Evaluate a base and its adapters on one benchmark under one protocol.

A protocol either judges what contestants write (`answering`) or ranks the choices by their likelihood (`likelihood`). The
protocol fixes prompt, decoding and rules; a protocol without a prompt of its own asks everyone by their own template.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.data.samples import Message
from graft.evaluation.answering import (
    Item,
    Progress,
    about,
    answer,
    described,
    folder_of,
    judgement,
    line_of,
    produced,
    questions,
)
from graft.evaluation.contestants import Bench, Contestant
from graft.evaluation.journal import RESULT, Journal
from graft.evaluation.likelihood import log_likelihoods
from graft.evaluation.protocols import Judgement, OutputProtocol, RankProtocol
from graft.evaluation.scoring import Output, needed, ranked, summary
from graft.evaluation.tasks import Record, Task
from graft.files import write_json_atomic

AT_ONCE = 64
"""Questions that are ranked between two writes of answers.jsonl."""


def evaluate_task(
    bench: Bench,
    task: Task,
    protocol: OutputProtocol | RankProtocol,
    records: Sequence[Record],
    out: Path | None = None,
    *,
    token_budget: int = 8192,
    progress: Progress | None = None,
    overwrite: bool = False,
    overlap: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Ask all contestants all records, in the same batches, and score them.

    out: folder of results; answers.jsonl and result.json go to <task>.<protocol hash> in it, where an interrupted evaluation
    goes on. overlap: of the questions with the training data, where it is known; kept in the result.
    Returns what result.json holds, and its folder.
    """
    start = time.perf_counter()
    needed(task)
    prompt = protocol.prompt if isinstance(protocol, OutputProtocol) else None
    folder = folder_of(out, task.name, protocol.digest(task))
    head = about(bench, task.name, protocol.content(task), protocol.digest(task), prompt)
    items = [_item(protocol, number, record) for number, record in enumerate(records, start=1)]
    journal = Journal(folder, head, questions(items), overwrite=overwrite)
    checked = None
    if isinstance(protocol, RankProtocol):
        _rank(bench, task, protocol, records, items, journal, token_budget, progress)
    else:

        def judge(item: Item, text: str) -> Judgement:
            return protocol.judge(task, records[item.number - 1].gold, text)

        checked = answer(
            bench, items, judge, protocol.decoding(task), journal,
            prompt=prompt, token_budget=token_budget, progress=progress,
        )  # fmt: skip
    results = []
    for contestant in bench.contestants:
        lines = [journal.answers[contestant.name, item.number] for item in items]
        results.append({**described(contestant, prompt), **_scored(task, protocol, records, lines), **produced(lines)})
    result = {
        **{key: value for key, value in head.items() if key != "contestants"},
        "source": records[0].source,
        "overlap": overlap,
        "self_checked": checked,
        "continued_from": journal.kept,
        "seconds": round(time.perf_counter() - start, 3),
        "results": results,
    }
    if folder is not None:
        write_json_atomic(folder / RESULT, result)
    return {**result, "folder": None if folder is None else str(folder)}


def _item(protocol: OutputProtocol | RankProtocol, number: int, record: Record) -> Item:
    asked: tuple[Message, ...] = ({"role": "user", "content": record.instruction},)
    prompt = protocol.messages(record) if isinstance(protocol, OutputProtocol) else asked
    return Item(number, record.source, record.row, prompt, record.gold, record.gold)


def _scored(
    task: Task, protocol: OutputProtocol | RankProtocol, records: Sequence[Record], lines: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    if isinstance(protocol, RankProtocol):
        return ranked(
            [protocol.rank(task, *pair) for pair in zip(records, (line["likelihoods"] for line in lines), strict=True)]
        )
    outputs = [
        Output(line["answer"], record.gold, record.references) for line, record in zip(lines, records, strict=True)
    ]
    return summary(task, outputs, [judgement(line) for line in lines])


def _rank(
    bench: Bench,
    task: Task,
    protocol: RankProtocol,
    records: Sequence[Record],
    items: Sequence[Item],
    journal: Journal,
    token_budget: int,
    progress: Progress | None,
) -> None:
    """Fill the journal with the likelihoods of the choices."""
    pairs = [(contestant, item) for item in items for contestant in bench.contestants]
    left = [(who, item) for who, item in pairs if (who.name, item.number) not in journal.answers]
    for begin in range(0, len(left), AT_ONCE):
        some = left[begin : begin + AT_ONCE]
        for (contestant, item), values in zip(
            some, _likelihoods(bench, task, protocol, records, some, token_budget), strict=True
        ):
            record = records[item.number - 1]
            ranking = protocol.rank(task, record, values)
            chosen = ranking.raw.extracted
            text = record.choices[task.labels.index(chosen)] if chosen is not None else ""
            line = line_of(contestant, item, text, ranking.raw, None, None)
            normalised = {"extracted": ranking.normalised.extracted, "outcome": ranking.normalised.outcome}
            journal.append({**line, "normalised": normalised, "likelihoods": values})
        if progress is not None:
            progress(len(pairs) - len(left) + begin + len(some), len(pairs))
    journal.sync()


def _likelihoods(
    bench: Bench,
    task: Task,
    protocol: RankProtocol,
    records: Sequence[Record],
    asked: Sequence[tuple[Contestant, Item]],
    token_budget: int,
) -> list[list[float | None]]:
    """Of each choice of each question."""
    wanted = [protocol.continuations(task, records[item.number - 1]) for _, item in asked]
    texts = [(each.context, each.text) for choices in wanted for each in choices]
    adapters = [contestant.adapter for (contestant, _), choices in zip(asked, wanted, strict=True) for _ in choices]
    found = iter(log_likelihoods(bench.base.model, bench.base.tokenizer, texts, adapters, token_budget=token_budget))
    return [[next(found) for _ in choices] for choices in wanted]
