"""A gated MLP with its LoRAs as one node, and the product in its middle as one, equal plain operations, and keep less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graft.ops.frozen_linear import frozen_linear
from graft.ops.gated_mlp import Layer, gated_mlp
from graft.ops.gated_product import ACTIVATIONS, Activation, gated_product, product_gradients
from graft.ops.low_rank import LowRankUpdate
from graft.ops.low_rank_linear import linear_low_rank, shared_input
from graft.routing.context import AdapterContext

WIDE, HIGH = 6, 8
PLAIN = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda e: F.gelu(e, approximate="tanh")}
LENGTHS = (2, 1, 3)


def linears(bias: bool = False, dtype: torch.dtype = torch.float64) -> list[nn.Linear]:
    torch.manual_seed(1)
    sizes = (WIDE, HIGH), (WIDE, HIGH), (HIGH, WIDE)
    return [nn.Linear(*size, bias=bias, dtype=dtype).requires_grad_(False) for size in sizes]


def terms(hosts: Sequence[nn.Linear], count: int, p: float, flat: bool) -> list[list[LowRankUpdate]]:
    """Of each layer, `count` adapters: one on all rows, or two on rows of their own with a row between them that has none."""
    made: list[list[LowRankUpdate]] = []
    for number, host in enumerate(hosts):
        torch.manual_seed(2 + number)
        starts = (0, 3) if flat else (0, 2)
        lengths = (2, 3) if flat else (1, 1)
        own = []
        for index in range(count):
            rank = 2 + index
            A = torch.randn(rank, host.in_features, dtype=host.weight.dtype).requires_grad_()
            B = torch.randn(host.out_features, rank, dtype=host.weight.dtype).requires_grad_()
            if count == 1:
                ctx, rows = AdapterContext(LENGTHS if flat else None, flat, (1, 2, 3)), None
            else:
                ctx = AdapterContext(lengths[index : index + 1] if flat else None, flat, (index,))
                rows = slice(starts[index], starts[index] + lengths[index])
            own.append(LowRankUpdate(A, B, 0.5 + index, p, 3 * number + index, ctx, rows))
        made.append(own)
    return made


def source(flat: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(7)
    return torch.randn(1, 6, WIDE, dtype=dtype) if flat else torch.randn(3, 2, WIDE, dtype=dtype)


def factors(given: list[list[LowRankUpdate]]) -> list[Tensor]:
    return [factor for own in given for term in own for factor in (term.A, term.B)]


def with_factors(given: list[list[LowRankUpdate]], new: Sequence[Tensor]) -> list[list[LowRankUpdate]]:
    left = iter(new)
    return [
        [LowRankUpdate(next(left), next(left), t.scale, t.p, t.site_index, t.ctx, t.rows) for t in own] for own in given
    ]


def ours(x: Tensor, activation: Activation, hosts: Sequence[nn.Linear], given: list[list[LowRankUpdate]]) -> Tensor:
    parts = [Layer(frozen_linear(host, x), own) for host, own in zip(hosts, given, strict=True)]  # type: ignore[arg-type]
    return gated_mlp(x, activation, *parts)


def plain(x: Tensor, activation: Activation, hosts: Sequence[nn.Linear], given: list[list[LowRankUpdate]]) -> Tensor:
    """By operations that autograd knows."""

    def layer(host: nn.Linear, own: list[LowRankUpdate], x: Tensor) -> Tensor:
        out = host(x)
        for term in own:
            if term.rows is None:
                out = out + term.plain(x)
            else:
                dim = 1 if term.ctx.flat else 0
                at = torch.arange(term.rows.start, term.rows.stop)
                out = out.index_add(dim, at, term.plain(term.rows_of(x)))
        return out

    gate, up, down = zip(hosts, given, strict=True)
    return layer(*down, PLAIN[activation](layer(*gate, x)) * layer(*up, x))


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("count", "p"), [(0, 0.0), (1, 0.0), (1, 0.4), (2, 0.0), (2, 0.4)])
def test_gradients_pass_gradcheck(count: int, p: float, flat: bool) -> None:
    hosts = linears(bias=True)
    given = terms(hosts, count, p, flat)
    x = source(flat).requires_grad_()

    def run(x: Tensor, *new: Tensor) -> Tensor:
        return ours(x, "silu", hosts, with_factors(given, new))

    assert torch.autograd.gradcheck(run, (x, *factors(given)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("count", "p"), [(0, 0.0), (1, 0.4), (2, 0.4)])
@pytest.mark.parametrize("recomputed", [True, False])
def test_it_equals_plain_operations(activation: Activation, count: int, p: float, recomputed: bool) -> None:
    hosts = linears(bias=count == 1)
    given = terms(hosts, count, p, flat=True)
    x = source(True).requires_grad_()
    wanted = plain(x, activation, hosts, given)
    found = (
        checkpoint(ours, x, activation, hosts, given, use_reentrant=False)
        if recomputed
        else ours(x, activation, hosts, given)
    )
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    weight, leaves = torch.randn_like(wanted), [x, *factors(given)]
    for own, other in zip(
        torch.autograd.grad(found, leaves, weight), torch.autograd.grad(wanted, leaves, weight), strict=True
    ):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_terms_the_output_is_the_plain_one_bit_for_bit(activation: Activation) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hosts = linears(dtype=dtype)
        x = source(False, dtype).requires_grad_()
        none: list[list[LowRankUpdate]] = [[], [], []]
        found, wanted = ours(x, activation, hosts, none), plain(x, activation, hosts, none)
        assert torch.equal(found, wanted)


def test_some_layers_may_have_terms_and_others_none() -> None:
    hosts = linears()
    for which in range(3):
        given = [own if number == which else [] for number, own in enumerate(terms(hosts, 1, 0.3, False))]
        for x in (source(False), source(False).requires_grad_()):
            leaves = [*([x] if x.requires_grad else []), *factors(given)]
            found, wanted = (run(x, "gelu", hosts, given).square().sum() for run in (ours, plain))
            for own, other in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True):
                torch.testing.assert_close(own, other, atol=1e-12, rtol=1e-12)


def test_a_graph_that_is_kept_gives_the_same_gradients_twice() -> None:
    hosts = linears()
    given = terms(hosts, 2, 0.4, False)
    x = source(False).requires_grad_()
    out, leaves = ours(x, "silu", hosts, given).square().sum(), [x, *factors(given)]
    first = [each.clone() for each in torch.autograd.grad(out, leaves, retain_graph=True)]
    for own, other in zip(torch.autograd.grad(out, leaves), first, strict=True):
        assert torch.equal(own, other)


def test_the_gradient_of_x_is_one_sum_with_that_of_other_layers_that_read_it() -> None:
    hosts = linears()
    given = terms(hosts, 1, 0.0, False)
    beside = linears()[0]
    x = source(False).requires_grad_() * 1.0
    read = shared_input(x)[0]
    term = LowRankUpdate(*factors(given)[:2], 0.5, 0.0, 0, AdapterContext())
    other = linear_low_rank(beside, x, [term])
    assert other is not None
    out = ours(x, "silu", hosts, given).sum() + other.sum()
    assert shared_input(x)[0] is read
    (found,) = torch.autograd.grad(out, x)
    wanted = plain(x, "silu", hosts, given).sum() + (beside(x) + term.plain(x)).sum()
    torch.testing.assert_close(found, torch.autograd.grad(wanted, x)[0], atol=1e-12, rtol=1e-12)


def kept_bytes(run: Any, known: Sequence[Tensor]) -> int:
    """What the graph of `run` keeps, each storage once, without what is known."""
    there = {tensor.untyped_storage().data_ptr() for tensor in known}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(found.values())


def test_it_keeps_two_tensors_of_the_inner_width_where_plain_operations_keep_four() -> None:
    hosts = linears(dtype=torch.float32)
    x = source(False, torch.float32).requires_grad_() * 1.0
    inner, low = 6 * HIGH * 4, 6 * 2 * 4
    for count, plainly in ((0, 3 * inner), (1, 4 * inner + 3 * low)):  # without LoRA nobody needs h
        given = terms(hosts, count, 0.0, False)
        known = [x, *factors(given), *(host.weight for host in hosts)]
        with_ours = kept_bytes(lambda given=given: ours(x, "silu", hosts, given), known)
        assert with_ours == 2 * inner + count * 3 * low
        assert kept_bytes(lambda given=given: plain(x, "silu", hosts, given), known) == plainly
    e, u = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    assert kept_bytes(lambda: gated_product("silu", e, u), [e, u]) == 0
    assert kept_bytes(lambda: F.silu(e) * u, [e, u]) == e.nbytes


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_product_and_its_gradients_are_those_of_plain_operations(activation: Activation) -> None:
    torch.manual_seed(0)
    e, u = (torch.randn(5, 7, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda e, u: gated_product(activation, e, u), (e, u))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        e, u = (torch.randn(5, 7).to(dtype).requires_grad_() for _ in range(2))
        found, wanted = gated_product(activation, e, u), PLAIN[activation](e) * u
        assert torch.equal(found, wanted)
        dh = torch.randn(5, 7).to(dtype)
        expected = torch.autograd.grad(wanted, (e, u), dh)
        for over in (False, True):
            given = [tensor.detach().clone() for tensor in (e, u, dh)]
            de, du = product_gradients(activation, *given, overwrite=over)
            assert torch.equal(de, expected[0]) and torch.equal(du, expected[1])
            assert torch.equal(given[0], e) and torch.equal(given[1], u) and (over or torch.equal(given[2], dh))


def test_a_product_of_two_dtypes_follows_torch() -> None:
    e, u = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4).bfloat16()
    found = gated_product("silu", e, u)
    assert found.dtype == torch.float32 and torch.equal(found, F.silu(e) * u)
    assert gated_product("silu", e.bfloat16(), u.float()).dtype == torch.float32
