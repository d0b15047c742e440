"""The fused low-rank part equals plain operations: values, gradients, dropout; it keeps less, and never writes into what others need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import graft
from graft.attaching.active import running, set_trainable
from graft.ops.low_rank import LowRankUpdate, add_low_rank, makes_its_output
from graft.routing.context import AdapterContext, ForwardContext

I, O, RANKS = 6, 5, (2, 3, 1)  # noqa: E741
LENGTHS = (3, 4, 2)


def terms(flat: bool, p: float, dtype: torch.dtype = torch.float64) -> list[LowRankUpdate]:
    """Three adapters, of one row each; between the second and the third a row, or two tokens, that none serves."""
    torch.manual_seed(3)
    starts = (0, 3, 9) if flat else (0, 1, 3)
    made = []
    for number, (rank, length) in enumerate(zip(RANKS, LENGTHS, strict=True)):
        A = torch.randn(rank, I, dtype=dtype).requires_grad_()
        B = torch.randn(O, rank, dtype=dtype).requires_grad_()
        ctx = AdapterContext((length,) if flat else None, flat, (7 + number,))
        rows = slice(starts[number], starts[number] + (length if flat else 1))
        made.append(LowRankUpdate(A, B, 1.5 + number, p, number, ctx, rows))
    return made


def inputs(flat: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    shape = (1, 12) if flat else (4, 3)
    x, h = (torch.randn(*shape, size, dtype=dtype).requires_grad_() for size in (I, O))
    return x, h


def by_hand(x: Tensor, h: Tensor, given: list[LowRankUpdate]) -> Tensor:
    """Row by row, with the mask that the pass draws."""
    out = []
    for number, row in enumerate(h.flatten(0, 1).split(1)):
        for term in given:
            size = 1 if term.ctx.flat else h.shape[1]
            if term.rows.start <= number // size < term.rows.stop:  # type: ignore[union-attr]
                start = term.rows.start * size  # type: ignore[union-attr]
                own = term.rows_of(x)
                kept = term.ctx.dropout_mask(own, term.p, term.site_index) if term.p else torch.ones_like(own)
                dropped = (own * kept).flatten(0, 1)[number - start]
                row = row + term.scale * (term.B @ (term.A @ dropped))
        out.append(row)
    return torch.cat(out).view(h.shape)


def leaves(x: Tensor, h: Tensor, given: list[LowRankUpdate]) -> list[Tensor]:
    return [x, h, *(factor for term in given for factor in (term.A, term.B))]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_values_and_gradients_are_those_of_the_equations(flat: bool, p: float, in_place: bool) -> None:
    (x, h), given = inputs(flat), terms(flat, p)
    wanted = by_hand(x, h, given)
    weight = torch.randn_like(wanted)
    expected = torch.autograd.grad((wanted * weight).sum(), leaves(x, h, given))
    found = add_low_rank(x, h * 1.0, given, in_place=in_place)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    gradients = torch.autograd.grad((found * weight).sum(), leaves(x, h, given))
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_pass_gradcheck(flat: bool, p: float) -> None:
    (x, h), given = inputs(flat), terms(flat, p)

    def run(x: Tensor, h: Tensor, *factors: Tensor) -> Tensor:
        now = [
            LowRankUpdate(A, B, t.scale, t.p, t.site_index, t.ctx, t.rows)
            for t, A, B in zip(given, factors[::2], factors[1::2], strict=True)
        ]
        return add_low_rank(x, h, now)

    assert torch.autograd.gradcheck(run, leaves(x, h, given))


def test_h_is_untouched_unless_it_may_be_written_to() -> None:
    (x, h), given = inputs(True), terms(True, 0.0)
    made = (h * 1.0).detach()
    before = made.clone()
    assert add_low_rank(x, made, given).data_ptr() != made.data_ptr() and torch.equal(made, before)
    assert add_low_rank(x.detach(), made, given, in_place=True) is made and not torch.equal(made, before)
    view = before.clone()[:, :]
    kept = view.clone()
    assert add_low_rank(x, view, given, in_place=True).data_ptr() != view.data_ptr() and torch.equal(view, kept)


def test_an_h_that_its_maker_keeps_for_backward_is_an_error_and_never_a_wrong_gradient() -> None:
    (x, h), given = inputs(True), terms(True, 0.0)
    kept = h.tanh()
    out = add_low_rank(x, kept, given, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def plain_lora(x: Tensor, h: Tensor, term: LowRankUpdate) -> Tensor:
    return h + term.plain(x)


def saved_bytes(run: Any, bases: tuple[Tensor, ...]) -> int:
    """Memory that the graph of `run` keeps, each storage once, parameters and the inputs at hand not counted."""
    found: dict[int, int] = {}
    own = {base.untyped_storage().data_ptr() for base in bases}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    assert kept.requires_grad
    return sum(found.values())


@pytest.mark.parametrize(("p", "share"), [(0.0, 1.0), (0.1, 0.1)])
def test_it_keeps_only_what_has_the_rank_as_its_width(p: float, share: float) -> None:
    torch.manual_seed(0)
    x, h = torch.randn(2, 50, 64, requires_grad=True), torch.randn(2, 50, 32, requires_grad=True)
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    term = LowRankUpdate(A, B, 2.0, p, 0, AdapterContext(None, False, (1, 2)))
    given = (x, h, A, B)
    ours = saved_bytes(lambda: add_low_rank(x, h, [term]), given)
    plain = saved_bytes(lambda: plain_lora(x, h, term), given)
    assert ours == 100 * 4 * 4 and ours <= share * plain  # N tokens of R numbers of 4 bytes
    torch.testing.assert_close(add_low_rank(x, h, [term]), plain_lora(x, h, term))


def test_bfloat16_with_masters_in_float32_is_no_further_from_the_truth_than_plain_operations() -> None:
    torch.manual_seed(0)
    x, h = torch.randn(1, 64, 32).bfloat16(), torch.randn(1, 64, 48).bfloat16()
    A, B = torch.randn(4, 32, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    term = LowRankUpdate(A, B, 0.5, 0.0, 0, AdapterContext())
    exact = h.double() + 0.5 * (x.double() @ A.double().t()) @ B.double().t()
    ours, plain = add_low_rank(x, h, [term]), plain_lora(x, h, term)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() <= (plain - exact).abs().mean()
    found = torch.autograd.grad(ours.sum(), (A, B))
    for gradient, other in zip(found, torch.autograd.grad(plain.sum(), (A, B)), strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))


def test_without_seeds_dropout_is_torch_s_own() -> None:
    (x, h), given = inputs(False), terms(False, 0.4)
    free = [LowRankUpdate(t.A, t.B, t.scale, t.p, t.site_index, AdapterContext(), t.rows) for t in given]
    torch.manual_seed(5)
    found = add_low_rank(x, h, free)
    torch.manual_seed(5)
    wanted = h.detach().clone()
    for term in free:
        wanted[term.rows] += term.plain(x[term.rows]).detach()
    torch.testing.assert_close(found, wanted)


def test_function_transforms_take_the_plain_way() -> None:
    x, h = (tensor.detach() for tensor in inputs(True))
    term = terms(True, 0.0)[0]
    whole = LowRankUpdate(term.A, term.B, 1.0, 0.0, 0, AdapterContext())
    slope = torch.func.grad(lambda x: add_low_rank(x, h, [whole]).sum())(x)
    torch.testing.assert_close(slope, (term.B @ term.A).sum(0).detach().expand_as(x))


class Two(nn.Module):
    """A linear layer whose output is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(h.tanh()) * h


