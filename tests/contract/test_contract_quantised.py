"""The contract on bases in 4 and 8 bits: every kind keeps every promise there, but that nothing is merged into few bits."""

from __future__ import annotations

import pytest

from graft.testing import CHECKS, DoesNotApply
from graft.testing.bases import QUANTISED
from tests.contract.table import Row
from tests.contract.variants import OF_FAMILY, VARIANTS

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")

FAST = {
    "llama-nf4-lora", "llama-nf4-dora", "llama-int8-hira", "llama-int8-mam", "gpt2-nf4-oft-fused", "bert-int8-pissa", "t5-nf4-lora",
}  # fmt: skip
QUICK = {"fresh_adapter_changes_nothing", "every_parameter_trains", "loads_exactly", "rows_are_independent"}


def _rows() -> list[Row]:
    return [
        Row(family, variant, spec)
        for family in QUANTISED
        for variant, spec in {**VARIANTS, **OF_FAMILY.get(family.partition("-")[0], {})}.items()
        if not Row(family, variant, spec).missing_sites
    ]


@pytest.mark.parametrize(
    ("row", "check"),
    [
        pytest.param(
            row, check, id=f"{row.id}-{check}", marks=() if row.id in FAST and check in QUICK else pytest.mark.slow
        )
        for row in _rows()
        for check in CHECKS
    ],
)
def test_every_promise_holds_on_a_quantised_base(row: Row, check: str) -> None:
    try:
        CHECKS[check](row)
    except DoesNotApply as why:
        pytest.skip(str(why))
