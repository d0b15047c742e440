"""Questions of a test set that stand in the training data: the same words, or nearly the same letters.

`exact`: the same words in the same order; case, punctuation and white space do not count (a sign before a number does: 7 - 3
is not 7 + 3).

`near`: the Jaccard similarity of the two sets of character 5-grams, taken over letters and digits without spaces, is at least
0.85. The threshold was chosen on the questions of AddSub, MultiArith, SingleEq and MAWPS beside their nearest ones in the
training split of MAWPS: of 112 near pairs above it 106 hold the same numbers, of the 56 between 0.80 and 0.85 only 23. Above
it a question was retyped ("did n't" for "didn't", 14507 for 14,507, a dropped "left"), below it told anew with other names
and numbers. 5-grams that more than a tenth of the test questions share are the wording of the set ("Please choose the correct
answer to the question"), not of a question, and are left out.

No pair is missed and every similarity is exact: candidates come from the prefix filter of set similarity joins (Chaudhuri,
Ganti and Kaushik 2006, ICDE; Bayardo, Ma and Srikant 2007, WWW). Two sets with a Jaccard similarity of t share at least t of
the larger one, hence one of the ceil((1 - t) size) + 1 rarest members of each; only these are indexed and looked up.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from graft.data.samples import Sample, question
from graft.errors import GraftError

SIZE = 5
"""Characters of an n-gram."""
THRESHOLD = 0.85
"""Jaccard similarity from which two questions are near duplicates."""
SHARE, LEAST = 0.1, 10
"""An n-gram in more than this share of the test questions, and in more than this many, is wording of the set."""
EXAMPLES = 3
"""Pairs of each sort that a report shows."""

_WORD = re.compile(r"[^\W_]+|[-+*/^<>=×÷](?=\s*\d)")


@dataclass(frozen=True)
class Question:
    """What is asked, and where it stands."""

    text: str
    where: str
    """Source and row in words."""


@dataclass(frozen=True)
class Pair:
    """A test question and the training question most like it."""

    tested: Question
    trained: Question
    exact: bool
    similarity: float
    """Jaccard similarity of their 5-grams; 1 where exact."""


@dataclass(frozen=True)
class OverlapReport:
    """How many questions of a test set the training data hold."""

    questions: int
    """Test questions."""
    trained: int
    """Training questions they were compared with; a training sample without a question has none, one with n turns n and their whole."""
    threshold: float
    pairs: tuple[Pair, ...]
    """One for each test question found, in the order of the test set."""

    @property
    def exact(self) -> int:
        """Test questions whose words stand in the training data."""
        return sum(pair.exact for pair in self.pairs)

    @property
    def near(self) -> int:
        """Further test questions that are nearly there."""
        return len(self.pairs) - self.exact

    @property
    def examples(self) -> tuple[Pair, ...]:
        """The first exact pairs, and the near ones that are least alike: they show what the threshold means."""
        exact = [pair for pair in self.pairs if pair.exact]
        near = sorted((pair for pair in self.pairs if not pair.exact), key=lambda pair: pair.similarity)
        return (*exact[:EXAMPLES], *near[:EXAMPLES])

    def __str__(self) -> str:
        return (
            f"{len(self.pairs):,} of {self.questions:,} questions: {self.exact:,} exact, {self.near:,} near "
            f"(similarity of {SIZE}-grams at least {self.threshold:g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Counts and examples as JSON values."""
        counts = {"questions": self.questions, "trained": self.trained, "exact": self.exact, "near": self.near}
        return {**counts, "threshold": self.threshold, "examples": [asdict(pair) for pair in self.examples]}


def overlap_report(
    train_samples: Iterable[Sample], questions: Iterable[Question], *, threshold: float = THRESHOLD
) -> OverlapReport:
    """Compare what is asked in training with what is asked in a test, without the answers.

    Each user turn of a training conversation counts as a question, and so do all its turns together. Raises `GraftError`
    for a threshold outside (0, 1].
    """
    return overlap_reports(train_samples, {"": questions}, threshold=threshold)[""]


