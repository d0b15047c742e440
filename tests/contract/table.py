"""The table of the adapter contract: one row is one adapter configuration on one model family.

Every variant (variants.py) meets every family that has what its kind declares that it `needs`. Every test of this folder reads the rows
from here. What a kind promises is checked by `graft.testing`, which anybody can run on a kind of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

import graft
from graft.testing import CHECKS
from graft.testing.bases import CAUSAL as CAUSAL
from graft.testing.bases import ENDS as ENDS
from graft.testing.bases import FAMILIES as FAMILIES
from graft.testing.bases import GROUPED as GROUPED
from graft.testing.bases import PAD as PAD
from graft.testing.bases import VOCABULARY as VOCABULARY
from graft.testing.bases import base_tensors as base_tensors
from graft.testing.bases import ids as ids
from graft.testing.bases import logits as logits
from graft.testing.bases import loss as loss
from graft.testing.bases import outputs as outputs
from graft.testing.bases import pristine as pristine
from graft.testing.bases import same_base as same_base
from graft.testing.bases import tiny_base
from graft.testing.case import Case as Row
from graft.testing.case import randomise as randomise
from tests.contract.variants import OF_FAMILY, VARIANTS

base = tiny_base


def with_adapters(family: str, **adapters: Any) -> Any:
    """A tiny base of a family with adapters whose parameters are random, each with a seed of its own."""
    model = base(family)
    graft.attach(model, adapters)
    for number, name in enumerate(adapters):
        randomise(model, name, number)
    return model


def applies(family: str, spec: Any) -> bool:
    """Whether a family has what the kinds of a configuration declare that they need."""
    return not Row(family, "", spec).missing_sites


ROWS: tuple[Row, ...] = tuple(
    Row(family, variant, spec)
    for family in FAMILIES
    for variant, spec in {**VARIANTS, **OF_FAMILY.get(family, {})}.items()
    if applies(family, spec)
)


def _default() -> frozenset[str]:
    """Rows of the default suite: the first two variants of each kind, each on one family in turn, and each family's first own variant."""
    by_kind: dict[str, list[str]] = {}
    for variant, spec in VARIANTS.items():
        by_kind.setdefault(Row("llama", variant, spec).config.kind, []).append(variant)
    chosen = {f"{family}-{next(iter(own))}" for family, own in OF_FAMILY.items()}
    for turn, variants in enumerate(by_kind.values()):
        for number, variant in enumerate(variants[:2]):
            fitting = [row.id for row in ROWS if row.variant == variant]
            chosen.add(fitting[(turn + 3 * number) % len(fitting)])
    return frozenset(chosen)


DEFAULT = _default()


def row_of(wanted: str) -> Row:
    """One row by its id."""
    return next(row for row in ROWS if row.id == wanted)


def rows(select: str | Iterable[str] = "", where: Any = None) -> pytest.MarkDecorator:
    """Parametrise a test over the rows with these ids for which `where` holds; without ids over all, of which most are slow."""
    wanted = select.split() if isinstance(select, str) else list(select)
    unknown = set(wanted) - {row.id for row in ROWS}
    assert not unknown, f"no such rows: {sorted(unknown)}"
    chosen = [row for row in ROWS if (not wanted or row.id in wanted) and (where is None or where(row))]
    slow = {row.id for row in chosen if not wanted and row.id not in DEFAULT}
    marked = [pytest.param(row, id=row.id, marks=pytest.mark.slow if row.id in slow else ()) for row in chosen]
    return pytest.mark.parametrize("row", marked)


def attached(
    row: Row, attention: str | None = None, dtype: torch.dtype = torch.float32, *names: str, fresh: bool = False
) -> Any:
    """A base with the row's adapter under each name (default "a"), each with weights of its own, in evaluation mode."""
    return row.attached(*names, attention=attention, dtype=dtype, fresh=fresh)


def check(name: str, row: Row) -> None:
    """Hold a row to one promise of `graft.testing`. The tests choose rows that it speaks of, so one that does not apply is a failure."""
    CHECKS[name](row)
