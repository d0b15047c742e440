"""The mean of a row: the same in a padded batch with padding on either side, in a padding-free one, and alone."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

import graft
from graft.adapters.base import Adapter, AdapterConfig
from graft.adapters.registry import _registered
from graft.architectures.site import SiteSpec
from graft.errors import GraftError
from graft.routing.context import AdapterContext
from tests.contract.table import base, ids

LENGTHS = (4, 2, 5)


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(length, 6, generator=generator, dtype=torch.float64) for length in LENGTHS]


def padded(side: str) -> tuple[Tensor, Tensor]:
    """[R, L, D] with sevens as padding, and the mask [R, L]."""
    x, mask = torch.full((3, 5, 6), 7.0, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.long)
    for row, part in enumerate(rows()):
        at = slice(0, len(part)) if side == "right" else slice(5 - len(part), 5)
        x[row, at], mask[row, at] = part, 1
    return x, mask


def test_a_mean_over_tokens_is_the_same_in_every_layout() -> None:
    wanted = torch.stack([row.mean(0) for row in rows()])
    flat = AdapterContext(LENGTHS, True).mean(torch.cat(rows())[None])
    found = [AdapterContext(mask=mask).mean(x) for x, mask in map(padded, ("left", "right"))]
    by_lengths = AdapterContext(LENGTHS).mean(padded("right")[0])
    for each in (flat, *found, by_lengths):
        torch.testing.assert_close(each, wanted, atol=1e-15, rtol=0)


def test_a_mean_over_positions_counts_padding() -> None:
    x, mask = padded("left")
    assert torch.equal(AdapterContext(mask=mask).mean(x, over="positions"), x.mean(1))


def test_a_vector_per_row_is_laid_over_its_tokens() -> None:
    y = torch.tensor([[1.0], [2.0], [3.0]])
    flat = AdapterContext(LENGTHS, True).spread(y, torch.zeros(1, 11, 6))
    assert flat.flatten().tolist() == [1] * 4 + [2] * 2 + [3] * 5
    assert AdapterContext().spread(y, torch.zeros(3, 5, 6)).shape == (3, 1, 1)


@pytest.mark.parametrize(
    ("context", "x", "over", "said"),
    [
        (AdapterContext(), torch.zeros(3, 5, 6), "tokens", "needs an attention mask"),
        (AdapterContext(mask=torch.ones(3, 4)), torch.zeros(3, 5, 6), "tokens", r"given: \(3, 4\)"),
        (AdapterContext(mask=torch.ones(3, 6), cached=5), torch.zeros(3, 1, 6), "tokens", "a cache of 5 tokens"),
        (AdapterContext(LENGTHS, True), torch.zeros(1, 11, 6), "positions", "needs a padded batch"),
        (AdapterContext(), torch.zeros(15, 6), "positions", "needs activations"),
    ],
)
def test_a_mean_that_cannot_be_taken_says_why(context: AdapterContext, x: Tensor, over: str, said: str) -> None:
    with pytest.raises(GraftError, match=said):
        context.mean(x, over)  # pyright: ignore[reportArgumentType]


class RowMean(AdapterConfig):
    """Adds the mean of the row's inputs to every token."""

    kind: Literal["row-mean"] = "row-mean"
    sites: str | tuple[str, ...] = "encoder.attn.q"

    def build(self, spec: SiteSpec) -> Adapter:
        return AddsRowMean(spec)


class AddsRowMean(Adapter):
    reads_mask = True

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return h + ctx.spread(ctx.mean(x), h)


@pytest.mark.parametrize(("family", "sites"), [("bert", "attn.q"), ("t5", "encoder.attn.q")])
def test_padding_and_other_rows_do_not_change_a_row(family: str, sites: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_registered, "row-mean", RowMean)
    model = graft.attach(base(family).double(), {"a": RowMean(sites=sites)})
    encoder = model.get_encoder() if family == "t5" else model.bert
    inputs, mask = ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0

    def call(each: Tensor, its: Tensor) -> Tensor:
        if family == "t5":  # generation calls the encoder alone
            return encoder(input_ids=each, attention_mask=its).last_hidden_state
        return model(each, attention_mask=its).logits

    with torch.no_grad():
        together = call(inputs, mask)
        alone = call(inputs[1:, :4], mask[1:, :4])
        with graft.use(model, None):
            assert not torch.allclose(call(inputs, mask), together)
    torch.testing.assert_close(together[1, :4], alone[0], atol=1e-12, rtol=0)
