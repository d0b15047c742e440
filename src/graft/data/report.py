"""The data report: rows, lengths, and what was left out, for each source."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from graft.data.samples import Example, Message, Rejected, Sample


@dataclass(frozen=True)
class Counts:
    """The counts of one source, or of several together."""

    name: str
    rows: int
    """Rows that were read."""
    samples: int
    """Samples that are used; the others were left out."""
    tokens: int
    """Tokens of the samples used."""
    targets: int
    """Supervised tokens of the samples used."""
    p50: int
    """Median length in tokens, before anything was cut or left out."""
    p95: int
    longest: int
    overlong: int
    """Samples longer than max_length, before cutting."""
    cut: int
    """Samples whose prompt was shortened."""
    dropped: int
    """Samples left out because they were too long."""
    empty: int
    """Samples left out because an answer was empty."""
    unanswered: int
    """Samples left out because they had no answer."""
    same: int = 0
    """Pairs left out because the preferred answer equals the rejected one."""
    masked: int = 0
    """Samples left out because the data say not to train on any of their answers."""
    split: int = 0
    """Documents that were cut into several samples."""

    @property
    def supervised_share(self) -> float:
        """Supervised tokens divided by all tokens."""
        return self.targets / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class DataReport:
    """The report on the data of one run."""

    train: Counts
    """All training data together, without the rows held out for validation."""
    sources: tuple[Counts, ...]
    """The training data of each source."""
    validation: Counts | None
    duplicates: int
    """Training samples that repeat an earlier one."""
    shared: int
    """Validation samples that the training data hold too."""
    max_length: int
    notes: tuple[str, ...] = ()
    """Warnings about the data, one sentence each."""
    labels: tuple[tuple[str, str, int], ...] = ()
    """For classification: each class as the data write it, its name, and its number of training samples."""
    pairs: bool = False
    """Whether the samples are pairs of a preferred and a rejected answer."""
    marked: tuple[int, int] | None = None
    """For answers that are marked: how many are good, and how many are bad."""
    unread: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Each source with columns that nothing reads, and these columns (or keys of turns, as `messages[].id`)."""

    @property
    def learnt(self) -> str:
        """What the samples teach, in a few words, to follow a number of samples."""
        if self.labels:
            return f"of {len(self.labels)} classes"
        if self.train.targets == self.train.samples:
            return "each with a value"
        if self.marked:
            return f"answers ({self.marked[0]:,} good, {self.marked[1]:,} bad), {self.train.supervised_share:.0%} of their tokens"
        if self.pairs:
            return f"pairs of answers, {self.train.supervised_share:.0%} of their tokens"
        return f"{self.train.supervised_share:.0%} of their tokens supervised"

    @property
    def left_out(self) -> tuple[str, ...]:
        """A sentence for training and for validation data of which rows were left out or shortened: how many, and why."""
        return tuple(
            said for counts in (self.train, self.validation) if counts is not None and (said := self._left_out(counts))
        )

    def _left_out(self, counts: Counts) -> str:
        reasons = {
            f"longer than {self.max_length:,} tokens": counts.dropped,
            "with an empty answer": counts.empty,
            "without an answer": counts.unanswered,
            "with two equal answers": counts.same,
            "not to be trained on": counts.masked,
        }
        why = ", ".join(f"{number:,} {reason}" for reason, number in reasons.items() if number)
        rows, out = ("validation rows" if counts is self.validation else "rows"), sum(reasons.values())
        said = f"{out:,} of {counts.rows:,} {rows} are left out: {why}." if out else ""
        cut = f"{counts.cut:,} of {counts.rows:,} {rows} have a shortened prompt." if counts.cut else ""
        split = f"{counts.split:,} of {counts.rows:,} {rows} are split into several samples." if counts.split else ""
        return " ".join(filter(None, (said, cut, split)))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        """Rebuild a report from the values of `to_dict`."""
        counts = {"train": Counts(**values["train"]), "sources": tuple(Counts(**one) for one in values["sources"])}
        validation = values["validation"] and Counts(**values["validation"])
        lists = {"notes": tuple(values["notes"]), "labels": tuple(tuple(label) for label in values["labels"])}
        lists["marked"] = values["marked"] and tuple(values["marked"])
        lists["unread"] = tuple((source, tuple(columns)) for source, columns in values["unread"])
        return cls(**{**values, **counts, **lists, "validation": validation})

    def __rich__(self) -> Table:
        several = self.sources if len(self.sources) > 1 else ()
        columns = (*several, self.train, *([self.validation] if self.validation else []))
        said = "\n".join((*self._classes(), *self.notes))
        table = Table("", box=SIMPLE_HEAD, caption=Text(said) if said else None, caption_justify="left")
        for counts in columns:
            table.add_column(Text(PurePath(counts.name).name), justify="right", overflow="fold")
        lines = {
            "rows": [f"{counts.rows:,}" for counts in columns],
            "samples used": [f"{counts.samples:,}" for counts in columns],
            "tokens": [f"{counts.tokens:,}" for counts in columns],
            "trained on": [f"{counts.supervised_share:.1%}" for counts in columns],
            "length: median": [f"{counts.p50:,}" for counts in columns],
            "  95 % are within": [f"{counts.p95:,}" for counts in columns],
            "  longest": [f"{counts.longest:,}" for counts in columns],
            f"longer than {self.max_length:,}": [f"{counts.overlong:,}" for counts in columns],
            "  prompt cut": [f"{counts.cut:,}" for counts in columns],
            "  left out": [f"{counts.dropped:,}" for counts in columns],
            "no answer, left out": [f"{counts.empty + counts.unanswered:,}" for counts in columns],
        }
        if self.train.targets == self.train.samples:  # each sample has one label: a share of tokens would mean nothing
            del lines["trained on"]
        if any(counts.split for counts in columns):
            lines["  cut into pieces"] = [f"{counts.split:,}" for counts in columns]
        if any(counts.masked for counts in columns):
            lines["not to be trained on"] = [f"{counts.masked:,}" for counts in columns]
        if self.pairs:
            lines["equal answers, left out"] = [f"{counts.same:,}" for counts in columns]
        for name, cells in lines.items():
            table.add_row(name, *cells)
        return table

    def _classes(self) -> list[str]:
        """Return a line with the size of each class, if there are classes."""
        shown = ", ".join(f"{name} {count:,}" for _, name, count in self.labels)
        return [f"Classes: {shown}."] if shown else []


