"""Samples with a label: a text or a pair of texts, and its class or value.

A labelled row is a conversation too, so that splitting, counting and comparing know nothing of tasks: each text is a message of the
user, the label is the answer. A `Labelling` says which label is which number, and turns a sample into an `Example`: the texts as the
tokenizer writes them for a model of its kind, special tokens and all, and the label. It is saved beside the adapter (`task.json`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
LABELLED = ("classification", "regression")


@dataclass(frozen=True)
class Labelling:
    """What labels mean."""

    task: str
    """classification or regression"""
    labels: tuple[str, ...] = ()
    """Of each class, as the data has it; in the order of the classes' numbers. Empty for values."""
    names: tuple[str, ...] = ()
    """Of each class, for people."""

    @property
    def name(self) -> str:
        """What it is called in tables: the classes, or the task."""
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
        """From a run's settings and its training data.

        order: the names of the classes as the base's own head has them, followed where they are the same. Raises `GraftError` for data
        of one class only, and for classes of `data.labels` that no sample has.
        """
        if config.task == "regression":
            if config.labels is not None:
                raise GraftError("data.labels names classes, but data.task is regression, which has none: remove it")
            return cls("regression")
        found = Counter(label_of(sample) for sample in samples)
        given = config.labels
        named = {str(label): name for label, name in given.items()} if isinstance(given, dict) else {}
        labels = [str(label) for label in given] if given is not None else sorted(found, key=_by_number)
        missing = [label for label in labels if label not in found]
        if missing:
            raise GraftError(
                f"data.labels names {', '.join(map(repr, missing))}, which no training sample has; the labels there are {_counted(found)}"
            )
        if len(labels) < 2:
            raise GraftError(f"classification needs two classes or more; the training data hold {_counted(found)}")
        names = [named.get(label, label) for label in labels]
        if len(set(names)) < len(names):
            raise GraftError(f"data.labels gives one name to several classes: {', '.join(names)}")
        if order is not None and {name.lower() for name in order} == {name.lower() for name in names}:
            places = {name.lower(): place for place, name in enumerate(order)}
            labels = [label for _, label in sorted(zip(names, labels, strict=True), key=lambda p: places[p[0].lower()])]
            names = [named.get(label, label) for label in labels]
        return cls("classification", tuple(labels), tuple(names))

    def number(self, sample: Sample) -> int | float:
        """The class's number, or the value. Raises `GraftError`, naming the row, for a label that is none of the classes, or no number."""
        label = label_of(sample)
        if self.task == "regression":
            try:
                value = float(label)
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise GraftError(f"{sample.where}: the label of a regression is a number; given {label!r}")
            return value
        for known in (self.labels, self.names):
            if label in known:
                return known.index(label)
        raise GraftError(
            f"{sample.where}: the label {label!r} is none of the classes {', '.join(self.names)}.{did_you_mean(label, self.labels)}"
        )

    def example(
        self, sample: Sample, tokenizer: Any, max_length: int, overlong: str, need_label: bool = True
    ) -> Example | Rejected:
        """Token ids and label of a sample, or why it cannot be used.

        Special tokens written out in the texts stay text. Where `overlong` is truncate_prompt, the end of the text is cut, of a pair
        that of the longer one.
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
        told = any(types) or "token_type_ids" in tokenizer.model_input_names
        ids = np.array(found["input_ids"], dtype=np.int32)
        return Example(
            ids,
            np.zeros(len(ids), dtype=np.bool_),
            sample.source,
            sample.row,
            cut=length - len(ids),
            label=self.number(sample) if need_label else 0,
            token_types=np.array(types, dtype=np.int8) if told else None,
        )


@dataclass(frozen=True)
class LabelTemplate(Template):
    """The labels of a model that answers no questions."""

    labelling: Labelling = Labelling("regression")

    @classmethod
    def of(cls, labelling: Labelling) -> LabelTemplate:
        """For these labels."""
        return cls(labelling.name, None, labelling)

    def _spans(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[Span]:
        raise GraftError(
            f"this adapter was trained for {self.labelling.task}: it gives labels to texts and writes no answers. Use graft predict, or "
            "graft eval with --data FILE"
        )

    def prompt_ids(self, messages: Sequence[Message], tokenizer: Any) -> list[int]:
        self._spans(messages, True)
        return []

    def stop_ids(self, tokenizer: Any) -> tuple[int, ...]:
        return ()

    def content(self) -> dict[str, Any]:
        return asdict(self.labelling)

    def save(self, folder: str | Path) -> None:
        self.labelling.save(folder)


def load_labelling(folder: str | Path) -> Labelling:
    """What `save` wrote. Raises `GraftError` where that cannot be read."""
    path = Path(folder) / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Labelling(values["task"], tuple(values["labels"]), tuple(values["names"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GraftError(f"{path} does not say what the adapter's labels are: {error}") from error


def saved_task(folder: str | Path) -> str | None:
    """The task that an adapter (or a merged model) in this folder was trained for, where its folder says."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["task"])
    except (ValueError, KeyError, TypeError) as error:
        raise GraftError(f"{path} does not say what the adapter was trained for: {error}") from error


def encode_texts(tokenizer: Any, texts: Sequence[str], max_length: int | None = None) -> Mapping[str, list[int]]:
    """The tokenizer's own encoding of a text or a pair, cut to `max_length` tokens.

    Token types are asked for: a tokenizer that was saved without its class no longer gives them by itself, and BERT's pairs need them.
    """
    cutting = (
        {"truncation": "longest_first", "max_length": max_length} if max_length is not None else {"truncation": False}
    )
    return tokenizer(
        *texts, split_special_tokens=True, padding=False, verbose=False, return_token_type_ids=True, **cutting
    )


def texts_of(sample: Sample) -> list[str]:
    """The text, or the two texts of a pair."""
    return [message["content"] for message in sample.messages if message["role"] == "user"]


def label_of(sample: Sample) -> str:
    """The label as the data has it."""
    assert sample.answer is not None
    return sample.answer


def _by_number(label: str) -> tuple[bool, float, str]:
    """Numbers in their order, before words in theirs."""
    number = label.lstrip("-").isdecimal()
    return not number, float(label) if number else 0.0, label


def _counted(found: Mapping[str, int]) -> str:
    shown = sorted(found.items(), key=lambda item: -item[1])[:12]
    return ", ".join(f"{label!r} ({count:,})" for label, count in shown) or "none"
