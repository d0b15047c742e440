"""Evaluate adapters for classification and regression: predict the class or the value of each text and score it.

Rows of several candidates share batches. The scores of classification are accuracy, F1 (of the second of two classes, else
the mean over classes), Matthews correlation, the confusion matrix and the mean loss. Those of regression are Pearson and
Spearman correlation and the mean squared error.

Legend: B rows, C classes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from graft.architectures.rope import forget_lengths
from graft.bases import pad_id
from graft.bases.context import classes_of, context_length
from graft.bases.inputs import inputs_of
from graft.data.batches import micro_batches, padded
from graft.data.labelling import Labelling, LabelTemplate, label_of, texts_of
from graft.data.long_texts import shortened
from graft.data.samples import Example, Rejected, Sample
from graft.distributed.group import ALONE, Group
from graft.errors import GraftError
from graft.evaluation.answering import (
    Item,
    Line,
    Progress,
    answer_line,
    describe_evaluation,
    judgement,
    questions,
    result_folder,
    write_result,
)
from graft.evaluation.journal import Journal
from graft.evaluation.protocols.base import Judgement
from graft.evaluation.scoring import Output, majority, summary
from graft.evaluation.tasks import Task
from graft.evaluation.tasks.wording import FixedChoices
from graft.generation.batching import routed
from graft.generation.loaded import Candidate, LoadedModel
from graft.injection.modes import evaluation_mode
from graft.injection.state import unwrapped


def evaluate_labels(
    loaded: LoadedModel,
    task: str,
    samples: Sequence[Sample],
    out: Path | None,
    *,
    token_budget: int,
    progress: Progress | None = None,
    overwrite: bool = False,
    **facts: Any,
) -> dict[str, Any]:
    """Let all candidates predict the labels of labelled rows, and score them.

    out: folder of results, in which the evaluation has a folder of its own (None: nothing is written). facts: further entries
    of the result. Returns the content of result.json and, under `folder`, its folder.
    Raises `GraftError`, naming the row, for a label that a candidate does not know.
    """
    items = _items(loaded, samples)
    protocol = _protocol(loaded, items)
    header = describe_evaluation(loaded, task, protocol)
    folder = result_folder(out, task, header["protocol_hash"])
    with Journal(folder, header, questions(items), overwrite=overwrite, group=loaded.group) as journal:
        _predict(loaded, items, samples, journal, token_budget, progress)

        def score(candidate: Candidate, lines: list[Line]) -> dict[str, Any]:
            return _score(labelling_of(candidate), task, items, lines)

        if labelling_of(loaded.candidates[0]).task == "classification":
            facts["majority"] = majority([item.expected for item in items])
        return write_result(loaded, items, header, journal, score, self_checked=None, **facts)


def _predict(
    loaded: LoadedModel,
    items: Sequence[Item],
    samples: Sequence[Sample],
    journal: Journal,
    token_budget: int,
    progress: Progress | None,
) -> None:
    """Predict the labels that the journal lacks. The rows of all candidates share batches."""
    pairs = [
        (candidate, item, sample)
        for candidate in loaded.candidates
        for item, sample in zip(items, samples, strict=True)
        if (candidate.name, item.number) not in journal.answers
    ]
    with loaded.group.agreed():
        examples = [example_of(loaded, candidate, sample) for candidate, _, sample in pairs]
        found = predict_outputs(
            loaded.base.model, examples, [candidate.adapter for candidate, _, _ in pairs], pad_id(loaded.base.tokenizer, loaded.base.model),
            token_budget=token_budget, group=loaded.group,
        )  # fmt: skip
        for place, output in sorted(found, key=lambda each: each[0]):
            candidate, item, _ = pairs[place]
            predicted = describe_output(labelling_of(candidate), output)
            label, right = str(predicted["label"]), predicted["label"] == item.expected
            judged = Judgement(label, "correct" if right else "wrong")
            line = answer_line(candidate, item, label, judged, None, None)
            loss = _loss(labelling_of(candidate), output, examples[place].label)
            done = journal.append({**line, **predicted, "loss": loss})
            if progress is not None:
                progress(done, len(items) * len(loaded.candidates))
    journal.complete()


def labelling_of(candidate: Candidate) -> Labelling:
    """Return the labelling of a candidate: its task and the names of its classes."""
    assert isinstance(candidate.template, LabelTemplate)
    return candidate.template.labelling


def example_of(loaded: LoadedModel, candidate: Candidate, sample: Sample, need_label: bool = True) -> Example:
    """Tokenise a row for a candidate. Raises `GraftError`, naming the row, for a text that is empty or longer than the context."""
    room = context_length(loaded.base.model, candidate.adapter)
    found = shortened(sample, loaded.base.tokenizer, room or 2**31, "drop", keep_start=True)
    if not isinstance(found, Rejected):
        found = labelling_of(candidate).example(found[0], loaded.base.tokenizer, room or 2**31, "drop", need_label)
    if isinstance(found, Rejected):
        why = f"has {found.length} tokens, but the context has room for {room}" if found.length else "is empty"
        raise GraftError(f"{sample.where}: the text {why}")
    return found


def predict_outputs(
    model: nn.Module,
    examples: Sequence[Example],
    adapters: Sequence[str | None],
    padding: int,
    *,
    token_budget: int,
    group: Group = ALONE,
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield i and the logits [C], or the value [1], of examples[i] under adapters[i], in any order.

    padding: id of the padding token. group: the ranks that share the batches; each yields its own.
    """
    root: Any = unwrapped(model)
    widths = np.array([example.widths for example in examples]).reshape(-1, 2)
    classes = classes_of(model, [len(example) for example in examples], adapters)
    for rows in group.turns(micro_batches(widths, range(len(examples)), token_budget, "padded", classes)):
        forget_lengths(root)
        # Rows of one adapter next to each other are a slice of the batch and need not be gathered.
        rows.sort(key=lambda row: (adapters[row] is not None, adapters[row] or ""))
        batch = padded([examples[row] for row in rows], rows, padding).to(root.device)
        with (
            torch.no_grad(),
            evaluation_mode(model),
            routed(model, [adapters[row] for row in rows], batch.attention_mask),
        ):
            logits_BC = model(**inputs_of(root, batch)).logits.double().cpu().numpy()
        yield from zip(rows, logits_BC, strict=True)


