"""Grouped products give what one product after another gives: values, gradients, dropout, any ranks and rows; torch's operator runs on a
CPU too, so that all but the choice of the device is proven here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graft
from graft.attaching.active import running, set_trainable
from graft.ops import low_rank as fused
from graft.ops import low_rank_grouped as grouped
from graft.ops.low_rank import add_low_rank
from graft.ops.low_rank_linear import linear_low_rank
from graft.ops.low_rank_update import LowRankUpdate
from graft.routing.context import AdapterContext, ForwardContext
from tests.small import small_model

I, O = 24, 16  # noqa: E741
RANKS = (3, 8, 20, 70, 100)
LENGTHS = (3, 5, 2, 4, 6)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grouped products wherever torch has any, kernel or not; how many terms each took."""
    made: list[int] = []

    def noted(out: Tensor, x: Tensor, terms: Sequence[LowRankUpdate]) -> list[Tensor]:
        made.append(len(terms))
        return grouped.add_grouped_(out, x, terms)

    monkeypatch.setattr(grouped, "has_kernel", lambda x: x.dtype in (torch.float32, torch.bfloat16))
    monkeypatch.setattr(fused, "add_grouped_", noted)
    return made


def terms(
    flat: bool, p: float = 0.0, gap: int = 0, dtype: torch.dtype = torch.float32, ranks: Sequence[int] = RANKS,
    device: str = "cpu", sizes: tuple[int, int] = (I, O),
) -> list[LowRankUpdate]:  # fmt: skip
    """Adapters of unequal rank, scale and number of rows; before each but the first there are `gap` rows that none serves."""
    torch.manual_seed(3)
    made, start = [], 0
    for number, (rank, length) in enumerate(zip(ranks, LENGTHS, strict=False)):
        A = (torch.randn(rank, sizes[0], dtype=dtype) / rank**0.5).to(device).requires_grad_()
        B = torch.randn(sizes[1], rank, dtype=dtype).to(device).requires_grad_()
        count = length if flat else 1 + number % 2
        ctx = AdapterContext((length,) if flat else None, flat, (7 + number,) if flat else tuple(range(count)))
        made.append(
            LowRankUpdate(A, B, 0.7 + number / 3, p if number % 2 else p / 2, number, ctx, slice(start, start + count))
        )
        start += count + gap
    return made


