"""Every second of a run counts for one part: by a clock whose hands the test moves."""

from __future__ import annotations

import pytest

from graft.utils import clock
from graft.utils.clock import Clock, describe_times, timed


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    hands = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: hands[0])
    return hands


def test_the_innermost_part_gets_the_time_and_the_parts_add_up_to_the_whole(now: list[float]) -> None:
    def spend(seconds: float) -> None:
        now[0] += seconds

    batch = timed("batches")(lambda: spend(2.0))

    @timed("step")
    def step() -> None:
        spend(10.0)
        batch()
        spend(5.0)

    @timed("validation")
    def validation() -> None:
        batch()  # serves the validation
        spend(1.0)

    @timed("between")
    def loop() -> None:
        step()
        validation()
        spend(0.5)

    here = Clock()
    step()  # before the clock runs, nothing counts
    with here.running():
        spend(3.0)
        loop()
        spend(4.0)
    assert here.read() == {
        "step": 15.0, "batches": 2.0, "between": 0.5, "validation": 3.0, "checkpoints": 0.0, "books": 0.0, "rest": 7.0,
    }  # fmt: skip
    assert sum(here.read().values()) == 27.5
    assert describe_times(here.read()).startswith("27.5 s: 54.5% forward, backward and update, 7.3% making batches, ")


def test_an_error_gives_the_time_back_to_the_part_around(now: list[float]) -> None:
    @timed("step")
    def fails() -> None:
        now[0] += 1.0
        raise ValueError("so it is")

    here = Clock()
    with here.running():
        with pytest.raises(ValueError, match="so it is"):
            fails()
        assert here.phase == "rest"
    assert here.read()["step"] == 1.0 and describe_times(Clock().read()) == "no time yet"


def test_a_timed_function_keeps_its_name_and_what_it_gives() -> None:
    @timed("books")
    def written(text: str, *, twice: bool = False) -> str:
        return text * (2 if twice else 1)

    with Clock().running():
        assert written("ab", twice=True) == "abab" and written.__name__ == "written"
