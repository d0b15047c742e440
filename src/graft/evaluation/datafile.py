"""Evaluate a base and its adapters on a data file: each question is asked, each answer compared with the file's own.

Every contestant is asked with its own template, all of them in the same batches. An answer has one outcome: correct, wrong,
unextractable (nothing in it to compare) or no_room (the prompt fills the context; it is not cut); all but the first count as
not correct. `truncated` says besides how many answers met the limit of tokens before they ended.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.bases.context import context_length
from graft.config.schema import EvalConfig
from graft.data.samples import Example, Message, Sample
from graft.data.tokenizing import tokenize
from graft.errors import GraftError
from graft.evaluation.answers import Metric, choose_metric, extract
from graft.evaluation.contestants import Bench, Contestant
from graft.evaluation.generation import generate
from graft.evaluation.loss import sample_losses
from graft.evaluation.requests import Decoding, Generated, Request
from graft.evaluation.selfcheck import self_check
from graft.evaluation.statistics import wilson
from graft.files import explained, write_json_atomic
from graft.jsonl import JsonLines

Progress = Callable[[int, int], None]
UNLIMITED = 2**31


@dataclass(frozen=True)
class Item:
    """One question with the answer that it should get."""

    sample: Sample
    prompt: tuple[Message, ...]
    reference: str
    expected: str
    """What of the reference is compared."""


@dataclass(frozen=True)
class Evaluation:
    """Questions, and how answers to them are made and compared."""

    task: str
    items: tuple[Item, ...]
    metric: Metric
    decoding: Decoding
    token_budget: int
    train_on: Any = "completion"
    """What counts in the loss."""

    def protocol(self, contestants: Sequence[Contestant]) -> dict[str, Any]:
        """Everything that a score depends on besides the models."""
        rows = json.dumps([[item.prompt, item.reference] for item in self.items])
        return {
            "name": "datafile",
            "metric": self.metric,
            "decoding": asdict(self.decoding),
            "data": hashlib.sha256(rows.encode()).hexdigest()[:16],
            "rows": len(self.items),
            "templates": sorted({contestant.template.digest[:16] for contestant in contestants}),
            "loss_on": self.train_on,
        }


def evaluation_of(
    task: str,
    samples: Sequence[Sample],
    config: EvalConfig,
    golds: Sequence[str] | None = None,
    *,
    train_on: str = "completion",
    beams: int = 1,
) -> Evaluation:
    """Turn rows into questions with expected answers; `golds` are these where they are not the rows' own last answers.

    Raises `GraftError`, naming the row, for one without a question or an answer.
    """
    samples = samples[: config.limit]
    pairs = [_split(sample) for sample in samples]
    if golds is not None:
        pairs = [(prompt, gold) for (prompt, _), gold in zip(pairs, golds, strict=False)]
    metric = choose_metric(config.metric, [reference for _, reference in pairs])
    items = []
    for sample, (prompt, reference) in zip(samples, pairs, strict=True):
        expected = extract(reference, metric)
        if expected is None:
            raise GraftError(
                f"{sample.where}: there is no number in its answer, {reference[:60]!r}; set eval.metric: exact"
            )
        items.append(Item(sample, prompt, reference, expected))
    decoding = Decoding(max_new_tokens=config.max_new_tokens, beams=beams)
    return Evaluation(task, tuple(items), metric, decoding, config.token_budget, train_on)


def _split(sample: Sample) -> tuple[tuple[Message, ...], str]:
    """The conversation before the last answer, and that answer."""
    if not sample.messages or sample.messages[-1]["role"] != "assistant" or not sample.messages[-1]["content"].strip():
        raise GraftError(f"{sample.where}: there is no answer to compare with")
    if len(sample.messages) < 2:
        raise GraftError(f"{sample.where}: there is no question, only a text")
    return sample.messages[:-1], sample.messages[-1]["content"]


def evaluate_bench(
    bench: Bench, evaluation: Evaluation, out: Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Ask all contestants everything, in one pass, and count.

    out: folder for answers.jsonl (written while answers come) and result.json (at the end). Returns what result.json holds.
    """
    start = time.perf_counter()
    pairs = [(contestant, item) for item in evaluation.items for contestant in bench.contestants]
    requests = [_request(bench, contestant, item) for contestant, item in pairs]
    checked = self_check(bench.base.model, requests, token_budget=evaluation.token_budget)
    lines = _Answers(out)
    answers: list[dict[str, Any]] = [{} for _ in pairs]
    found = generate(bench.base.model, requests, evaluation.decoding, token_budget=evaluation.token_budget)
    for done, (number, generated) in enumerate(found, start=1):
        contestant, item = pairs[number]
        answers[number] = _judged(bench, evaluation, contestant, item, requests[number], generated)
        lines.append(answers[number])
        if progress is not None:
            progress(done, len(pairs))
    losses = _losses(bench, evaluation)
    results = []
    for place, contestant in enumerate(bench.contestants):
        own = answers[place :: len(bench.contestants)]
        results.append({**_described(contestant), **_counted(own), **losses[contestant.name]})
    result = {
        "task": evaluation.task,
        "protocol": evaluation.protocol(bench.contestants),
        "protocol_hash": protocol_hash(evaluation, bench.contestants),
        "base": bench.base.identity,
        "dtype": str(bench.base.dtype).removeprefix("torch."),
        "self_checked": checked,
        "seconds": round(time.perf_counter() - start, 3),
        "results": results,
    }
    if out is not None:
        write_json_atomic(out / "result.json", result)
    return result


