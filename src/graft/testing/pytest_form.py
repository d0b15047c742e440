"""The contract as a parametrised test, for pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from graft.testing.bases import DEFAULT_FAMILIES
from graft.testing.case import Case, DoesNotApply
from graft.testing.checks import CHECKS, Check
from graft.testing.run import Contract


@dataclass(frozen=True, eq=False)
class TestedCheck:
    """A check as the argument `check` of a test: what does not apply is skipped, with the reason."""

    __test__ = False  # pytest would collect the class by its name

    check: Check
    contract: Contract

    def __call__(self, case: Case) -> None:
        """Run the check; skip the test where it does not apply."""
        import pytest

        try:
            self.contract.run(self.check, case)
        except DoesNotApply as reason:
            pytest.skip(str(reason))


def contract(*kinds: Any, families: Iterable[str] = DEFAULT_FAMILIES) -> Callable[[Any], Any]:
    """Parametrise a test with arguments `case` and `check` over every promise, every config and every family:

        @graft.testing.contract(MyKind(), MyKind(rank=3))
        def test_contract(case, check):
            check(case)

    kinds: configs, config classes or kinds' names. Needs pytest, which Graft itself does not depend on.
    """
    import pytest

    cases = Contract(kinds, families)
    return pytest.mark.parametrize(
        ("case", "check"),
        [
            pytest.param(case, TestedCheck(check, cases), id=f"{case.id}-{check.name}")
            for case in cases.cases
            for check in CHECKS.values()
        ],
    )
