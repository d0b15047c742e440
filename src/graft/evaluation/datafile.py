"""Evaluate a base and its adapters on a data file: each question is asked, each answer compared with the file's own.

Every contestant is asked with its own template, all of them in the same batches (`answering`); the loss on the file's own
answers stands beside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.bases.context import context_length
from graft.config.eval import EvalConfig
from graft.data.samples import Example, Message, Sample
from graft.data.sequences import Source, answer_example
from graft.data.tokenizing import tokenize
from graft.errors import GraftError, require
from graft.evaluation.answering import Item, Line, Progress, about, answer, conclude, judgement, questions
from graft.evaluation.answers import Metric, choose_metric, extract
from graft.evaluation.journal import Journal
from graft.evaluation.metrics import bleu, bleu_metric
from graft.evaluation.protocols.base import Judgement
from graft.evaluation.scoring import outcomes
from graft.evaluation.statistics import score_interval
from graft.generation.loaded import Candidate, LoadedModel
from graft.generation.loss import sample_losses
from graft.generation.requests import Decoding

UNLIMITED = 2**31


@dataclass(frozen=True)
class Evaluation:
    """Questions, and how answers to them are made and compared."""

    task: str
    samples: tuple[Sample, ...]
    """The rows, of which `items` are the questions."""
    items: tuple[Item, ...]
    metric: Metric
    decoding: Decoding
    token_budget: int
    train_on: Any = "completion"
    """What counts in the loss."""

    def protocol(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """Everything that a score depends on besides the models."""
        rows = json.dumps([[item.prompt, item.reference] for item in self.items])
        return {
            "name": "datafile",
            "metric": self.metric,
            "decoding": asdict(self.decoding),
            "data": hashlib.sha256(rows.encode()).hexdigest()[:16],
            "rows": len(self.items),
            "templates": sorted({candidate.template.digest[:16] for candidate in candidates}),
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
        items.append(Item(len(items) + 1, sample.source, sample.row, prompt, reference, expected))
    decoding = Decoding(max_new_tokens=config.max_new_tokens, beams=beams)
    return Evaluation(task, tuple(samples), tuple(items), metric, decoding, config.token_budget, train_on)


def _split(sample: Sample) -> tuple[tuple[Message, ...], str]:
    """The conversation before the last answer, and that answer."""
    if not sample.messages or sample.messages[-1]["role"] != "assistant" or not sample.messages[-1]["content"].strip():
        raise GraftError(f"{sample.where}: there is no answer to compare with")
    if len(sample.messages) < 2:
        raise GraftError(f"{sample.where}: there is no question, only a text")
    return sample.messages[:-1], sample.messages[-1]["content"]


def evaluate_data_file(
    loaded: LoadedModel,
    evaluation: Evaluation,
    out: Path | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    **facts: Any,
) -> dict[str, Any]:
    """Ask all contestants everything, in one pass, and count.

    out: folder for answers.jsonl (written while answers come, and continued) and result.json (at the end). overwrite: begin
    anew where there are answers. facts: what else the result is to say, as JSON values. Returns what result.json holds, and
    its folder.
    """
    head = about(
        loaded, evaluation.task, evaluation.protocol(loaded.candidates), protocol_hash(evaluation, loaded.candidates)
    )
    written = loaded.base.task == "seq2seq" and evaluation.metric == "exact"
    if written:
        require("sacrebleu", "eval")

    def judge(item: Item, text: str) -> Judgement:
        extracted = extract(text, evaluation.metric)
        if extracted is None:
            return Judgement(None, "unextractable")
        return Judgement(extracted, "correct" if extracted == item.expected else "wrong")

    with Journal(out, head, questions(evaluation.items), overwrite=overwrite) as journal:
        checked = answer(
            loaded, evaluation.items, judge, evaluation.decoding, journal,
            token_budget=evaluation.token_budget, progress=progress,
        )  # fmt: skip
        losses = _losses(loaded, evaluation)

        def score(candidate: Candidate, lines: list[Line]) -> dict[str, Any]:
            shares = outcomes([judgement(line) for line in lines])
            return {**shares, **(_bleu(lines) if written else {}), **losses[candidate.name]}

        return conclude(loaded, evaluation.items, head, journal, score, self_checked=checked, **facts)


def protocol_hash(evaluation: Evaluation, candidates: Sequence[Candidate]) -> str:
    """Twelve digits that name the protocol."""
    text = json.dumps(evaluation.protocol(candidates), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _bleu(lines: Sequence[Line]) -> dict[str, Any]:
    """BLEU of the answers as a whole, as the protocol of that name counts it, beside the share that is exactly right."""
    texts, right = [line["answer"].strip() for line in lines], [line["reference"] for line in lines]
    interval = score_interval(bleu(texts, [(each,) for each in right]), len(texts)) if len(texts) > 1 else None
    score = bleu_metric().corpus_score(texts, [right]).score
    return {"text_bleu": score, "text_bleu_interval": None if interval is None else list(interval)}


def _losses(loaded: LoadedModel, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Mean loss per supervised token of each contestant, over the samples that fit into its context."""
    examples: list[Example] = []
    adapters: list[str | None] = []
    rows_of: dict[str, range] = {}
    for candidate in loaded.candidates:
        start = len(examples)
        examples += _examples(loaded, evaluation, candidate)
        rows_of[candidate.name] = range(start, len(examples))
        adapters += [candidate.adapter] * len(rows_of[candidate.name])
    losses = sample_losses(loaded.base.model, examples, adapters, token_budget=evaluation.token_budget)
    found = {}
    for name, rows in rows_of.items():
        targets = sum(examples[row].num_targets for row in rows)
        loss = sum(losses[row] for row in rows) / targets if targets else None
        found[name] = {"loss": loss, "loss_tokens": targets, "loss_samples": len(rows)}
    return found


def _examples(loaded: LoadedModel, evaluation: Evaluation, candidate: Candidate) -> list[Example]:
    """The samples as training would see them, but for those that do not fit into the context."""
    room = context_length(loaded.base.model, candidate.adapter) or UNLIMITED
    tokenizer, template = loaded.base.tokenizer, candidate.template
    if isinstance(template, Source):
        made = [answer_example(sample, tokenizer, template, UNLIMITED, "drop") for sample in evaluation.samples]
        return [one for one in made if isinstance(one, Example) and max(one.widths) <= room]
    tokenized = [
        tokenize(sample, tokenizer, template, max_length=room, overlong="drop", train_on=evaluation.train_on)
        for sample in evaluation.samples
    ]
    return [one for one in tokenized if isinstance(one, Example)]
