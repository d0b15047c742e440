"""A pass: whose rows these are, where they lie, and dropout that depends on a row's own seed alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graft.errors import GraftError
from graft.routing.context import AdapterContext, ForwardContext

LENGTHS, SEEDS, SITE, P = (4, 2, 5), (11, 12, 11), 3, 0.5


def padded(segments: list[Tensor]) -> Tensor:
    """[B, L, D] with right padding of ones."""
    return torch.nn.utils.rnn.pad_sequence(segments, batch_first=True, padding_value=1.0)


def segments() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(length, 6, generator=generator) + 1 for length in LENGTHS]


def test_seeded_dropout_is_the_same_flat_padded_and_alone() -> None:
    parts = segments()
    flat = AdapterContext(LENGTHS, True, SEEDS).dropout(torch.cat(parts)[None], P, SITE)[0].split(LENGTHS)
    batch = AdapterContext(LENGTHS, False, SEEDS).dropout(padded(parts), P, SITE)
    for row, part in enumerate(parts):
        alone = AdapterContext((len(part),), False, (SEEDS[row],)).dropout(part[None], P, SITE)[0]
        assert torch.equal(flat[row], alone)
        assert torch.equal(batch[row, : len(part)], alone)
        assert torch.equal(batch[row, len(part) :], torch.ones(5 - len(part), 6))


def test_seeded_dropout_keeps_the_mean_and_scales_what_it_keeps() -> None:
    x = torch.ones(1, 100, 100)
    kept = AdapterContext((100,), False, (7,)).dropout(x, 0.25, 0)
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert kept.mean().item() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
def test_seeded_dropout_drops_the_share_that_is_asked_for_anywhere_in_a_row(p: float) -> None:
    """Within four standard deviations of a binomial, for each of the four numbers that one random word gives, and for neighbours."""
    x = torch.ones(8, 200, 129, dtype=torch.float64)
    dropped = (AdapterContext(None, False, tuple(range(8))).dropout(x, p, SITE) == 0).double()
    spread = (p * (1 - p)) ** 0.5
    for lane in range(4):
        own = dropped.flatten()[lane::4]
        assert abs(own.mean().item() - p) < 4 * spread / own.numel() ** 0.5
    centred = (dropped.flatten() - p) / spread
    assert abs((centred[1:] * centred[:-1]).mean().item()) < 4 / centred.numel() ** 0.5


def test_seeded_dropout_differs_by_seed_and_by_site_and_leaves_the_global_generator_alone() -> None:
    x = torch.ones(1, 20, 20)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draws = [
        AdapterContext((20,), False, (seed,)).dropout(x, P, site) for seed, site in ((1, 0), (1, 1), (2, 0), (1, 0))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_dropout_without_seeds_is_torchs_own() -> None:
    x = torch.ones(2, 3, 4)
    torch.manual_seed(5)
    ours = AdapterContext().dropout(x, P, SITE)
    torch.manual_seed(5)
    assert torch.equal(ours, torch.nn.functional.dropout(x, P))
    assert AdapterContext(None, False, (1, 2)).dropout(x, 0.0, SITE) is x


def test_groups_of_a_padded_pass_are_the_rows_of_each_adapter_with_their_own_context() -> None:
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 1]])
    context = ForwardContext(("a", None, "b", "a"), lengths=(2, 1, 2, 1), seeds=(5, 6, 7, 8), mask=mask)
    (first, rows, ctx), (second, slice_, other) = context.groups(torch.zeros(4, 2, 3))
    assert (first, rows.tolist(), ctx.lengths, ctx.seeds) == ("a", [0, 3], (2, 1), (5, 8))  # pyright: ignore
    assert ctx.mask is not None and torch.equal(ctx.mask, mask[[0, 3]])
    assert (second, slice_, other.lengths, other.seeds) == ("b", slice(2, 3), (2,), (7,))
    assert context.names == {"a", "b"}


def test_groups_of_a_flat_pass_are_runs_of_segments() -> None:
    context = ForwardContext(("a", "a", None, "a"), lengths=(2, 1, 3, 2), flat=True, seeds=(1, 2, 3, 4))
    groups = [(name, index, ctx.lengths, ctx.seeds) for name, index, ctx in context.groups(torch.zeros(1, 8, 3))]
    assert groups == [("a", slice(0, 3), (2, 1), (1, 2)), ("a", slice(6, 8), (2,), (4,))]


def test_beams_follow_their_rows_by_repetition() -> None:
    assert ForwardContext(("a", None)).row_names(6) == ("a", "a", "a", None, None, None)
    assert ForwardContext("a").row_names(2) == ("a", "a")


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_a_batch_of_another_size_is_an_error(rows: int) -> None:
    with pytest.raises(GraftError, match=f"the batch has {rows} rows, but the routing names 3"):
        ForwardContext(("a", None, "b")).row_names(rows)


def test_a_flat_pass_needs_lengths_that_cover_its_tokens() -> None:
    with pytest.raises(GraftError, match="needs the length of every segment"):
        ForwardContext("a", flat=True)
    with pytest.raises(GraftError, match=r"padding-free batch of 5 tokens does not fit a tensor of shape \(1, 6, 2\)"):
        ForwardContext(("a", "b"), lengths=(2, 3), flat=True).groups(torch.zeros(1, 6, 2))


def test_counts_that_disagree_are_an_error() -> None:
    with pytest.raises(GraftError, match="2 rows, 3 lengths"):
        ForwardContext(("a", "b"), lengths=(1, 2, 3))
    with pytest.raises(GraftError, match="3 lengths, 2 seeds"):
        ForwardContext("a", lengths=(1, 2, 3), seeds=(1, 2))


def test_seeds_for_another_number_of_rows_are_an_error() -> None:
    with pytest.raises(GraftError, match=r"2 dropout seeds for 2 rows do not fit a tensor of shape \(3, 4, 5\)"):
        AdapterContext(None, False, (1, 2)).dropout(torch.ones(3, 4, 5), P, SITE)
    with pytest.raises(GraftError, match=r"for 5 tokens do not fit a tensor of shape \(1, 6, 5\)"):
        AdapterContext((2, 3), True, (1, 2)).dropout(torch.ones(1, 6, 5), P, SITE)
