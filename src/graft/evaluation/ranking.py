"""Answer the questions of a benchmark by ranking their choices by likelihood, instead of generating text.

Questions, answers and scores are kept as in `answering`. A line of answers.jsonl also holds the log-likelihoods.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graft.data.samples import Example
from graft.evaluation.answering import Item, Line, Progress, answer_line
from graft.evaluation.journal import Journal
from graft.evaluation.protocols import RankProtocol
from graft.evaluation.tasks import Record, Task
from graft.generation.likelihood import likelihoods, tokenize_pairs
from graft.generation.loaded import Candidate, LoadedModel
from graft.generation.selfcheck import likelihood_check

AT_ONCE = 64
"""Questions that are ranked in one go; their answers are written before the next ones are ranked."""


def rank_choices(
    loaded: LoadedModel,
    task: Task,
    protocol: RankProtocol,
    records: Sequence[Record],
    items: Sequence[Item],
    journal: Journal,
    *,
    token_budget: int,
    progress: Progress | None = None,
) -> int:
    """Rank the choices of the questions that the journal lacks; return the number of questions that the self-check compared.

    Raises `GraftError`, before anything is ranked, for a record with choices that cannot be ranked.
    """
    pairs = [(candidate, item) for item in items for candidate in loaded.candidates]
    with loaded.group.agreed():
        choices = [_choices(loaded, task, protocol, record) for record in records]
        checked = likelihood_check(
            loaded.base.model, [choices[item.number - 1] for _, item in pairs], [who.adapter for who, _ in pairs],
            token_budget=token_budget,
        )  # fmt: skip
        left = [(who, item) for who, item in pairs if (who.name, item.number) not in journal.answers]
        windows = [left[begin : begin + AT_ONCE] for begin in range(0, len(left), AT_ONCE)]
        for some in loaded.group.turns(windows):
            for line in _ranked(loaded, task, protocol, records, choices, some, token_budget):
                done = journal.append(line)
                if progress is not None:
                    progress(done, len(pairs))
    journal.complete()
    return checked


def _ranked(
    loaded: LoadedModel,
    task: Task,
    protocol: RankProtocol,
    records: Sequence[Record],
    choices: Sequence[Sequence[Example]],
    some: Sequence[tuple[Candidate, Item]],
    token_budget: int,
) -> Iterator[Line]:
    """Rank the choices of some questions; one line of answers.jsonl for each."""
    # One row per choice; the likelihoods come back in this order.
    examples = [example for _, item in some for example in choices[item.number - 1]]
    adapters = [who.adapter for who, item in some for _ in choices[item.number - 1]]
    found = iter(likelihoods(loaded.base.model, examples, adapters, token_budget=token_budget))
    for candidate, item in some:
        record = records[item.number - 1]
        values = [next(found) for _ in choices[item.number - 1]]
        ranking = protocol.rank(task, record, values)
        chosen = ranking.raw.extracted
        text = record.choices[task.labels.index(chosen)] if chosen is not None else ""
        line = answer_line(candidate, item, text, ranking.raw, None, None)
        normalised = {"extracted": ranking.normalised.extracted, "outcome": ranking.normalised.outcome}
        yield {**line, "normalised": normalised, "likelihoods": values}


def _choices(loaded: LoadedModel, task: Task, protocol: RankProtocol, record: Record) -> list[Example]:
    asked = protocol.continuations(task, record)
    return tokenize_pairs(loaded.base.tokenizer, [(each.context, each.text) for each in asked])
