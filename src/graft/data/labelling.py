"""Classification and regression: samples with a text or a pair of texts, and a class or a value.

A labelled row becomes a conversation too, so that splitting, counting and comparing need not know about tasks: each text is a user message
and the label is the answer. A `Labelling` maps labels to numbers and turns a sample into an `Example`: the texts, encoded the way
the tokenizer encodes them for its model (special tokens included), and the label. It is saved beside the adapter (`task.json`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graft.config.data import DataConfig
from graft.data.encoding import Span
from graft.data.samples import Example, Message, Rejected, Sample
from graft.data.template import Template
from graft.errors import GraftError, did_you_mean
from graft.utils.files import write_json_atomic

FILE = "task.json"
HIDDEN = "-1"
"""Public test sets write this in place of a label that they do not publish."""
LABELLED = ("classification", "regression")


@dataclass(frozen=True)
class Labelling:
    """The labels of a task and their numbers."""

    task: str
    """classification or regression"""
    labels: tuple[str, ...] = ()
    """The label of each class as the data write it, in the order of the class numbers; empty for regression."""
    names: tuple[str, ...] = ()
    """The name of each class, for people to read."""

    @property
    def name(self) -> str:
        """The name in tables: the first classes, or the task if there are none."""
        return " / ".join(self.names[:6]) + (" / ..." if len(self.names) > 6 else "") or self.task

    @property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `task.json` into an existing folder, beside the adapter."""
        write_json_atomic(Path(folder) / FILE, asdict(self))

    @classmethod
    def of(cls, config: DataConfig, samples: Iterable[Sample], order: Sequence[str] | None = None) -> Labelling:
        """Build the labelling from a run's settings and its training data.

        order: the class names in the order of the base's own head. The classes take this order if the names are the same.
        Raises `GraftError` if the data hold only one class, or if no sample has a class that `data.labels` names.
        """
        if config.task == "regression":
            if config.labels is not None:
                raise GraftError(
                    "data.labels names classes, but data.task regression has no classes: remove data.labels"
                )
            return cls("regression")
        samples = list(samples)
        found = Counter(map(label_of, samples))
        given = config.labels
        if given is None and (hidden := next((sample for sample in samples if label_of(sample) == HIDDEN), None)):
            raise GraftError(
                f"{hidden.where}, field 'label': is -1, which stands for a label that was not published. If it is a class here, list all "
                "classes in data.labels"
            )
        named = {_as_found(label, found): name for label, name in given.items()} if isinstance(given, dict) else {}
        labels = [_as_found(label, found) for label in given] if given is not None else sorted(found, key=_sort_key)
        missing = [label for label in labels if label not in found]
        if missing:
            raise GraftError(
                f"data.labels names {', '.join(map(repr, missing))}, but no training sample has them; found are {_label_counts(found)}"
            )
        if len(labels) < 2:
            raise GraftError(f"classification needs two or more classes; the training data hold {_label_counts(found)}")
        names = [named.get(label, label) for label in labels]
        if len(set(names)) < len(names):
            raise GraftError(f"data.labels gives the same name to several classes: {', '.join(names)}")
        # The base's own head may have the same classes in another order, and its rows are kept: follow it.
        if order is not None and {name.lower() for name in order} == {name.lower() for name in names}:
            places = {name.lower(): place for place, name in enumerate(order)}
            labels = [label for _, label in sorted(zip(names, labels, strict=True), key=lambda p: places[p[0].lower()])]
            names = [named.get(label, label) for label in labels]
        return cls("classification", tuple(labels), tuple(names))

    def number(self, sample: Sample) -> int | float:
        """Return the number of the sample's class, or its value.

        Raises `GraftError`, naming the row, for a label that is not one of the classes, or not a number.
        """
        label = label_of(sample)
        if self.task == "regression":
            try:
                value = float(label)
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise GraftError(f"{sample.where}: a regression needs a number as its label; given {label!r}")
            return value
        # An evaluation file may write the classes as the training data did, or by their names.
        for known in (self.labels, self.names):
            if label in known:
                return known.index(label)
        raise GraftError(
            f"{sample.where}: the label {label!r} is not one of the classes {', '.join(self.names)}.{did_you_mean(label, self.labels)}"
        )

    def example(
        self, sample: Sample, tokenizer: Any, max_length: int, overlong: str, need_label: bool = True
    ) -> Example | Rejected:
        """Return the token ids and the label of a sample, or the reason why it cannot be used.

        Special tokens that the texts spell out stay text. With `overlong` truncate_prompt the end of the text is cut, and of a pair
        the end of the longer text.
        """
        texts = texts_of(sample)
        if not all(text.strip() for text in texts):
            return Rejected("empty_answer", 0)
        found = encode_texts(tokenizer, texts)
        length = len(found["input_ids"])
        if length > max_length:
            if overlong != "truncate_prompt":
                return Rejected("overlong", length)
            found = encode_texts(tokenizer, texts, max_length)
        types = found["token_type_ids"]
        takes_types = any(types) or "token_type_ids" in tokenizer.model_input_names
        ids = np.array(found["input_ids"], dtype=np.int32)
        return Example(
            ids,
            np.zeros(len(ids), dtype=np.bool_),
            sample.source,
            sample.row,
            cut=length - len(ids),
            label=self.number(sample) if need_label else 0,
            token_types=np.array(types, dtype=np.int8) if takes_types else None,
        )


