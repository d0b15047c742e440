"""The adapter contract as tests that run on any kind, Graft's or yours.

On the command line: `graft kinds --contract my_kind.py`. In Python: `run_contract(MyKind())` returns a report. In pytest:

    import graft.testing

    @graft.testing.contract(MyKind(), MyKind(rank=3))
    def test_contract(case, check):
        check(case)
"""

from graft.testing.bases import DEFAULT_FAMILIES, FAMILIES, tiny_base
from graft.testing.case import Case, DoesNotApply, randomise
from graft.testing.checks import CHECKS, Check
from graft.testing.pytest_form import contract
from graft.testing.run import Report, Row, run_contract

__all__ = [
    "CHECKS",
    "DEFAULT_FAMILIES",
    "FAMILIES",
    "Case",
    "Check",
    "DoesNotApply",
    "Report",
    "Row",
    "contract",
    "randomise",
    "run_contract",
    "tiny_base",
]
