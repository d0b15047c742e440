"""Draws of a pass, a row and a token: the same in any layout and company, and evenly spread."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graft
from graft.routing.context import AdapterContext, ForwardContext

LENGTHS, SEEDS, SHARED = (4, 2, 5, 3), (11, 12, 13, 14), (7, 8, 7, 8)


@pytest.mark.parametrize("per", ["pass", "row"])
def test_draws_of_a_row_are_the_same_alone_in_company_and_flat(per: Any) -> None:
    rows = ("a", "b", "a", "a")
    padded = ForwardContext(rows, LENGTHS, seeds=SEEDS, pass_seeds=SHARED)
    flat = ForwardContext(rows, LENGTHS, flat=True, seeds=SEEDS, pass_seeds=SHARED)
    wanted = [
        AdapterContext(seeds=(a,), pass_seeds=(b,)).draw(5, 3, per)[0] for a, b in zip(SEEDS, SHARED, strict=True)
    ]
    together = {name: ctx.draw(5, 3, per) for name, _, ctx in padded.groups(torch.zeros(4, 5, 2))}
    assert together == {"a": (wanted[0], wanted[2], wanted[3]), "b": (wanted[1],)}
    pieces = [(index, ctx.draw(5, 3, per)) for _, index, ctx in flat.groups(torch.zeros(1, 14, 2))]
    assert pieces == [(slice(0, 4), (wanted[0],)), (slice(4, 6), (wanted[1],)), (slice(6, 14), tuple(wanted[2:]))]


def test_draws_of_tokens_are_the_same_alone_in_company_and_flat() -> None:
    padded = AdapterContext(LENGTHS, False, SEEDS).draw_by_token(torch.zeros(4, 5, 2), 5, 3)
    flat = AdapterContext(LENGTHS, True, SEEDS).draw_by_token(torch.zeros(1, 14, 2), 5, 3)
    for row, (seed, length) in enumerate(zip(SEEDS, LENGTHS, strict=True)):
        alone = AdapterContext((length,), False, (seed,)).draw_by_token(torch.zeros(1, length, 2), 5, 3)[0]
        start = sum(LENGTHS[:row])
        assert torch.equal(padded[row, :length], alone) and torch.equal(flat[0, start : start + length], alone)
        assert not padded[row, length:].any()


def test_a_pass_draws_once_and_without_pass_seeds_by_the_first_row_of_an_adapter() -> None:
    context = ForwardContext(("a", "b", "a"), seeds=(1, 2, 3))
    for name, _, ctx in context.groups(torch.zeros(3, 4, 2)):
        first = {"a": 1, "b": 2}[name]
        assert ctx.pass_seeds == (first,) * len(ctx.seeds or ())
        assert context.prompt_seed(name) == first
    assert len(set(AdapterContext().draw(1000, 0, "pass", rows=3))) == 1
    assert len(set(AdapterContext().draw(10**9, 0, "row", rows=3))) == 3


def test_numbers_are_even_and_those_of_two_sites_independent() -> None:
    ctx = AdapterContext(pass_seeds=tuple(range(4000)))
    first, second = (torch.tensor(ctx.draw(4, site)) for site in (0, 1))
    counts = torch.bincount(first * 4 + second, minlength=16).double()
    assert (
        float(((counts - 250) ** 2 / 250).sum()) < 37.7
    )  # chi-squared, 15 degrees of freedom: above it once in a thousand


def test_seeds_that_do_not_fit_the_rows_are_an_error() -> None:
    with pytest.raises(graft.GraftError, match="2 dropout seeds for 2 rows do not fit"):
        AdapterContext(seeds=(1, 2)).draw_by_token(torch.zeros(3, 1, 1), 4, 0)
    with pytest.raises(graft.GraftError, match="3 rows, 2 pass seeds"):
        ForwardContext(("a", "a", "b"), pass_seeds=(1, 2))
