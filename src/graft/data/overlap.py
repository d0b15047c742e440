"""Find the questions of a test set that the training data hold: with the same words, or with nearly the same letters.

`exact`: the same words in the same order. Case, punctuation and white space do not count, but a sign before a number does (7 - 3
is not 7 + 3).

`near`: the Jaccard similarity of the two sets of character 5-grams, taken over letters and digits without spaces, is at least
0.85. This threshold was chosen by comparing the questions of AddSub, MultiArith, SingleEq and MAWPS with their nearest ones in the
training split of MAWPS. Of the 112 near pairs above it, 106 hold the same numbers; of the 56 pairs between 0.80 and 0.85, only 23 do. Above
the threshold a question was retyped ("did n't" for "didn't", 14507 for 14,507, a dropped "left"); below it, the question was told again
with other names and numbers. 5-grams that more than a tenth of the test questions share belong to the wording of the whole set ("Please
choose the correct answer to the question"), not to one question, and are left out.

No pair is missed and every similarity is exact. Candidates come from the prefix filter of set similarity joins (Chaudhuri,
Ganti and Kaushik 2006, ICDE; Bayardo, Ma and Srikant 2007, WWW). A set of n members shares at least ceil(t n) of them with any set
that has a Jaccard similarity of t to it. So they share at least one of the n - ceil(t n) + 1 rarest members of each, and only these
are indexed and looked up.

For example, with n = 20 and t = 0.85 they share at least 17 members: the other set can lack only 3 of the 20, so not all of the 4 rarest.
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
"""Characters per n-gram."""
THRESHOLD = 0.85
"""The Jaccard similarity from which two questions count as near duplicates."""
SHARE, LEAST = 0.1, 10
"""An n-gram belongs to the wording of the set if more than this share of the test questions have it, and more than this many."""
EXAMPLES = 3
"""The number of exact pairs, and of near pairs, that a report shows."""

_WORD = re.compile(r"[^\W_]+|[-+*/^<>=×÷](?=\s*\d)")


@dataclass(frozen=True)
class Question:
    """A question and its origin."""

    text: str
    where: str
    """Source and row, in words."""


@dataclass(frozen=True)
class Pair:
    """A test question and the most similar training question."""

    tested: Question
    trained: Question
    exact: bool
    similarity: float
    """Jaccard similarity of their 5-grams; 1 if exact."""


@dataclass(frozen=True)
class OverlapReport:
    """The overlap of one test set with the training data."""

    questions: int
    """The number of test questions."""
    trained: int
    """The number of training questions that they were compared with. A training sample with several user turns counts each of them, and
    all of them together; a sample without a question counts none."""
    threshold: float
    pairs: tuple[Pair, ...]
    """One pair for each test question that was found, in the order of the test set."""

    @property
    def exact(self) -> int:
        """The number of test questions that the training data hold word for word."""
        return sum(pair.exact for pair in self.pairs)

    @property
    def near(self) -> int:
        """The number of further test questions with a near duplicate in the training data."""
        return len(self.pairs) - self.exact

    @property
    def examples(self) -> tuple[Pair, ...]:
        """The first exact pairs, and the least similar near pairs, which show what the threshold means."""
        exact = [pair for pair in self.pairs if pair.exact]
        near = sorted((pair for pair in self.pairs if not pair.exact), key=lambda pair: pair.similarity)
        return (*exact[:EXAMPLES], *near[:EXAMPLES])

    def __str__(self) -> str:
        return (
            f"{len(self.pairs):,} of {self.questions:,} questions: {self.exact:,} exact, {self.near:,} near "
            f"(similarity of {SIZE}-grams at least {self.threshold:g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and examples as JSON values."""
        counts = {"questions": self.questions, "trained": self.trained, "exact": self.exact, "near": self.near}
        return {**counts, "threshold": self.threshold, "examples": [asdict(pair) for pair in self.examples]}


def overlap_report(
    train_samples: Iterable[Sample], questions: Iterable[Question], *, threshold: float = THRESHOLD
) -> OverlapReport:
    """Compare the questions of the training data with those of a test set; answers do not count.

    Each user turn of a training conversation counts as a question, and so do all its user turns together. Raises `GraftError`
    for a threshold outside (0, 1].
    """
    return overlap_reports(train_samples, {"": questions}, threshold=threshold)[""]