def describe_output(labelling: Labelling, output: NDArray[np.float64]) -> dict[str, Any]:
    """Return what an output means: the value, or the likeliest class with the probabilities of all classes."""
    if labelling.task == "regression":
        return {"label": float(output[0])}
    probabilities = np.exp(output - output.max())
    probabilities /= probabilities.sum()
    best = int(probabilities.argmax())
    shown = {name: round(float(each), 6) for name, each in zip(labelling.names, probabilities, strict=True)}
    return {"label": labelling.names[best], "probability": shown[labelling.names[best]], "probabilities": shown}


def _items(loaded: LoadedModel, samples: Sequence[Sample]) -> list[Item]:
    """Turn the rows into questions. The expected answer is the name of the right class, or the right value."""
    labelling = labelling_of(loaded.candidates[0])
    items = []
    for sample in samples:
        right = labelling.number(sample)
        expected = str(right) if labelling.task == "regression" else labelling.names[int(right)]
        items.append(Item(len(items) + 1, sample.source, sample.row, sample.prompt, label_of(sample), expected))
    return items


def _protocol(loaded: LoadedModel, items: Sequence[Item]) -> dict[str, Any]:
    labelling = labelling_of(loaded.candidates[0])
    rows = json.dumps([[item.prompt, item.expected] for item in items])
    return {
        "name": labelling.task,
        "classes": list(labelling.names),
        "data": hashlib.sha256(rows.encode()).hexdigest()[:16],
        "rows": len(items),
    }


def _loss(labelling: Labelling, output: NDArray[np.float64], label: int | float | None) -> float:
    """Return the cross-entropy in nats, or the squared error."""
    assert label is not None
    if labelling.task == "regression":
        return float((output[0] - label) ** 2)
    return float(np.logaddexp.reduce(output) - output[int(label)])


def _score(labelling: Labelling, task: str, items: Sequence[Item], lines: Sequence[Line]) -> dict[str, Any]:
    """Score the answers of one candidate with the metrics that a benchmark of this kind has."""
    given = [Output(line["answer"], item.expected) for line, item in zip(lines, items, strict=True)]
    loss = sum(line["loss"] for line in lines) / len(lines)
    judgements = [judgement(line) for line in lines]
    if labelling.task == "regression":
        kind = Task(task, "score", _no_rows, metrics=("pearson", "spearman"))
        return {**summary(kind, given, judgements), "loss": loss}
    wording = FixedChoices("", choices=labelling.names)
    kind = Task(task, "class", _no_rows, wording=wording, metrics=("f1", "matthews"))
    table = Counter((item.expected, line["answer"]) for item, line in zip(items, lines, strict=True))
    confusion = {
        right: {predicted: table[right, predicted] for predicted in labelling.names} for right in labelling.names
    }
    return {**summary(kind, given, judgements), "loss": loss, "confusion": confusion}


def _no_rows(row: Any) -> Any:
    raise GraftError("the rows of a data file are read by `graft.data`")


def predict_labels(
    loaded: LoadedModel,
    candidate: Candidate,
    samples: Sequence[Sample],
    *,
    token_budget: int,
) -> list[dict[str, Any]]:
    """Predict the label of each row. Returns its number, its texts, and the class with all probabilities, or the value."""
    examples = [example_of(loaded, candidate, sample, need_label=False) for sample in samples]
    padding = pad_id(loaded.base.tokenizer, loaded.base.model)
    found = dict(
        predict_outputs(
            loaded.base.model, examples, [candidate.adapter] * len(examples), padding, token_budget=token_budget
        )
    )
    return [
        {
            "row": sample.row,
            "texts": texts_of(sample),
            "adapter": candidate.name,
            **describe_output(labelling_of(candidate), found[at]),
        }
        for at, sample in enumerate(samples)
    ]
