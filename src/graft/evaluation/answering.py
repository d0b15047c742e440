"""Ask every contestant every question, judge the answers, keep them, count them: what data files and benchmarks share.

All contestants are asked in the same batches. A line of answers.jsonl is one answer with its outcome: correct, wrong,
unextractable (nothing in it to compare) or no_room (the prompt fills the context; it is not cut); all but the first count as
not correct. `ended` says besides whether the answer ended itself, or met the limit of tokens (truncated).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.data.samples import Message
from graft.data.template import Template
from graft.errors import GraftError
from graft.evaluation.journal import Journal, Questions
from graft.evaluation.protocols.base import Judgement
from graft.generation.loaded import Candidate, LoadedModel
from graft.generation.requests import Decoding, Generated, Request

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Item:
    """One question with the answer that it should get."""

    number: int
    """Its place among those that are asked, from 1."""
    source: str
    row: int
    """Row in the source, from 1."""
    prompt: tuple[Message, ...]
    reference: str
    expected: str
    """What of the reference is compared."""
    references: tuple[str, ...] = ()
    """All right texts, where answers are free text."""

    @property
    def question(self) -> str:
        return self.prompt[-1]["content"]


Judge = Callable[[Item, str], Judgement]
Line = dict[str, Any]
"""One line of answers.jsonl."""


def answer(
    loaded: LoadedModel,
    items: Sequence[Item],
    judge: Judge,
    decoding: Decoding,
    journal: Journal,
    *,
    prompt: Template | None = None,
    token_budget: int,
    progress: Progress | None = None,
) -> int:
    """Fill the journal with what it lacks; returns on how many prompts the self-check was made.

    prompt: how questions are written out for everyone; None: by each contestant's own template.
    Raises `GraftError`, naming the row, for a question that a template cannot write.
    """
    pairs = [(candidate, item) for item in items for candidate in loaded.candidates]
    requests = [_request(loaded, prompt or candidate.template, candidate.adapter, item) for candidate, item in pairs]
    checked = loaded.active_engine.check(requests, token_budget)
    left = [at for at, (who, item) in enumerate(pairs) if (who.name, item.number) not in journal.answers]
    done = len(pairs) - len(left)
    if progress is not None:
        progress(done, len(pairs))
    for place, generated in loaded.active_engine.answers([requests[at] for at in left], decoding, token_budget):
        candidate, item = pairs[left[place]]
        text = loaded.base.tokenizer.decode(generated.ids, skip_special_tokens=True)
        judged = Judgement(None, "no_room") if generated.reason == "no_room" else judge(item, text)
        journal.append(line_of(candidate, item, text, judged, requests[left[place]], generated))
        done += 1
        if progress is not None:
            progress(done, len(pairs))
    journal.sync()
    return checked


def line_of(
    candidate: Candidate,
    item: Item,
    text: str,
    judged: Judgement,
    request: Request | None,
    generated: Generated | None,
) -> Line:
    """One line of answers.jsonl. Without a request: chosen by likelihood, where nothing is generated."""
    return {
        "contestant": candidate.name,
        "number": item.number,
        "source": item.source,
        "row": item.row,
        "question": item.question,
        "reference": item.reference,
        "expected": item.expected,
        **({"references": list(item.references)} if item.references else {}),
        "answer": text,
        "extracted": judged.extracted,
        "outcome": judged.outcome,
        "ended": generated.reason if generated is not None else None,
        "prompt_tokens": len(request.ids) if request is not None else None,
        "tokens": len(generated.ids) if generated is not None else 0,
    }


def judgement(line: Line) -> Judgement:
    """The judgement that a line of answers.jsonl holds."""
    return Judgement(line["extracted"], line["outcome"])


def questions(items: Sequence[Item]) -> Questions:
    """What a journal is compared with."""
    return [(item.question, item.expected) for item in items]


def about(
    loaded: LoadedModel, task: str, protocol: dict[str, Any], protocol_hash: str, prompt: Template | None = None
) -> dict[str, Any]:
    """What answers belong to, as JSON values. prompt: as in `answer`."""
    return {
        "task": task,
        "protocol": protocol,
        "protocol_hash": protocol_hash,
        "base": loaded.base.identity,
        "dtype": str(loaded.base.dtype).removeprefix("torch."),
        "engine": loaded.active_engine.name,
        "contestants": {each.name: _described(each, prompt) for each in loaded.candidates},
    }


def _described(candidate: Candidate, prompt: Template | None) -> dict[str, Any]:
    """Who a contestant is, with all that made it so: what its adapter is, and how the run that it comes from trained it."""
    template = prompt or candidate.template
    return {
        "name": candidate.name,
        "folder": None if candidate.folder is None else str(candidate.folder),
        "digest": candidate.digest,
        "template": {"name": template.name, "digest": template.digest[:16]},
        "adapter": candidate.settings,
        "trained": None
        if candidate.trained is None
        else candidate.trained.model_dump(mode="json", include={"data", "train"}),
    }


def conclude(
    loaded: LoadedModel,
    items: Sequence[Item],
    head: Mapping[str, Any],
    journal: Journal,
    score: Callable[[Candidate, list[Line]], dict[str, Any]],
    **facts: Any,
) -> dict[str, Any]:
    """The end of an evaluation: score each contestant's answers and write result.json, where there is a folder.

    head: as `about` makes it. score: (contestant, its answers in the order of `items`) -> its scores. facts: what else the
    result says. Returns what result.json holds, and its folder.
    """
    results = []
    for candidate in loaded.candidates:
        lines = [journal.answers[candidate.name, item.number] for item in items]
        results.append({**head["contestants"][candidate.name], **score(candidate, lines), **_produced(lines)})
    result = {
        **{key: value for key, value in head.items() if key != "contestants"},
        **facts,
        "continued_from": journal.kept,
        "seconds": round(journal.seconds, 3),
        "results": results,
    }
    journal.finish(result)
    return {**result, "folder": None if journal.folder is None else str(journal.folder)}


def _produced(lines: Sequence[Line]) -> dict[str, Any]:
    """How the answers ended and how long they were; nothing where none was generated."""
    if all(line["ended"] is None and line["prompt_tokens"] is None for line in lines):
        return {}
    return {
        "truncated": sum(line["ended"] == "truncated" for line in lines),
        "stop_rate": sum(line["ended"] == "stopped" for line in lines) / len(lines),
        "tokens": sum(line["tokens"] for line in lines),
    }


def _request(loaded: LoadedModel, template: Template, adapter: str | None, item: Item) -> Request:
    tokenizer = loaded.base.tokenizer
    try:
        ids = template.prompt_ids(item.prompt, tokenizer)
    except GraftError as error:
        raise GraftError(f"{item.source}, row {item.row}: {error}") from error
    return Request(tuple(ids), adapter, frozenset(template.stop_ids(tokenizer)))


def folder_of(out: Path | None, task: str, protocol_hash: str) -> Path | None:
    """Where an evaluation lies below a folder of results."""
    return None if out is None else out / f"{task}.{protocol_hash}"
