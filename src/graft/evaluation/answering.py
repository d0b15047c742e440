"""Ask all candidates all questions, judge their answers, keep them and score them. Data files and benchmarks share this.

All candidates are asked in the same batches. A line of answers.jsonl is one answer with its outcome:

- correct or wrong;
- unextractable: the answer holds nothing to compare;
- no_room: the prompt fills the context (prompts are never truncated).

Everything except `correct` counts as not correct. `ended` says whether a stop token ended the answer (stopped) or it reached
the limit of tokens (truncated).
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
from graft.evaluation.protocols.base import Judgement, digest_of
from graft.evaluation.reading.thoughts import with_thoughts
from graft.generation.loaded import Candidate, LoadedModel
from graft.generation.prompts import request_of
from graft.generation.requests import Decoding, Generated, Request

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Item:
    """One question with its right answer."""

    number: int
    """Number of the question in this evaluation, from 1."""
    source: str
    row: int
    """Row in the source, from 1."""
    prompt: tuple[Message, ...]
    reference: str
    expected: str
    """The part of the reference that answers are compared with, for example its last number."""
    references: tuple[str, ...] = ()
    """All right texts, if answers are free text."""

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
    """Generate and judge the answers that the journal lacks; return the number of prompts that the self-check compared.

    prompt: the template for all candidates; None: each candidate's own template.
    Raises `GraftError`, naming the row, for a question that a template cannot write.
    """
    pairs = [(candidate, item) for item in items for candidate in loaded.candidates]
    with loaded.group.agreed():
        requests = [_request(loaded, prompt or who.template, who.adapter, item) for who, item in pairs]
        checked = loaded.active_engine.check(requests, token_budget)
        # Answers that an earlier, interrupted evaluation left in the journal are not generated again.
        left = [at for at, (who, item) in enumerate(pairs) if (who.name, item.number) not in journal.answers]
        if progress is not None:
            progress(len(pairs) - len(left), len(pairs))
        for place, generated in loaded.active_engine.answers([requests[at] for at in left], decoding, token_budget):
            candidate, item = pairs[left[place]]
            text = with_thoughts(loaded.base.tokenizer, requests[left[place]].ids, generated.ids)
            judged = Judgement(None, "no_room") if generated.reason == "no_room" else judge(item, text)
            done = journal.append(answer_line(candidate, item, text, judged, requests[left[place]], generated))
            if progress is not None:
                progress(done, len(pairs))
    journal.complete()
    return checked


def answer_line(
    candidate: Candidate,
    item: Item,
    text: str,
    judged: Judgement,
    request: Request | None,
    generated: Generated | None,
) -> Line:
    """Return one line of answers.jsonl. request, generated: None if nothing was generated, as in ranking by likelihood."""
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
        "prompt_tokens": request.tokens if request is not None else None,
        "tokens": len(generated.ids) if generated is not None else 0,
    }


def judgement(line: Line) -> Judgement:
    """Return the judgement that a line of answers.jsonl holds."""
    return Judgement(line["extracted"], line["outcome"])


def questions(items: Sequence[Item]) -> Questions:
    """Return the questions as a journal compares them with those of its saved answers."""
    return [(item.question, item.expected) for item in items]


def describe_evaluation(
    loaded: LoadedModel,
    task: str,
    protocol: dict[str, Any],
    protocol_hash: str | None = None,
    prompt: Template | None = None,
) -> dict[str, Any]:
    """Return what the answers belong to, as JSON values: task, protocol, base and candidates.

    protocol_hash: None is the hash of `protocol`. prompt: as in `answer`.
    """
    return {
        "task": task,
        "protocol": protocol,
        "protocol_hash": protocol_hash or digest_of(protocol),
        "base": loaded.base.identity,
        "dtype": str(loaded.base.dtype).removeprefix("torch."),
        "engine": loaded.active_engine.name,
        "contestants": {each.name: _described(each, prompt) for each in loaded.candidates},
    }


def _described(candidate: Candidate, prompt: Template | None) -> dict[str, Any]:
    """Describe a candidate: its weights, its template, the settings of its adapter, and how it was trained."""
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


def write_result(
    loaded: LoadedModel,
    items: Sequence[Item],
    header: Mapping[str, Any],
    journal: Journal,
    score: Callable[[Candidate, list[Line]], dict[str, Any]],
    **facts: Any,
) -> dict[str, Any]:
    """Score the answers of each candidate and write result.json, if the journal has a folder.

    header: from `describe_evaluation`. score: (candidate, its answers in the order of `items`) -> its scores. facts: further
    entries of the result. Returns the content of result.json and, under `folder`, its folder.
    """
    group, result = loaded.group, {}
    with group.agreed():
        if group.leads:
            results = []
            for candidate in loaded.candidates:
                lines = [journal.answers[candidate.name, item.number] for item in items]
                results.append(
                    {**header["contestants"][candidate.name], **score(candidate, lines), **_answer_statistics(lines)}
                )
            result = {
                **{key: value for key, value in header.items() if key != "contestants"},
                **facts,
                "continued_from": journal.kept,
                "seconds": round(journal.seconds, 3),
                "results": results,
            }
            journal.finish(result)
    return {**group.tell(result), "folder": None if journal.folder is None else str(journal.folder)}


def _answer_statistics(lines: Sequence[Line]) -> dict[str, Any]:
    """Count how the answers ended and their tokens. Returns nothing if no answer was generated."""
    if all(line["ended"] is None and line["prompt_tokens"] is None for line in lines):
        return {}
    return {
        "truncated": sum(line["ended"] == "truncated" for line in lines),
        "stop_rate": sum(line["ended"] == "stopped" for line in lines) / len(lines),
        "tokens": sum(line["tokens"] for line in lines),
    }


def _request(loaded: LoadedModel, template: Template, adapter: str | None, item: Item) -> Request:
    try:
        return request_of(loaded.base, template, adapter, item.prompt)
    except GraftError as error:
        raise GraftError(f"{item.source}, row {item.row}: {error}") from error


def result_folder(out: Path | None, task: str, protocol_hash: str) -> Path | None:
    """Return the folder of one evaluation in a folder of results."""
    return None if out is None else out / f"{task}.{protocol_hash}"
