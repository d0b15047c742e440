"""How answers that are given while training are judged: as those to a data file are afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from graft.errors import GraftError
from graft.evaluation.answers import choose_metric, extract


def judge(metric: Any, references: Sequence[str]) -> Callable[[str, str], bool]:
    """Return what says whether an answer (the second text) is right by its reference (the first), by `eval.metric`.

    Raises `GraftError` for free text, which is not right or wrong, and for a reference that holds nothing to compare.
    """
    if metric == "text":
        raise GraftError(
            "train.answers counts right answers, which eval.metric: text does not have: set it to exact or numeric"
        )
    chosen = choose_metric(metric, references)
    lacking = next((each for each in references if extract(each, chosen) is None), None)
    if lacking is not None:
        raise GraftError(
            f"train.answers: there is nothing to compare ({chosen}) in the answer {lacking[:60]!r} of the validation data"
        )
    return lambda reference, answer: extract(answer, chosen) == extract(reference, chosen)
