"""What the data hold: rows, lengths, and what was left out, by source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from graft.data.samples import Example, Rejected, Sample


@dataclass(frozen=True)
class Counts:
    """One source, or all of them."""

    name: str
    rows: int
    """Rows read."""
    samples: int
    """Samples trained on."""
    tokens: int
    """Tokens of these."""
    targets: int
    """Supervised tokens of these."""
    p50: int
    """Median length in tokens, before anything was cut or left out."""
    p95: int
    longest: int
    overlong: int
    """Longer than max_length, before cutting."""
    cut: int
    """Samples whose prompt was shortened."""
    dropped: int
    """Samples left out because they are too long."""
    empty: int
    """Samples left out because an answer is empty."""
    unanswered: int
    """Samples left out because they hold no answer."""
    same: int = 0
    """Pairs left out because the preferred answer is the rejected one."""

    @property
    def supervised_share(self) -> float:
        """Supervised tokens / all tokens."""
        return self.targets / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class DataReport:
    """What the data of a run hold."""

    train: Counts
    """All training data together; without the rows held out for validation."""
    sources: tuple[Counts, ...]
    """The training data by source."""
    validation: Counts | None
    duplicates: int
    """Training samples that repeat an earlier one."""
    shared: int
    """Validation samples whose conversation is in the training data too."""
    max_length: int
    notes: tuple[str, ...] = ()
    """What a reader should know, a sentence each."""
    labels: tuple[tuple[str, str, int], ...] = ()
    """Of classification, each class as the data has it, its name, and how many training samples are of it."""
    pairs: bool = False
    """Whether samples are pairs of a preferred and a rejected answer."""

    @property
    def learnt(self) -> str:
        """What the samples teach, in a few words."""
        if self.labels:
            return f"of {len(self.labels)} classes"
        if self.train.targets == self.train.samples:
            return "each with a value"
        if self.pairs:
            return f"pairs of answers, {self.train.supervised_share:.0%} of their tokens"
        return f"{self.train.supervised_share:.0%} of their tokens supervised"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        """From what `to_dict` gave."""
        counts = {"train": Counts(**values["train"]), "sources": tuple(Counts(**one) for one in values["sources"])}
        validation = values["validation"] and Counts(**values["validation"])
        lists = {"notes": tuple(values["notes"]), "labels": tuple(tuple(label) for label in values["labels"])}
        return cls(**{**values, **counts, **lists, "validation": validation})

    def __rich__(self) -> Table:
        several = self.sources if len(self.sources) > 1 else ()
        parts = (*several, self.train, *([self.validation] if self.validation else []))
        table = Table(
            "", box=SIMPLE_HEAD, caption="\n".join((*self._classes(), *self.notes)) or None, caption_justify="left"
        )
        for part in parts:
            table.add_column(PurePath(part.name).name, justify="right", overflow="fold")
        lines = {
            "rows": [f"{part.rows:,}" for part in parts],
            "samples used": [f"{part.samples:,}" for part in parts],
            "tokens": [f"{part.tokens:,}" for part in parts],
            "trained on": [f"{part.supervised_share:.1%}" for part in parts],
            "length: median": [f"{part.p50:,}" for part in parts],
            "  95 % are within": [f"{part.p95:,}" for part in parts],
            "  longest": [f"{part.longest:,}" for part in parts],
            f"longer than {self.max_length:,}": [f"{part.overlong:,}" for part in parts],
            "  prompt cut": [f"{part.cut:,}" for part in parts],
            "  left out": [f"{part.dropped:,}" for part in parts],
            "no answer, left out": [f"{part.empty + part.unanswered:,}" for part in parts],
        }
        if self.train.targets == self.train.samples:  # one label each: shares of tokens mean nothing
            del lines["trained on"]
        if self.pairs:
            lines["answers alike, left out"] = [f"{part.same:,}" for part in parts]
        for name, cells in lines.items():
            table.add_row(name, *cells)
        return table

    def _classes(self) -> list[str]:
        """A line with the size of each class."""
        shown = ", ".join(f"{name} {count:,}" for _, name, count in self.labels)
        return [f"Classes: {shown}."] if shown else []


def count_outcomes(name: str, outcomes: Sequence[Example | Rejected], max_length: int) -> Counts:
    """Counts over what became of the rows of a source."""
    examples = [one for one in outcomes if isinstance(one, Example)]
    reasons = Counter(one.reason for one in outcomes if isinstance(one, Rejected))
    lengths = [length for one in outcomes if (length := _length(one))]
    p50, p95, longest = (round(float(q)) for q in np.percentile(lengths or [0], [50, 95, 100]))
    return Counts(
        name=name,
        rows=len(outcomes),
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
    )


def _length(outcome: Example | Rejected) -> int:
    """Tokens before anything was cut, of a pair those of the longer side; 0 where the sample was not tokenised."""
    return outcome.longest + outcome.cut if isinstance(outcome, Example) else outcome.length


def conversation_key(sample: Sample) -> tuple[tuple[str, str, str], ...]:
    """What makes two conversations, or two pairs of them, the same."""
    own, worse = (
        tuple((m["role"], m["content"], m.get("input", "")) for m in messages)
        for messages in (sample.messages, sample.rejected)
    )
    return (*own, ("rejected", "", ""), *worse) if worse else own


def count_duplicates(samples: Iterable[Sample]) -> int:
    """How many conversations repeat an earlier one."""
    keys = [conversation_key(sample) for sample in samples]
    return len(keys) - len(set(keys))