def mixed(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = Two().to(dtype)
    adapters: dict[str, Any] = {
        "a": {"kind": "lora", "rank": 2, "dropout": 0.3, "sites": "re:first|second"},
        "b": {"kind": "lora", "rank": 3, "sites": "re:first|second"},
        "c": {"kind": "parallel", "bottleneck": 3, "sites": "re:first|second"},
        "d": {"kind": "dora", "rank": 2, "dropout": 0.2, "sites": "re:first|second"},
    }
    graft.attach(model, adapters)
    set_trainable(model, list(adapters))
    with torch.no_grad():
        for name in adapters:
            for _, parameter in graft.parameters(model, name):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.train()


def gradients(model: nn.Module, name: str) -> list[Tensor]:
    return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for _, p in graft.parameters(model, name)]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("recomputed", [True, False])
def test_rows_of_several_adapters_and_of_none_equal_each_alone(flat: bool, recomputed: bool) -> None:
    """LoRA beside other kinds, in a module whose output is used twice and kept by what uses it; also recomputed in backward."""
    model, lengths = mixed(), (2, 1, 3, 2, 1, 2) if flat else (3,) * 6
    names = ("a", "c", None, "b", "a", "d") if flat else ("a", "a", None, "b", "c", "d")
    rows = [torch.randn(1, length, 8, dtype=torch.float64) for length in lengths]

    def run(chosen: list[int]) -> Tensor:
        x = torch.cat([rows[row] for row in chosen], 1 if flat else 0).requires_grad_()
        context = ForwardContext(
            tuple(names[row] for row in chosen), tuple(lengths[row] for row in chosen), flat, tuple(chosen)
        )

        def forward(x: Tensor) -> Tensor:
            with running(model, context):
                return model(x)

        model.zero_grad()
        out = checkpoint(forward, x, use_reentrant=False) if recomputed else forward(x)
        out.square().sum().backward()
        assert x.grad is not None
        return torch.cat([out.detach(), x.grad], -1)

    together = run(list(range(6))).split(lengths if flat else 1, 1 if flat else 0)
    found = {name: gradients(model, name) for name in "abcd"}
    alone = [run([row]) for row in range(6)]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    for name in "abcd":
        run([row for row in range(6) if names[row] == name])
        for gradient, wanted in zip(found[name], gradients(model, name), strict=True):
            assert wanted.abs().max() > 0
            torch.testing.assert_close(gradient, wanted, atol=1e-11, rtol=1e-11)


def test_a_linear_layer_alone_lets_its_output_be_written_to() -> None:
    model = mixed()
    assert makes_its_output(model.first) and not makes_its_output(nn.ReLU())
    model.first.weight.requires_grad_(True)  # else the layer is in the node itself
    seen: list[int] = []
    model.first.register_forward_hook(lambda module, args, output: seen.append(output.data_ptr()))
    made: list[int] = []
    linear = F.linear

    def noted(*args: Any) -> Tensor:
        made.append((output := linear(*args)).data_ptr())
        return output

    with pytest.MonkeyPatch.context() as patch, graft.use(model, "b"):
        patch.setattr("torch.nn.modules.linear.F.linear", noted)
        model.eval()(torch.randn(2, 3, 8, dtype=torch.float64))
    assert seen == made[:1]
