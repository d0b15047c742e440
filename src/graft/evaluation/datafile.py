"""Evaluate a base and its adapters on a data file: ask its questions, and compare the answers with those in the file.

Each candidate is asked with its own template, and all in the same batches (`answering`). The result also holds the loss on
the file's answers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.bases.context import context_length
from graft.config.eval import EvalConfig
from graft.data.long_texts import shortened
from graft.data.samples import Example, Message, Rejected, Sample
from graft.data.seq2seq import EncoderTemplate, tokenize_seq2seq
from graft.data.tokenizing import tokenize
from graft.errors import GraftError, require
from graft.evaluation.answering import (
    Item,
    Line,
    Progress,
    answer,
    describe_evaluation,
    judgement,
    questions,
    write_result,
)
from graft.evaluation.answers import VERSION, Metric, choose_metric, extract
from graft.evaluation.free_text import bleu_scores, require_text_libraries, rouge_scores
from graft.evaluation.journal import Journal
from graft.evaluation.protocols.base import Judgement, digest_of
from graft.evaluation.scoring import count_outcomes
from graft.generation.loaded import Candidate, LoadedModel
from graft.generation.loss import sample_losses
from graft.generation.requests import Decoding

UNLIMITED = 2**31
"""Context length of a model that has no limit."""


@dataclass(frozen=True)
class Evaluation:
    """The questions of a data file, and how they are answered and judged."""

    task: str
    samples: tuple[Sample, ...]
    """The rows of the file; `items` are their questions."""
    items: tuple[Item, ...]
    metric: Metric
    decoding: Decoding
    token_budget: int
    train_on: Any = "completion"
    """The tokens that count in the loss, as in a run's `data.train_on`."""

    def protocol(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """Return everything besides the models that a score depends on."""
        rows = json.dumps([[item.prompt, item.reference] for item in self.items])
        return {
            "name": "datafile",
            "metric": self.metric,
            "version": VERSION,
            "decoding": asdict(self.decoding),
            "data": hashlib.sha256(rows.encode()).hexdigest()[:16],
            "rows": len(self.items),
            "templates": sorted({candidate.template.digest[:16] for candidate in candidates}),
            "loss_on": self.train_on,
        }

    def digest(self, candidates: Sequence[Candidate]) -> str:
        """Return twelve hexadecimal digits that identify the protocol."""
        return digest_of(self.protocol(candidates))


def make_evaluation(
    task: str,
    samples: Sequence[Sample],
    config: EvalConfig,
    golds: Sequence[str] | None = None,
    *,
    train_on: str = "completion",
    beams: int = 1,
) -> Evaluation:
    """Turn the rows of a data file into questions with expected answers.

    golds: the right answers, one per row; None: the last answer of each row.
    Raises `GraftError`, naming the row, for a row without a question or an answer.
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
                f"{sample.where}: there is no number in its answer, {reference[:60]!r}: give one, or set eval.metric: exact"
            )
        items.append(Item(len(items) + 1, sample.source, sample.row, prompt, reference, expected))
    decoding = Decoding(max_new_tokens=config.max_new_tokens, beams=beams)
    return Evaluation(task, tuple(samples), tuple(items), metric, decoding, config.token_budget, train_on)


def _split(sample: Sample) -> tuple[tuple[Message, ...], str]:
    """Split a conversation into all that precedes its last answer, and that answer."""
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
    """Ask all candidates the questions of a data file, in the same batches, and score their answers.

    out: folder for answers.jsonl, which grows with each answer and can be continued, and for result.json, which is written at
    the end. overwrite: discard earlier answers in the folder. facts: further entries of the result, as JSON values.
    Returns the content of result.json and, under `folder`, its folder.
    """
    header = describe_evaluation(loaded, evaluation.task, evaluation.protocol(loaded.candidates))
    free = evaluation.metric == "text"
    # Encoder-decoders often write free text (translations, summaries), where BLEU says more than exact matches.
    with_bleu = free or (loaded.base.task == "seq2seq" and evaluation.metric == "exact")
    if free:
        require_text_libraries()
    elif with_bleu:
        require("sacrebleu", "eval")

    def judge(item: Item, text: str) -> Judgement:
        extracted = extract(text, evaluation.metric)
        if extracted is None:
            return Judgement(None, "unextractable")
        return Judgement(extracted, "correct" if extracted == item.expected else "wrong")

    with Journal(out, header, questions(evaluation.items), overwrite=overwrite, group=loaded.group) as journal:
        checked = answer(
            loaded, evaluation.items, judge, evaluation.decoding, journal,
            token_budget=evaluation.token_budget, progress=progress,
        )  # fmt: skip
        losses = _losses(loaded, evaluation)

        def score(candidate: Candidate, lines: list[Line]) -> dict[str, Any]:
            found = {**count_outcomes([judgement(line) for line in lines]), **losses[candidate.name]}
            texts, right = [line["answer"] for line in lines], [line["reference"] for line in lines]
            found |= bleu_scores(texts, right) if with_bleu else {}
            if free:
                loss = found["loss"]
                found |= {
                    **rouge_scores(texts, right),
                    "perplexity": None if loss is None else math.exp(min(loss, 700)),
                }
            return found

        return write_result(loaded, evaluation.items, header, journal, score, self_checked=checked, **facts)


def _losses(loaded: LoadedModel, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Return the mean loss per supervised token of each candidate, over the samples that fit into its context."""
    examples: list[Example] = []
    adapters: list[str | None] = []
    places: dict[str, range] = {}
    # Each candidate has its own template, and so its own tokens. All are put into one list, so that they share batches.
    for candidate in loaded.candidates:
        start = len(examples)
        examples += _examples(loaded, evaluation, candidate)
        places[candidate.name] = range(start, len(examples))
        adapters += [candidate.adapter] * len(places[candidate.name])
    losses = sample_losses(
        loaded.base.model, examples, adapters, token_budget=evaluation.token_budget, group=loaded.group
    )
    found = {}
    for name, own in places.items():
        targets = sum(examples[place].num_targets for place in own)
        loss = sum(losses[place] for place in own) / targets if targets else None
        found[name] = {"loss": loss, "loss_tokens": targets, "loss_samples": len(own)}
    return found


def _examples(loaded: LoadedModel, evaluation: Evaluation, candidate: Candidate) -> list[Example]:
    """Tokenise the samples as training does, leaving out those that do not fit into the context."""
    room = context_length(loaded.base.model, candidate.adapter) or UNLIMITED
    tokenizer, template = loaded.base.tokenizer, candidate.template
    # A sample that is far too long is not tokenised as a whole.
    short = [shortened(sample, tokenizer, room, "drop") for sample in evaluation.samples]
    samples = [found[0] for found in short if not isinstance(found, Rejected)]
    if isinstance(template, EncoderTemplate):
        made = [tokenize_seq2seq(sample, tokenizer, template, UNLIMITED, "drop") for sample in samples]
        return [one for one in made if isinstance(one, Example) and max(one.widths) <= room]
    tokenized = [
        tokenize(sample, tokenizer, template, max_length=room, overlong="drop", train_on=evaluation.train_on)
        for sample in samples
    ]
    return [one for one in tokenized if isinstance(one, Example)]