def protocol_hash(evaluation: Evaluation, contestants: Sequence[Contestant]) -> str:
    """Twelve digits that name the protocol."""
    text = json.dumps(evaluation.protocol(contestants), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _request(bench: Bench, contestant: Contestant, item: Item) -> Request:
    tokenizer, template = bench.base.tokenizer, contestant.template
    try:
        ids = template.prompt_ids(item.prompt, tokenizer)
    except GraftError as error:
        raise GraftError(f"{item.sample.where}: {error}") from error
    return Request(tuple(ids), contestant.adapter, frozenset(template.stop_ids(tokenizer)))


def _judged(
    bench: Bench, evaluation: Evaluation, contestant: Contestant, item: Item, request: Request, generated: Generated
) -> dict[str, Any]:
    """One line of answers.jsonl."""
    text = bench.base.tokenizer.decode(generated.ids, skip_special_tokens=True)
    extracted = extract(text, evaluation.metric)
    if generated.reason == "no_room":
        outcome = "no_room"
    elif extracted is None:
        outcome = "unextractable"
    else:
        outcome = "correct" if extracted == item.expected else "wrong"
    return {
        "contestant": contestant.name,
        "source": item.sample.source,
        "row": item.sample.row,
        "question": item.prompt[-1]["content"],
        "reference": item.reference,
        "expected": item.expected,
        "answer": text,
        "extracted": extracted,
        "outcome": outcome,
        "ended": generated.reason,
        "prompt_tokens": len(request.ids),
        "tokens": len(generated.ids),
    }


def _counted(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total = len(answers)
    outcomes = {name: 0 for name in ("correct", "wrong", "unextractable", "no_room")}
    for answer in answers:
        outcomes[answer["outcome"]] += 1
    correct = outcomes["correct"]
    return {
        "total": total,
        **outcomes,
        "truncated": sum(answer["ended"] == "truncated" for answer in answers),
        "accuracy": correct / total,
        "interval": list(wilson(correct, total)),
        "stop_rate": sum(answer["ended"] == "stopped" for answer in answers) / total,
        "tokens": sum(answer["tokens"] for answer in answers),
    }


def _described(contestant: Contestant) -> dict[str, Any]:
    return {
        "name": contestant.name,
        "folder": None if contestant.folder is None else str(contestant.folder),
        "digest": contestant.digest,
        "template": {"name": contestant.template.name, "digest": contestant.template.digest[:16]},
    }


def _losses(bench: Bench, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Mean loss per supervised token of each contestant, over the samples that fit into its context."""
    examples: list[Example] = []
    adapters: list[str | None] = []
    rows_of: dict[str, range] = {}
    for contestant in bench.contestants:
        start = len(examples)
        examples += _examples(bench, evaluation, contestant)
        rows_of[contestant.name] = range(start, len(examples))
        adapters += [contestant.adapter] * len(rows_of[contestant.name])
    losses = sample_losses(bench.base.model, examples, adapters, token_budget=evaluation.token_budget)
    found = {}
    for name, rows in rows_of.items():
        targets = sum(int(examples[row].supervised.sum()) for row in rows)
        loss = sum(losses[row] for row in rows) / targets if targets else None
        found[name] = {"loss": loss, "loss_tokens": targets, "loss_samples": len(rows)}
    return found


def _examples(bench: Bench, evaluation: Evaluation, contestant: Contestant) -> list[Example]:
    """The samples as training would see them, but for those that do not fit into the context."""
    room = context_length(bench.base.model, contestant.adapter)
    tokenized = [
        tokenize(
            item.sample,
            bench.base.tokenizer,
            contestant.template,
            max_length=room or UNLIMITED,
            overlong="drop",
            train_on=evaluation.train_on,
        )
        for item in evaluation.items
    ]
    return [one for one in tokenized if isinstance(one, Example)]


class _Answers:
    """answers.jsonl, begun anew."""

    def __init__(self, folder: Path | None) -> None:
        self.lines = None if folder is None else JsonLines(folder / "answers.jsonl")
        if folder is not None:
            with explained(folder):
                folder.mkdir(parents=True, exist_ok=True)
                for name in ("answers.jsonl", "result.json"):
                    (folder / name).unlink(missing_ok=True)

    def append(self, record: dict[str, Any]) -> None:
        if self.lines is not None:
            self.lines.append(record)
