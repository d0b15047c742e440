"""The table itself: every kind on every family that it applies to, in the default suite once at least; the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest

import graft
from graft.adapters.registry import kinds
from tests.contract.table import CAUSAL, DEFAULT, FAMILIES, ROWS, Row, applies, base, rows, same_base
from tests.contract.variants import OF_FAMILY, VARIANTS


def kinds_of(row: Row) -> set[str]:
    return {row.config.kind, *(part.kind for part in row.config.parts())}


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_has_rows_in_the_default_suite_and_on_every_family_that_it_applies_to(kind: str) -> None:
    plain = next((spec for variant, spec in VARIANTS.items() if Row("llama", variant, spec).config.kind == kind), None)
    assert plain is not None, f"tests/contract/variants.py has no variant of kind '{kind}'"
    assert any(kind in kinds_of(row) for row in ROWS if row.id in DEFAULT)
    covered = {row.family for row in ROWS if row.config.kind == kind}
    assert covered == {family for family in FAMILIES if applies(family, plain)} and covered


def test_every_family_has_rows_in_the_default_suite() -> None:
    for family in FAMILIES:
        assert sum(row.family == family for row in ROWS if row.id in DEFAULT) >= 4, family


@pytest.mark.parametrize(
    ("family", "variant"),
    [(family, variant) for family in FAMILIES for variant, spec in VARIANTS.items() if not applies(family, spec)],
)
def test_what_does_not_apply_is_refused_and_leaves_the_base_as_it_was(family: str, variant: str) -> None:
    model: Any = base(family)
    with pytest.raises(graft.GraftError):
        graft.attach(model, {"a": VARIANTS[variant]})
    assert same_base(model, family)


def test_the_table_names_its_rows_once_and_its_families_are_known() -> None:
    assert len({row.id for row in ROWS}) == len(ROWS)
    assert set(OF_FAMILY) <= set(FAMILIES) and set(FAMILIES) > CAUSAL
    with pytest.raises(AssertionError, match="no such rows"):
        rows("llama-nothing")
