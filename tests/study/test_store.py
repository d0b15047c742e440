"""The store: no trial twice, none lost, and never that of another study."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from graft.errors import GraftError
from graft.study.store import Store


def test_a_point_is_added_once_and_its_trials_are_taken_once(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "s", {"a": 1})
    assert store.add_point({"x": 1, "y": 2}, [0, 1])
    assert not store.add_point({"y": 2, "x": 1}, [0, 1])
    waiting = store.trials("waiting")
    assert [(each.settings, each.seed) for each in waiting] == [({"x": 1, "y": 2}, 0), ({"x": 1, "y": 2}, 1)]
    pack = store.add_pack(waiting[:1])
    with pytest.raises(AssertionError, match="taken once"):
        store.add_pack(waiting[:1])
    assert len(store.trials("waiting")) == 1 and store.running_packs() == [pack], "the refused one left no trace"
    store.finish(pack, {1: ("done", {"loss": float("nan")}, None)})
    assert store.trials("done")[0].result == {"loss": "nan"} and store.running_packs() == []


def test_an_error_takes_all_changes_back(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "s", {})
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.add_point({"x": 1}, [0])
        _ = 1 / 0
    assert store.points() == 0


def test_two_processes_see_one_store(tmp_path: Path) -> None:
    first, second = Store.open(tmp_path / "s", {"a": 1}), Store.open(tmp_path / "s", None)
    first.add_point({"x": 1}, [0])
    assert second.points() == 1 and not second.add_point({"x": 1}, [0])


def test_the_storage_of_another_study_is_refused_with_what_differs(tmp_path: Path) -> None:
    Store.open(tmp_path / "s", {"study": {"seeds": [0]}, "run": {"train": {"lr": 1}}})
    with pytest.raises(GraftError, match="another study, which differs in seeds, train.lr"):
        Store.open(tmp_path / "s", {"study": {"seeds": [1]}, "run": {"train": {"lr": 2}}})
    (tmp_path / "text").write_text("no data base at all, " * 100)
    with pytest.raises(GraftError, match="not the storage of a study"):
        Store.open(tmp_path / "text", {})


TAKE_TURNS = """
import sys
from pathlib import Path
from graft.study.store import Store

store = Store.open(Path(sys.argv[1]), None)
print("ready", flush=True)
sys.stdin.readline()
while True:
    with store.transaction():
        waiting = store.trials("waiting")[:2]
        pack = store.add_pack(waiting) if waiting else None
    if pack is None:
        break
    store.finish(pack, {each.id: ("done", {"by": sys.argv[2]}, None) for each in waiting})
"""


def test_several_processes_share_the_trials_and_none_is_taken_twice(tmp_path: Path) -> None:
    path = tmp_path / "study.sqlite"
    store = Store.open(path, {"a": 1})
    for number in range(60):
        store.add_point({"train.lr": number}, [0])
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    others = [subprocess.Popen([sys.executable, "-c", TAKE_TURNS, path, name], **pipes) for name in "abc"]
    for each in others:
        assert each.stdout is not None and each.stdout.readline() == "ready\n"
    ends = [each.communicate("go\n", timeout=60) for each in others]
    assert [each.returncode for each in others] == [0, 0, 0], ends
    assert store.counts() == {"done": 60} and not store.running_packs()
    taken = Counter(each.pack for each in store.trials())
    assert set(taken.values()) == {2} and len(taken) == 30
