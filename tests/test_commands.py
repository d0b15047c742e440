"""Orders: files in the run folder that are taken once, after the same step again when a run is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from graft.runs.commands import CommandQueue


def test_orders_are_taken_in_the_order_of_asking_and_once(tmp_path: Path) -> None:
    run, user = CommandQueue(tmp_path), CommandQueue(tmp_path)
    assert not run.due(0) and run.take(0) == []
    user.put("submit", "b", config={"priority": 1})
    user.put("cancel", "a")
    assert run.due(3) and [order["job"] for order in user.pending()] == ["b", "a"]
    taken = run.take(3)
    assert [(order["do"], order["job"], order["step"]) for order in taken] == [("submit", "b", 3), ("cancel", "a", 3)]
    assert not run.due(4) and run.take(4) == [] and user.pending() == [] and run.done == 2


def test_a_resumed_run_takes_them_again_after_the_same_steps_and_new_ones_behind_them(tmp_path: Path) -> None:
    run = CommandQueue(tmp_path)
    for step, job in ((2, "a"), (5, "b"), (7, "c")):
        run.put("cancel", job)
        run.take(step)
    again = CommandQueue(tmp_path)
    again.skip(1)
    again.put("cancel", "d")
    assert not again.due(4) and again.take(4) == []
    assert again.due(5) and [order["job"] for order in again.take(5)] == ["b"]
    assert [order["job"] for order in again.take(7)] == ["c", "d"] and again.done == 4


def test_an_order_that_was_journalled_before_a_kill_is_not_taken_twice(tmp_path: Path) -> None:
    run = CommandQueue(tmp_path)
    run.put("cancel", "a")
    order = run.pending()[0]
    run.journal.append({**order, "step": 3})  # killed before the file was taken away
    again = CommandQueue(tmp_path)
    assert [each["job"] for each in again.take(3)] == ["a"] and again.take(3) == [] and again.pending() == []


def test_a_file_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    run = CommandQueue(tmp_path)
    run.put("cancel", "a")
    (run.inbox / ".half.json.123.tmp").write_text("{")
    assert len(run.pending()) == 1 and len(run.take(0)) == 1
    run.put("cancel", "b")  # the one who wrote it was killed
    assert [path.name[0] for path in run.inbox.iterdir()] != ["."] and len(list(run.inbox.iterdir())) == 1


@pytest.mark.parametrize(
    "text", ["{half", "[]", '{"do": "dance", "job": "a"}', '{"do": "priority", "job": "a"}', '{"do": "cancel"}']
)
def test_a_file_that_is_no_order_is_taken_with_what_is_wrong_and_those_around_it_count(
    tmp_path: Path, text: str
) -> None:
    orders = CommandQueue(tmp_path)
    orders.put("cancel", "a")
    (orders.inbox / "by-hand.json").write_text(text)
    taken = orders.take(3)
    assert [(order["do"], order["job"]) for order in taken] == [("cancel", "a"), ("unknown", "by-hand.json")]
    assert taken[1]["reason"] and orders.pending() == [] and not orders.due(4)
    assert [order["do"] for order in CommandQueue(tmp_path).take(3)] == ["cancel", "unknown"]


def test_orders_keep_their_order_when_the_clock_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([5_000, 3_000, 1_000, 9_000])
    monkeypatch.setattr("graft.runs.commands.time.time_ns", lambda: next(clock))
    orders = CommandQueue(tmp_path)
    orders.put("cancel", "a")
    orders.put("cancel", "b")
    assert [order["job"] for order in orders.take(0)] == ["a", "b"]
    orders.put("cancel", "c")
    orders.put("cancel", "d")
    assert [order["job"] for order in orders.take(1)] == ["c", "d"]
    assert [order["id"][:20].lstrip("0") for order in orders.journal.read()] == ["5000", "5001", "5002", "9000"]
