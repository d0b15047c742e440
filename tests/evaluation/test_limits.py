"""Limits as they are written on the command line."""

from __future__ import annotations

import pytest

from graft.errors import GraftError
from graft.evaluation import tasks
from graft.evaluation.limits import Limits


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("100", {"AddSub": 100, "boolq": 100}),
        ("all", {"AddSub": None, "boolq": None}),
        ("100,addsub=all", {"AddSub": None, "boolq": 100}),
        (" commonsense = 50 , boolq=7", {"AddSub": 9, "piqa": 50, "boolq": 7}),
        ("boolq=7,commonsense=50", {"boolq": 50}),  # what stands later holds
    ],
)
def test_a_number_for_all_and_others_for_named_tasks_and_groups(text: str, limits: dict[str, int | None]) -> None:
    found = Limits.parse(text, default=9)
    assert {name: found.of(tasks.get(name)) for name in limits} == limits


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ten", "--limit ten: 'ten' is not a number of rows from 1, or 'all'"),
        ("0", "'0' is not a number"),
        ("-3", "'-3' is not a number"),
        ("1.5", "'1.5' is not a number"),
        ("", "'' is not a number"),
        ("100,", "'' is not a number"),
        ("=5", "'=5' is not a number"),
        ("addsub=", "'addsub=' is not a number"),
        ("100,50", "the limit of every task is given twice"),
        ("gsm8k=5,gsm8k=6", "the limit of gsm8k is given twice"),
        ("100,adsub=all", "unknown task or group 'adsub'. Did you mean 'AddSub'?"),
    ],
)
def test_what_is_no_limit_is_refused(text: str, words: str) -> None:
    with pytest.raises(GraftError) as error:
        Limits.parse(text)
    assert words in str(error.value)


def test_a_limit_without_effect_is_refused() -> None:
    limits = Limits.parse("100,boolq=all")
    limits.check(tasks.select("commonsense"))
    with pytest.raises(
        GraftError, match="a limit is given for 'boolq', which is not evaluated; the tasks are gsm8k, SVAMP"
    ):
        limits.check(tasks.select("gsm8k,svamp"))
    with pytest.raises(GraftError, match="a data file takes one number"):
        limits.plain("a data file")
    assert Limits.parse("5").plain("a data file") == 5