def overlap_reports(
    train_samples: Iterable[Sample], tests: Mapping[str, Iterable[Question]], *, threshold: float = THRESHOLD
) -> dict[str, OverlapReport]:
    """`overlap_report` for several test sets by name. Training samples are read once and not kept: memory goes with the tests."""
    if not 0 < threshold <= 1:
        raise GraftError(f"the threshold of near duplicates is a similarity above 0, at most 1; given {threshold}")
    indices = {name: _Index(list(questions), threshold) for name, questions in tests.items()}
    trained = 0
    for sample in train_samples:
        for text in _asked(sample):
            trained += 1
            asked, found = Question(text, sample.where), words(text)
            key, pieces = " ".join(found), grams(found)
            for index in indices.values():
                index.compare(asked, key, pieces)
    return {
        name: OverlapReport(len(index.questions), trained, threshold, tuple(index.pairs()))
        for name, index in indices.items()
    }


def questions_of(samples: Iterable[Sample]) -> list[Question]:
    """The questions of test data: all user turns of each conversation; samples without one are left out."""
    asked = ((sample, _turns(sample)) for sample in samples)
    return [Question("\n".join(turns), sample.where) for sample, turns in asked if turns]


def _turns(sample: Sample) -> list[str]:
    asked = (question(message) for message in sample.prompt if message["role"] == "user")
    return [text for text in asked if text.strip()]


def _asked(sample: Sample) -> list[str]:
    turns = _turns(sample)
    return turns if len(turns) < 2 else [*turns, "\n".join(turns)]


def words(text: str) -> list[str]:
    """Words, numbers and signs before numbers; of a text without any, its other characters."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(plain) or plain.split()


def grams(found: Sequence[str]) -> set[str]:
    """The character n-grams of words written without spaces; a shorter text is one n-gram."""
    joined = "".join(found)
    return {joined[start : start + SIZE] for start in range(max(1, len(joined) - SIZE + 1))}


@dataclass
class _Index:
    """The test questions by their words and by their rarest n-grams; n-grams are numbered from the rarest on."""

    questions: list[Question]
    threshold: float
    number: dict[str, int] = field(default_factory=dict)
    common: set[str] = field(default_factory=set)
    sets: list[frozenset[int]] = field(default_factory=list)
    rare: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    same: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    best: dict[int, Pair] = field(default_factory=dict)
    """By question, its most similar one so far."""

    def __post_init__(self) -> None:
        texts = [words(asked.text) for asked in self.questions]
        held = Counter(gram for text in texts for gram in grams(text))
        most = max(LEAST, SHARE * len(texts))
        self.common = {gram for gram, count in held.items() if count > most}
        rarest_first = sorted(held.keys() - self.common, key=lambda gram: (held[gram], gram))
        self.number = {gram: number for number, gram in enumerate(rarest_first)}
        for at, text in enumerate(texts):
            self.same[" ".join(text)].append(at)
            numbers = sorted(self.number[gram] for gram in grams(text) - self.common)
            self.sets.append(frozenset(numbers))
            for number in numbers[: self._prefix(len(numbers))]:
                self.rare[number].append(at)

    def compare(self, asked: Question, key: str, pieces: set[str]) -> None:
        """Note where this training question (its words, its n-grams) is the most similar one so far; of equals the first stays."""
        for at in self.same.get(key, ()):
            if at not in self.best or not self.best[at].exact:
                self.best[at] = Pair(self.questions[at], asked, True, 1.0)
        for at, similarity in self._similar(pieces - self.common):
            if at not in self.best or self.best[at].similarity < similarity:
                self.best[at] = Pair(self.questions[at], asked, False, similarity)

    def pairs(self) -> list[Pair]:
        """What was found, in the order of the questions."""
        return [self.best[at] for at in sorted(self.best)]

    def _similar(self, own: set[str]) -> Iterator[tuple[int, float]]:
        """(question, similarity) for all questions that are similar enough. N-grams that no question holds are the rarest."""
        known = [self.number[gram] for gram in own if gram in self.number]
        if len(known) < self._least(len(own)) or not known:
            return
        known.sort()
        looked_up = known[: max(0, self._prefix(len(own)) - (len(own) - len(known)))]
        numbers = frozenset(known)
        for at in {at for number in looked_up for at in self.rare.get(number, ())}:
            shared = len(numbers & self.sets[at])
            similarity = shared / (len(own) + len(self.sets[at]) - shared)
            if similarity >= self.threshold:
                yield at, similarity

    def _least(self, size: int) -> int:
        """How many members a set of this size shares at least with a similar one; rounding errors never make it more."""
        return math.ceil(self.threshold * size - 1e-9)

    def _prefix(self, size: int) -> int:
        return size - self._least(size) + 1 if size else 0