@dataclass(frozen=True)
class LabelTemplate(Template):
    """The template of an adapter that predicts labels: it holds them and refuses to render questions."""

    labelling: Labelling = Labelling("regression")

    @classmethod
    def of(cls, labelling: Labelling) -> LabelTemplate:
        """Return the template for these labels."""
        return cls(labelling.name, None, labelling)

    def _spans(self, messages: Sequence[Message], add_generation_prompt: bool, learnt: Container[int]) -> list[Span]:
        raise GraftError(
            f"this adapter was trained for {self.labelling.task}: it labels texts and writes no answers. Use graft predict, or "
            "graft eval with --data FILE"
        )

    def prompt_ids(self, messages: Sequence[Message], tokenizer: Any) -> list[int]:
        self._spans(messages, True, ())
        return []

    def stop_ids(self, tokenizer: Any) -> tuple[int, ...]:
        return ()

    def content(self) -> dict[str, Any]:
        return asdict(self.labelling)

    def save(self, folder: str | Path) -> None:
        self.labelling.save(folder)


def load_labelling(folder: str | Path) -> Labelling:
    """Read the labelling that `save` wrote. Raises `GraftError` if the file cannot be read."""
    path = Path(folder) / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Labelling(values["task"], tuple(values["labels"]), tuple(values["names"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GraftError(f"cannot read the adapter's labels from {path}: {error}") from error


def saved_task(folder: str | Path) -> str | None:
    """Return the task that the adapter (or merged model) in this folder was trained for; None if the folder does not say."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["task"])
    except (ValueError, KeyError, TypeError) as error:
        raise GraftError(f"cannot read the adapter's task from {path}: {error}") from error


def encode_texts(tokenizer: Any, texts: Sequence[str], max_length: int | None = None) -> Mapping[str, list[int]]:
    """Encode a text or a pair of texts the tokenizer's own way, cut to `max_length` tokens.

    Token types are requested explicitly: BERT's pairs need them, and a tokenizer that was saved without its class omits them by default.
    """
    truncation = (
        {"truncation": "longest_first", "max_length": max_length} if max_length is not None else {"truncation": False}
    )
    return tokenizer(
        *texts, split_special_tokens=True, padding=False, verbose=False, return_token_type_ids=True, **truncation
    )


def texts_of(sample: Sample) -> list[str]:
    """Return the text of a sample, or the two texts of a pair."""
    return [message["content"] for message in sample.messages if message["role"] == "user"]


def label_of(sample: Sample) -> str:
    """Return the label as the data write it."""
    assert sample.answer is not None
    return sample.answer


def _as_found(label: str | int | float, found: Mapping[str, int]) -> str:
    """Return a label of the settings as the data write it: 1.0 stands for "1.0" or "1"."""
    written = [str(label)]
    if isinstance(label, float) and label.is_integer():
        written.append(str(int(label)))
    return next((each for each in written if each in found), written[0])


def _sort_key(label: str) -> tuple[bool, float, str]:
    """Sort whole numbers by value and before words: 2, 10, "no", "yes"."""
    number = label.lstrip("-").isdecimal()
    return not number, float(label) if number else 0.0, label


def _label_counts(found: Mapping[str, int]) -> str:
    shown = sorted(found.items(), key=lambda item: -item[1])[:12]
    return ", ".join(f"{label!r} ({count:,})" for label, count in shown) or "none"
