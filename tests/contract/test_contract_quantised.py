"""The contract on bases in 4 and 8 bits: every kind keeps every promise there, and refuses to merge into few bits."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from graft.testing import CHECKS, DoesNotApply
from graft.testing.bases import QUANTISED
from tests.contract.table import Row
from tests.contract.variants import OF_FAMILY, VARIANTS

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")

ROWS = {
    row.id: row
    for family in QUANTISED
    for variant, spec in {**VARIANTS, **OF_FAMILY.get(family.partition("-")[0], {})}.items()
    # A fusion refers to adapters of one base, and these bases are quantised anew for each dtype. The gradient of its key's bias is zero
    # but for rounding, so it says nothing about company.
    if not variant.startswith("fusion") and not (row := Row(family, variant, spec)).missing_sites
}
FAST = (
    "llama-nf4-lora",
    "llama-nf4-dora",
    "llama-int8-hira",
    "llama-int8-mam",
    "gpt2-nf4-oft-fused",
    "bert-int8-pissa",
)
QUICK = (
    "fresh_adapter_is_identity_or_declares_it", "every_parameter_trains", "loads_back_the_same", "merges_or_refuses",
    "mixed_batch_equals_each_alone", "base_never_changes", "checkpointing_gives_the_same_gradients",
)  # fmt: skip
LONG = ("fresh_process_computes_the_same", "one_compiled_graph_serves_every_choice")
"""Checks that take many seconds each; they run on the rows in `FAST`."""


def broken(row: Row, checks: Iterable[str]) -> dict[str, str]:
    """The promises that a row does not keep, with what was found."""
    found = {}
    for name in checks:
        try:
            CHECKS[name](row)
        except DoesNotApply:
            continue
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.parametrize("name", FAST)
def test_the_main_promises_hold_on_a_quantised_base(name: str) -> None:
    assert broken(ROWS[name], QUICK) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_every_promise_holds_on_a_quantised_base(name: str) -> None:
    assert broken(ROWS[name], (check for check in CHECKS if check not in LONG or name in FAST)) == {}