def overlap_reports(
    train_samples: Iterable[Sample], tests: Mapping[str, Iterable[Question]], *, threshold: float = THRESHOLD
) -> dict[str, OverlapReport]:
    """Make an `overlap_report` for several test sets by name. Training samples are read once and not kept in memory."""
    if not 0 < threshold <= 1:
        raise GraftError(
            f"the threshold of near duplicates must be a similarity above 0 and at most 1; given {threshold}"
        )
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
    """Return the questions of test data: all user turns of each conversation together. Samples without any are left out."""
    asked = ((sample, _turns(sample)) for sample in samples)
    return [Question("\n".join(turns), sample.where) for sample, turns in asked if turns]


def _turns(sample: Sample) -> list[str]:
    asked = (question(message) for message in sample.prompt if message["role"] == "user")
    return [text for text in asked if text.strip()]


def _asked(sample: Sample) -> list[str]:
    """Return the questions of a training sample: each user turn, and all of them together if there are several."""
    turns = _turns(sample)
    return turns if len(turns) < 2 else [*turns, "\n".join(turns)]


def words(text: str) -> list[str]:
    """Return the words, numbers, and signs before numbers of a text; if it has none of these, what lies between its spaces."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(plain) or plain.split()


def grams(found: Sequence[str]) -> set[str]:
    """Return the character n-grams of words, joined without spaces. A text shorter than an n-gram is one n-gram."""
    joined = "".join(found)
    return {joined[start : start + SIZE] for start in range(max(1, len(joined) - SIZE + 1))}


@dataclass
class _Index:
    """An index of the test questions by their words and by their rarest n-grams. N-grams are numbered from the rarest on."""

    questions: list[Question]
    threshold: float
    number: dict[str, int] = field(default_factory=dict)
    """The number of each n-gram, 0 for the rarest."""
    common: set[str] = field(default_factory=set)
    """The n-grams that belong to the wording of the whole set."""
    sets: list[frozenset[int]] = field(default_factory=list)
    """The n-grams of each question, without the common ones."""
    rare: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """For each n-gram, the questions that have it among their rarest ones (the prefix filter's index)."""
    same: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """For each text of words, the questions that consist of it."""
    best: dict[int, Pair] = field(default_factory=dict)
    """For each question, the pair with the most similar training question so far."""

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
        """Compare a training question with all test questions, and keep it where it is the most similar one so far (the first of equals).

        key: its words; pieces: its n-grams.
        """
        for at in self.same.get(key, ()):
            if at not in self.best or not self.best[at].exact:
                self.best[at] = Pair(self.questions[at], asked, True, 1.0)
        for at, similarity in self._similar(pieces - self.common):
            if at not in self.best or self.best[at].similarity < similarity:
                self.best[at] = Pair(self.questions[at], asked, False, similarity)

    def pairs(self) -> list[Pair]:
        """Return the pairs found, in the order of the test questions."""
        return [self.best[at] for at in sorted(self.best)]

    def _similar(self, own: set[str]) -> Iterator[tuple[int, float]]:
        """Yield (question, similarity) for all test questions that are similar enough to a set of n-grams."""
        known = [self.number[gram] for gram in own if gram in self.number]
        if len(known) < self._least(len(own)) or not known:
            return
        known.sort()
        # N-grams that no test question has are the rarest of all: they fill the front of the prefix but find nothing.
        looked_up = known[: max(0, self._prefix(len(own)) - (len(own) - len(known)))]
        numbers = frozenset(known)
        for at in {at for number in looked_up for at in self.rare.get(number, ())}:
            shared = len(numbers & self.sets[at])
            similarity = shared / (len(own) + len(self.sets[at]) - shared)
            if similarity >= self.threshold:
                yield at, similarity

    def _least(self, size: int) -> int:
        """Return how many members a set of this size shares at least with a similar one. A rounding error never raises the number."""
        return math.ceil(self.threshold * size - 1e-9)

    def _prefix(self, size: int) -> int:
        """Return how many of its rarest members a set of this size has to look up."""
        return size - self._least(size) + 1 if size else 0