def inputs(given: Sequence[LowRankUpdate], gap: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    rows = max(term.rows.stop for term in given) + gap  # type: ignore[union-attr]
    shape = (1, rows) if given[0].ctx.flat else (rows, 3)
    x, h = (torch.randn(*shape, size).to(dtype).requires_grad_() for size in (I, O))
    return x, h


def in_float64(term: LowRankUpdate) -> LowRankUpdate:
    A, B = (factor.detach().double().requires_grad_() for factor in (term.A, term.B))
    return LowRankUpdate(A, B, term.scale, term.p, term.site_index, term.ctx, term.rows)


def by_hand(x: Tensor, h: Tensor, given: Sequence[LowRankUpdate]) -> Tensor:
    """The rows one after another, by operations that autograd knows."""
    dim, done, out = given[0].dim, 0, []
    for term in sorted(given, key=lambda each: each.rows.start):  # type: ignore[union-attr]
        assert term.rows is not None
        out += [h.narrow(dim, done, term.rows.start - done), term.rows_of(h) + term.plain(term.rows_of(x))]
        done = term.rows.stop
    return torch.cat([*out, h.narrow(dim, done, h.shape[dim] - done)], dim)


def leaves(x: Tensor, h: Tensor, given: Sequence[LowRankUpdate]) -> list[Tensor]:
    return [x, h, *(factor for term in given for factor in (term.A, term.B))]


def learnt(out: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    """The output and the gradients under one weight per number."""
    torch.manual_seed(5)
    weight = torch.randn(out.shape, dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, of, weight.to(out))]


def exactly(x: Tensor, h: Tensor, given: Sequence[LowRankUpdate]) -> list[Tensor]:
    wide, (x, h) = [in_float64(term) for term in given], (t.detach().double().requires_grad_() for t in (x, h))
    return learnt(by_hand(x, h, wide), leaves(x, h, wide))


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("gap", [0, 2])
def test_values_and_gradients_are_those_of_the_equations(calls: list[int], flat: bool, gap: int, p: float) -> None:
    given = terms(flat, p, gap)
    x, h = inputs(given, gap)
    found = learnt(add_low_rank(x, h * 1.0, given, in_place=gap == 0), leaves(x, h, given))
    assert calls == [3, 2]  # ranks up to 64, and those up to 128
    for own, other in zip(found, exactly(x, h, given), strict=True):
        assert distance(own, other) < 1e-6


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("gap", [0, 1])
def test_beside_a_frozen_layer_the_gradient_of_the_input_is_added_to(calls: list[int], gap: int, p: float) -> None:
    given = terms(False, p, gap)
    (x, _), host = inputs(given, gap), nn.Linear(I, O).requires_grad_(False)
    factors = leaves(x, x, given)[2:]
    found = learnt(linear_low_rank(host, x, given), [x, *factors])
    wide, x64 = [in_float64(term) for term in given], x.detach().double().requires_grad_()
    out = by_hand(x64, host.double()(x64), wide)
    for own, other in zip(found, learnt(out, [x64, *leaves(x, x, wide)[2:]]), strict=True):
        assert distance(own, other) < 1e-6
    assert calls


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bfloat16_is_as_near_the_truth_as_one_after_another(calls: list[int], monkeypatch: Any, p: float) -> None:
    given = terms(True, p)
    x, h = inputs(given, 0, torch.bfloat16)
    exact = exactly(x, h, given)
    found = learnt(add_low_rank(x, h, given), leaves(x, h, given))
    assert calls and [each.dtype for each in found[1:4]] == [torch.bfloat16, torch.bfloat16, torch.float32]
    monkeypatch.setattr(grouped, "has_kernel", lambda x: False)
    loop = learnt(add_low_rank(x, h, given), leaves(x, h, given))
    errors = [[distance(own, other) for own, other in zip(way, exact, strict=True)] for way in (found, loop)]
    assert max(errors[0]) < 2**-7
    assert sum(errors[0]) <= 1.1 * sum(errors[1])


def test_rows_in_any_order_and_several_runs_of_one_job_are_summed(calls: list[int]) -> None:
    given = terms(True)
    first, last = given[0], given[4]
    runs = [last, *given[1:4], LowRankUpdate(last.A, last.B, last.scale, 0.0, 0, first.ctx, first.rows)]
    x, h = inputs(runs, 0)
    factors = [last.A, last.B]
    found = learnt(add_low_rank(x, h, runs), [x, *factors])
    wide = [in_float64(last), *(in_float64(term) for term in given[1:4])]
    wide.append(LowRankUpdate(wide[0].A, wide[0].B, last.scale, 0.0, 0, first.ctx, first.rows))
    x64, h64 = x.detach().double().requires_grad_(), h.detach().double()
    wanted = learnt(by_hand(x64, h64, wide), [x64, wide[0].A, wide[0].B])
    for own, other in zip(found, wanted, strict=True):
        assert distance(own, other) < 1e-6
    assert calls == [3, 2]


def test_factors_that_do_not_train_get_no_gradient(calls: list[int]) -> None:
    given = terms(True, ranks=(4, 8, 2))
    given[1].A.requires_grad_(False)
    given[1].B.requires_grad_(False)
    given[2].B.requires_grad_(False)
    x, h = (tensor.detach() for tensor in inputs(given, 0))
    add_low_rank(x, h, given).square().sum().backward()
    assert calls == [3]
    assert [each.grad is not None for each in leaves(x, h, given)[2:]] == [True, True, False, False, True, False]
    assert given[0].B.grad is not None and given[0].B.grad.shape == (O, 4)


def test_a_gradient_that_is_one_number_for_all_is_laid_out_for_the_kernel(calls: list[int]) -> None:
    given = terms(True)
    x, h = inputs(given, 0)
    out = add_low_rank(x, h, given)
    found = torch.autograd.grad(out.sum(), leaves(x, h, given), retain_graph=True)
    wanted = torch.autograd.grad(out, leaves(x, h, given), torch.ones_like(out))
    assert calls and all(torch.equal(own, other) for own, other in zip(found, wanted, strict=True))


def test_numbers_of_one_job_that_are_no_numbers_reach_no_other(calls: list[int]) -> None:
    given = terms(True, gap=1)
    x, h = inputs(given, 1)
    sound = learnt(add_low_rank(x, h, given), leaves(x, h, given))
    broken = x.detach().clone()
    given[1].rows_of(broken).fill_(float("nan"))
    broken.requires_grad_()
    found = learnt(add_low_rank(broken, h, given), leaves(broken, h, given))
    for number, (own, other) in enumerate(zip(found[3:], sound[3:], strict=True)):
        assert torch.equal(own, other) != (number in (2, 3)), number  # the second job's A and B
    for number, term in enumerate(given):
        assert torch.equal(term.rows_of(found[0]), term.rows_of(sound[0])) != (number == 1)


def test_for_backward_it_keeps_the_products_of_rank_width_and_no_stack(calls: list[int]) -> None:
    given = terms(True, ranks=(5, 8))
    x, h = inputs(given, 0)
    own = {each.untyped_storage().data_ptr() for each in leaves(x, h, given)}
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), t)[1], lambda t: t
    ):
        add_low_rank(x, h, given)
    assert calls and sum(size for at, size in kept.items() if at not in own) == sum(LENGTHS[:2]) * 8 * 4


@pytest.mark.parametrize("flat", [True, False])
def test_a_model_with_rows_of_several_adapters_and_of_none_learns_as_each_alone(calls: list[int], flat: bool) -> None:
    """Alone, an adapter is one term, which the loop computes."""
    model = small_model(scale=2.0)
    ranks = {"a": 2, "b": 5, "c": 70}
    for name, rank in ranks.items():
        graft.attach(model, {name: graft.LoRA(rank=rank, dropout=0.2, sites="linear")})
    torch.manual_seed(0)
    with torch.no_grad():
        for name in ranks:
            for _, parameter in graft.parameters(model, name):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    set_trainable(model, list(ranks))
    model.train()
    order = ("a", "b", None, "a", "c", "b") if flat else ("a", "a", "b", "b", None, "c")
    ids = torch.randint(2, 200, (6, 7), generator=torch.Generator().manual_seed(1))

    def gradients(chosen: list[int]) -> dict[str, Tensor]:
        batch, lengths = ids[chosen], (7,) * len(chosen)
        context = ForwardContext(tuple(order[row] for row in chosen), lengths, flat, tuple(chosen))
        more: dict[str, Any] = {}
        if flat:
            batch, more = batch.view(1, -1), {"position_ids": torch.arange(7).repeat(len(chosen))[None]}
        model.zero_grad()
        with running(model, context):
            model(input_ids=batch, use_cache=False, **more).logits.square().mean(-1).sum().backward()
        return {
            f"{name}.{key}": p.grad for name in ranks for key, p in graft.parameters(model, name) if p.grad is not None
        }

    found = gradients(list(range(6)))
    assert len(calls) == 7 * 2
    for name in ranks:
        alone = gradients([row for row in range(6) if order[row] == name])
        for key in (key for key in found if key.startswith(f"{name}.")):
            assert distance(found[key], alone[key].double()) < 1e-4, key