def count_outcomes(name: str, outcomes: Sequence[Example | Rejected], max_length: int) -> Counts:
    """Count the outcomes of the rows of one source: the examples made, and the samples left out by reason."""
    examples = [one for one in outcomes if isinstance(one, Example)]
    reasons = Counter(one.reason for one in outcomes if isinstance(one, Rejected))
    lengths = [length for one in outcomes if (length := _length(one))]
    p50, p95, longest = (round(float(q)) for q in np.percentile(lengths or [0], [50, 95, 100]))
    return Counts(
        name=name,
        rows=len(outcomes) - sum(one.piece > 0 for one in examples),
        samples=len(examples),
        tokens=sum(map(len, examples)),
        targets=sum(one.num_targets for one in examples),
        p50=p50,
        p95=p95,
        longest=longest,
        overlong=sum(length > max_length for length in lengths),
        cut=sum(one.cut > 0 for one in examples),
        dropped=reasons["overlong"] + reasons["answer_too_long"],
        empty=reasons["empty_answer"],
        unanswered=reasons["no_answer"],
        same=reasons["same_answers"],
        masked=reasons["masked"],
        split=sum(one.piece == 1 for one in examples),
    )


def _length(outcome: Example | Rejected) -> int:
    """Return the length in tokens before cutting (of a pair, the longer side's); 0 if the sample was not tokenised."""
    return outcome.longest + outcome.cut if isinstance(outcome, Example) else outcome.length


def conversation_key(sample: Sample) -> tuple[tuple[str, str, str], ...]:
    """Return a key that is equal for equal conversations, or for equal pairs of conversations."""
    own, rejected = (tuple(map(_message_key, messages)) for messages in (sample.messages, sample.rejected))
    if sample.desirable is not None:
        return (*own, ("desirable", str(sample.desirable), ""))
    return (*own, ("rejected", "", ""), *rejected) if rejected else own


def _message_key(message: Message) -> tuple[str, str, str]:
    """Return role, content and context; whatever else the message holds is part of the context's text."""
    more = {key: value for key, value in message.items() if key not in ("role", "content", "input")}
    written = json.dumps(more, sort_keys=True, default=str) if more else ""
    return message["role"], message["content"], message.get("input", "") + written


def count_duplicates(samples: Iterable[Sample]) -> int:
    """Count the conversations that repeat an earlier one."""
    keys = [conversation_key(sample) for sample in samples]
    return len(keys) - len(set(keys))
